"""The command `lmdist-train`: a launcher that starts torchrun, restarts it after failures, and forwards requests to stop.

Nothing here knows what the ranks compute.
"""

import signal

from lmdist.stop_signals import STOP_SIGNALS


def main() -> None:
    """Run the launcher. A stop that arrives during its imports is held back until it listens, and is not lost."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, *STOP_SIGNALS))
    from lmdist.job import launcher

    launcher.main()

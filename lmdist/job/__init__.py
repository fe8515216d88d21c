"""The command `lmdist-train`: a launcher that starts torchrun, restarts it after failures, and forwards requests to stop.

Nothing here knows what the ranks compute.
"""

import signal

HELD_BACK = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
"""Ctrl-C and signals.STOP_SIGNALS, which it would take too long to import."""


def main() -> None:
    """Run the launcher. A stop that arrives during its imports is held back until it listens, and is not lost."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [getattr(signal, name) for name in HELD_BACK])
    from lmdist.job import launcher

    launcher.main()

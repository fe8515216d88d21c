"""The signals that ask a job to stop, in a file of their own: the launcher blocks them before it imports anything else."""

import signal

STOP_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)  # not on Windows
]
"""Requests to stop, beside Ctrl-C: of Kubernetes, of a terminal that is closed, of Slurm before a time limit."""

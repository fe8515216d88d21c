"""Requests to stop, and processes that are killed with their parent.

SIGTERM is how Kubernetes, Slurm and torchrun ask a job to stop; Ctrl-C is how a person does; SIGHUP comes when a terminal is
closed, SIGUSR1 from `sbatch --signal`. During the preparation a request ends the job at once. In the training loop it is
deferred to the end of a step, so that the step can be saved. This module does not know what a step is, nor which other
processes must be informed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lmdist.errors import Stopped
from lmdist.stop_signals import STOP_SIGNALS

AGENT = "LMDIST_AGENT"
"""Environment variable of the ranks that the launcher started: the process id of their parent."""
FIRST_FAILURE = "LMDIST_FIRST_FAILURE"
"""Environment variable of the same: a file that the first rank that fails creates, with its exit code."""
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
SECOND_INTERRUPT_SECONDS = 2.0
"""A later Ctrl-C is a second request; an earlier one is the first, forwarded by the launcher."""


class StopRequest:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.requested_at: float | None = None
        self.deferred = False
        """Whether a request only sets `requested`; otherwise it raises Stopped at once."""

    @property
    def requested(self) -> bool:
        """Return whether a request has arrived."""
        return self.requested_at is not None

    def listen(self) -> StopRequest:
        """Handle Ctrl-C and the other requests from now on, but not a SIGHUP that `nohup` has had ignored."""
        for number in (signal.SIGINT, *STOP_SIGNALS):
            if number in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.handle)
        if hasattr(signal, "pthread_sigmask"):  # job/__init__.py has blocked them
            signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, *STOP_SIGNALS))
        return self

    def ignore(self) -> None:
        """Ignore further requests: Python removes its handlers before it exits, and a late one would change the exit code."""
        for number in (signal.SIGINT, *STOP_SIGNALS):
            signal.signal(number, signal.SIG_IGN)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Record the request. Raise Stopped unless requests are deferred, and KeyboardInterrupt at a second Ctrl-C."""
        if self.requested_at is None:
            self.requested_at = time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self.requested_at > SECOND_INTERRUPT_SECONDS:
            raise KeyboardInterrupt
        if not self.deferred:
            raise Stopped("stopped on request before the first step: run it again")


@contextmanager
def interrupted_by(signals: list[signal.Signals]) -> Iterator[None]:
    """Have signals raise KeyboardInterrupt, as Ctrl-C does, where they would end the process at once."""
    in_main = threading.current_thread() is threading.main_thread()  # no other thread may set a handler
    changed = [number for number in signals if in_main and signal.getsignal(number) == signal.SIG_DFL]
    for number in changed:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in changed:
            if signal.getsignal(number) is signal.default_int_handler:
                signal.signal(number, signal.SIG_DFL)


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when its parent exits; `parent` is the parent's id, where it is known.

    Linux only. Elsewhere a process whose parent was killed by SIGKILL runs until it notices.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = parent or os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it exited before the call
        os._exit(1)

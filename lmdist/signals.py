"""Stopping when asked, and not outliving the process that started this one.

SIGTERM is how Kubernetes, Slurm and torchrun ask a job to end; Ctrl-C is how a person does. While a job prepares, a request
ends it at once. In the training loop it waits for the end of a step, so that the step can be saved. This module does not
know what a step is, nor who else has to be asked.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from types import FrameType

from lmdist.errors import Stopped

AGENT = "LMDIST_AGENT"
"""In the environment of ranks that the launcher started: the process id of their parent."""
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
SECOND_INTERRUPT = 2.0
"""Seconds after which another Ctrl-C is meant as one; sooner it is the same one, by way of the launcher."""


class StopRequest:
    """Whether this process has been asked to stop."""

    def __init__(self) -> None:
        self.requested_at: float | None = None
        self.patient = False
        """A request waits until somebody looks at `requested`."""

    @property
    def requested(self) -> bool:
        """Whether a request has come."""
        return self.requested_at is not None

    def listen(self) -> StopRequest:
        """Take SIGTERM and SIGINT from now on."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle)
        return self

    def ignore(self) -> None:
        """Take no more requests: Python gives up its handlers before it ends, and a late one would change the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note the request; raises Stopped where nothing is worth waiting for, KeyboardInterrupt at a second Ctrl-C."""
        if self.requested_at is None:
            self.requested_at = time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self.requested_at > SECOND_INTERRUPT:
            raise KeyboardInterrupt
        if not self.patient:
            raise Stopped("stopped on request before the first step: run it again")


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when the one that started it ends; `parent` is that one's id, where it is known.

    Linux only: elsewhere a process whose parent is killed by SIGKILL goes on until it notices on its own.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = parent or os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the kernel was told
        os._exit(1)

"""A process beside a rank, for work that the training must not wait for; both ends of the pipe between them.

`Companion` is its handle in the rank. `Job` is the job as that process sees it: when the pipe is closed, whatever has become of
the rank, the process ends too. This module does not know what the process does.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from threading import Event, Thread
from typing import IO

from lmdist.errors import EXIT_AGAIN

ONE_THREAD = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL", "NUMEXPR")}


class Companion:
    """The handle of the process. It never raises, whatever becomes of the process."""

    def __init__(self, *arguments: str, stderr: int | None = None) -> None:
        """Start Python with these arguments; `child` is None where no memory or no process is left for it."""
        self.child: subprocess.Popen[bytes] | None = None
        with suppress(OSError):
            self.child = subprocess.Popen(
                [sys.executable, *arguments],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env={**os.environ, **ONE_THREAD},
                process_group=0,  # Ctrl-C and signals to a process group are for the job
            )

    def send(self, line: str) -> None:
        """Send a line to the process, unless it has exited already."""
        if self.child:
            assert self.child.stdin
            with suppress(OSError):
                self.child.stdin.write(f"{line}\n".encode())

    def end(self) -> None:
        """Kill the process."""
        if self.child:
            assert self.child.stdin
            self.child.kill()
            with suppress(subprocess.TimeoutExpired):  # a process that hangs in a file system cannot be killed
                self.child.wait(1)
            self.child.stdin.close()


class Job:
    """The job, at the other end of the pipe, with the status that it has sent."""

    def __init__(self, pipe: IO[str], seconds_left: float = 0.0) -> None:
        """Listen in a thread; this process ends so many seconds after the pipe is closed."""
        self.pipe = pipe
        self.seconds_left = seconds_left
        self.ended = Event()
        self.status = "RUNNING"
        Thread(target=self.listen, name="job", daemon=True).start()

    def listen(self) -> None:
        """Read the line with the status, then end this process soon after the pipe is closed: the job's process is gone."""
        for line in iter(self.pipe.readline, ""):
            self.status = line.strip()
            self.ended.set()
        if not self.ended.is_set():
            self.status = "KILLED"
            self.ended.set()
        time.sleep(self.seconds_left)
        os._exit(EXIT_AGAIN)

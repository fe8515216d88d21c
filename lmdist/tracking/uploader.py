"""The uploader: a process beside rank 0 that replays the run's folder into MLflow while the job runs.

`Uploader` is its handle in rank 0: it starts the process and, at the end, sends it the status of the run. `follow` is what the
process does. It uploads every PERIOD_SECONDS, retries with back-off while MLflow does not answer, and exits at most
ORPHAN_SECONDS after its job, however that ended. It does not know how a run is uploaded (replay.py).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any

from lmdist.console import log
from lmdist.errors import EXIT_AGAIN, Stopped
from lmdist.stop_signals import STOP_SIGNALS
from lmdist.storage.locks import exclusive_lock
from lmdist.tracking.address import is_file, store_address
from lmdist.tracking.companion import Companion, Job
from lmdist.tracking.failures import is_final, reason_without_secrets
from lmdist.tracking.metadata import update_metadata
from lmdist.tracking.replay import Replay
from lmdist.tracking.run_folder import METRICS, UPLOAD_LOCK, sync_command
from lmdist.tracking.store import silence

COMMAND = ("-m", "lmdist.tracking.sync", "--follow")
"""Arguments of Python that start the process; the run's folder follows."""
SERVER_WAIT_SECONDS = 9.0
"""How long the end of a job waits for a server; with the kill and the rest of the exit it stays below 10."""
FILE_WAIT_SECONDS = 120.0
"""The same for a store in a file, which is only slow when many jobs share it."""
QUIET_SECONDS = 3.0
"""Of them, those before a line says that the job waits."""
PERIOD_SECONDS = 10.0
"""Between two uploads. Each takes some 50 ms of a core that a training may want, so they are rare: below 1 %."""
LONGEST_BACKOFF_SECONDS = 30.0
"""Between two attempts while MLflow does not answer; the back-off doubles from one second on."""
MAX_ATTEMPTS = 3
"""Failures in a row after which the end of a job does not retry."""
ORPHAN_SECONDS = 4.0
"""How long the process outlives its job, at most."""


class Uploader:
    """Rank 0's handle of the uploader process. It never raises, whatever becomes of the process."""

    def __init__(self, run: Path) -> None:
        """Start the process for the folder `run`."""
        self.wait_seconds = FILE_WAIT_SECONDS if is_file(store_address()) else SERVER_WAIT_SECONDS
        self.process = Companion(*COMMAND, str(run))

    def finish(self, status: str) -> bool:
        """Send the run's status and wait for the process to exit; return whether MLflow has all of the run."""
        child = self.process.child
        if child is None:  # the end of the job reports that points are missing
            return False
        try:
            self.process.send(status)
            with suppress(subprocess.TimeoutExpired):
                return child.wait(QUIET_SECONDS) == 0
            log(f"waiting for MLflow, at most {self.wait_seconds:.0f} s")
            return child.wait(max(0.0, self.wait_seconds - QUIET_SECONDS)) == 0
        except subprocess.TimeoutExpired:
            return False
        finally:
            self.process.end()


def follow(run: Path, stderr: IO[str]) -> int:
    """Upload a run until its job, at the other end of stdin, has ended; return the exit code. Messages go to `stderr`."""
    for number in (signal.SIGINT, *STOP_SIGNALS):
        signal.signal(number, signal.SIG_IGN)  # a job is often ended by a signal to all its processes; uploads remain
    os.nice(19)  # at 10 it still takes a tenth of a core from a training that uses them all
    job = Job(sys.stdin, ORPHAN_SECONDS)
    with silence(), ExitStack() as stack:
        while True:
            with suppress(Stopped):  # held by the uploader of a job that was just killed, or by lmdist-sync
                stack.enter_context(exclusive_lock(run / UPLOAD_LOCK, 1))
                break
            if job.ended.is_set():
                return EXIT_AGAIN
        replay = Replay(run, update_metadata(run, status="RUNNING"), live=True)
        points, files = Retry("points", run / METRICS, run, stderr), Retry("files", run, run, stderr)

        def upload_files() -> None:
            replay.upload_files()
            replay.monitor_system()

        while not job.ended.wait(1):
            if points.due:
                points.attempt(replay.upload_points)
            if points.succeeded and files.due:
                files.attempt(upload_files)
        replay.metadata = update_metadata(run, status=job.status)
        complete = points.persist(lambda: replay.upload_status(job.status)) and files.persist(
            lambda: replay.upload_files(ended=True)
        )
        return 0 if complete else EXIT_AGAIN


class Retry:
    """One kind of upload with back-off: one warning in an outage, one line when uploads succeed again.

    What fails for a reason that patience does not mend is reported at once, and not tried again at the end of the job.
    """

    def __init__(self, what: str, place: Path, run: Path, stderr: IO[str]) -> None:
        """Retry the upload of `what`, which lies in `place`, a part of the folder `run`."""
        self.what = what
        self.place = place
        self.run = run
        self.stderr = stderr
        self.failures = 0
        self.reported = self.is_final = False
        self.next_time = 0.0

    @property
    def succeeded(self) -> bool:
        """Return whether the last attempt succeeded."""
        return self.failures == 0

    @property
    def due(self) -> bool:
        """Return whether it is time for the next attempt."""
        return time.monotonic() >= self.next_time

    def attempt(self, upload: Callable[[], Any]) -> bool:
        """Try once; return whether it succeeded. A first failure is not reported: an idle connection may have been closed."""
        try:
            upload()
        except Exception as error:  # any exception of MLflow and the libraries below it: tracking never hurts training
            self.is_final = is_final(error)
            backoff = LONGEST_BACKOFF_SECONDS if self.is_final else min(2**self.failures, LONGEST_BACKOFF_SECONDS)
            self.next_time = time.monotonic() + backoff
            self.failures += 1
            if not self.reported and (self.failures > 1 or self.is_final):
                self.reported = True
                reason = reason_without_secrets(error)
                self.print(
                    f"warning: MLflow does not accept this run's {self.what} ({reason}); they are in {self.place}; "
                    f"{sync_command(self.run)} uploads them later"
                )
            return False
        if self.reported:
            self.print(f"MLflow accepts this run's {self.what} again")
            self.reported = False
        self.next_time = time.monotonic() + PERIOD_SECONDS
        self.failures = 0
        return True

    def persist(self, upload: Callable[[], Any]) -> bool:
        """Try up to MAX_ATTEMPTS times, only once if as many attempts have failed already; return whether it succeeded."""
        while not self.attempt(upload):
            if self.is_final or self.failures >= MAX_ATTEMPTS:
                return False
            time.sleep(max(0.0, self.next_time - time.monotonic()))
        return True

    def print(self, line: str) -> None:
        """Print a line, if the other end still reads."""
        with suppress(OSError):
            self.stderr.write(f"{line}\n")
            self.stderr.flush()

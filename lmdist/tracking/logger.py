"""The loggers of a training: rank 0 writes the run's folder, the other ranks log nothing.

Logging costs the training a line in `metrics.jsonl`. An uploader process (uploader.py) copies the folder to MLflow, so a slow
or dead server costs the training nothing: no request, no import, no thread. What the uploader cannot upload while the job
runs, `lmdist-sync RUN` uploads later. This module does not know the training loop.

    mlflow ui --backend-store-uri sqlite:///mlflow.db      # the page, for the default store
"""

from __future__ import annotations

import time
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lmdist.console import log
from lmdist.errors import EXIT_AGAIN, Stopped
from lmdist.settings import TrackingSettings
from lmdist.storage.atomic import write_atomic
from lmdist.storage.locks import exclusive_lock
from lmdist.tracking.run_folder import (
    METRICS,
    RUN_METADATA,
    UPLOAD_LOCK,
    MetricsFile,
    dataset_inputs,
    new_metadata,
    read_metadata,
    update_metadata,
    write_metadata,
)
from lmdist.tracking.store import page_hint
from lmdist.tracking.uploader import Uploader

LOCK_WAIT_SECONDS = 6.0
"""How long a new job waits for the uploader of a job that was just killed; that one exits after 4."""


class MetricsLogger:
    """A logger that discards what it is given: for ranks other than 0."""

    writes = False
    """Whether anything is written."""
    page = ""
    """How to open the run's page in MLflow, where it has one."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        stopped = kind is not None and (
            issubclass(kind, KeyboardInterrupt | SystemExit) or getattr(kind, "exit_code", None) == EXIT_AGAIN
        )
        self.close("FINISHED" if kind is None else "KILLED" if stopped else "FAILED")

    def log_metrics(self, step: int, values: dict[str, float]) -> None:
        """Log metrics as they are after `step` steps."""

    def log_text(self, name: str, text: str) -> None:
        """Log a text, such as a sample, under a file name."""

    def close(self, status: str) -> None:
        """End the run with the status FINISHED, FAILED or KILLED."""


class RunLogger(MetricsLogger):
    """A logger that writes the run's folder and starts its uploader where the settings ask for one."""

    writes = True

    def __init__(
        self,
        run: Path,
        settings: TrackingSettings,
        parameters: dict[str, Any],
        data_name: str,
        data_meta: dict[str, Any],
        step: int,
        *,
        resume: bool,
    ) -> None:
        """Log a run that is at `step`; `resume` says whether it continues the run that is in the folder."""
        self.run = run
        with ExitStack() as stack:
            if (run / RUN_METADATA).exists():
                with suppress(Stopped):  # held by a long lmdist-sync, which has read the metadata already
                    stack.enter_context(exclusive_lock(run / UPLOAD_LOCK, LOCK_WAIT_SECONDS))
            if not resume:
                (run / RUN_METADATA).unlink(missing_ok=True)
            self.file = MetricsFile(run / METRICS, step)
            before = read_metadata(run)
            if settings.mlflow or before:
                inputs = dataset_inputs(data_name, data_meta)
                metadata = new_metadata(run, settings.experiment, parameters, inputs, int(time.time() * 1000))
                # Earlier entries stay: MLflow rejects a parameter that changes.
                write_metadata(run, {**metadata, **before, "status": "RUNNING"})
        self.uploader = Uploader(run) if settings.mlflow else None
        self.page = page_hint() if settings.mlflow else ""

    def log_metrics(self, step: int, values: dict[str, float]) -> None:
        """Append a row to metrics.jsonl."""
        self.file.append(step, values)

    def log_text(self, name: str, text: str) -> None:
        """Write the text into the run's folder."""
        path = self.run / name
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, text)

    def close(self, status: str) -> None:
        """Close metrics.jsonl, wait a bounded time for the uploader, and make sure that the metadata hold the status."""
        self.file.close()
        try:
            if self.uploader and not self.uploader.finish(status):
                log(f"warning: MLflow has not received all of this run; lmdist-sync {self.run} uploads the rest")
        finally:
            # The uploader has written the status, unless it hung; then it was killed, so there is no second writer.
            with suppress(OSError):
                if read_metadata(self.run).get("status", status) != status:
                    update_metadata(self.run, status=status)

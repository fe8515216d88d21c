"""The loggers of a training: rank 0 writes the run's folder, the other ranks log nothing.

Logging costs the training a line in `metrics.jsonl`. An uploader process (uploader.py) copies the folder to MLflow, so a slow
or dead server costs the training nothing: no request, no import, no thread. What the uploader cannot upload while the job
runs, `lmdist-sync RUN` uploads later. This module does not know the training loop.

    mlflow ui --backend-store-uri sqlite:///mlflow.db      # the server of the pages, for the default store
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lmdist.console import log
from lmdist.errors import EXIT_AGAIN, Stopped
from lmdist.settings import TrackingSettings
from lmdist.storage.atomic import write_atomic
from lmdist.storage.locks import exclusive_lock
from lmdist.tracking.address import experiment_name, pages
from lmdist.tracking.machines import is_first_of_another_machine, machine_monitor
from lmdist.tracking.metadata import (
    dataset_inputs,
    new_metadata,
    own_metadata,
    provenance,
    read_metadata,
    update_metadata,
    write_metadata,
)
from lmdist.tracking.run_folder import METRICS, RUN_METADATA, UPLOAD_LOCK, MetricsFile, sync_command
from lmdist.tracking.uploader import Uploader

LOCK_WAIT_SECONDS = 6.0
"""How long a new job waits for the uploader of a job that was just killed; that one exits after 4."""


class MetricsLogger:
    """A logger that discards what it is given: for ranks other than 0."""

    writes = False
    """Whether anything is written."""
    run_key = ""
    """The key of the run that is uploaded to MLflow while the job runs, if it is."""

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
        description: str = "",
        started_from: Mapping[str, Any] | None = None,
    ) -> None:
        """Log a run that is at `step`; `resume` says whether it continues the run that is in the folder.

        MLflow's page shows the `description` of the model, and the run below the one that it `started_from`.
        """
        self.run = run
        with ExitStack() as stack:
            if (run / RUN_METADATA).exists():
                with suppress(Stopped):  # held by a long lmdist-sync, which has read the metadata already
                    stack.enter_context(exclusive_lock(run / UPLOAD_LOCK, LOCK_WAIT_SECONDS))
            if not resume:
                (run / RUN_METADATA).unlink(missing_ok=True)
            self.file = MetricsFile(run / METRICS, step)
            written = read_metadata(run)
            before = own_metadata(run, written)
            if settings.mlflow or before:
                inputs, now = dataset_inputs(data_name, data_meta), int(time.time() * 1000)
                experiment = experiment_name(settings.experiment)
                metadata = new_metadata(run, experiment, parameters, inputs, now, provenance(description, started_from or {}))
                # Earlier entries stay, for MLflow rejects a parameter that changes; the run of a copy has none yet.
                kept = before if before is written else {**before, "parameters": parameters}
                write_metadata(run, {**metadata, **kept, "status": "RUNNING"})
        self.uploader = Uploader(run) if settings.mlflow else None
        self.run_key = read_metadata(run)["run_key"] if settings.mlflow else ""

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
                log(f"warning: MLflow has not received all of this run; {sync_command(self.run)} uploads the rest")
            elif self.uploader and "run_id" in (metadata := read_metadata(self.run)):
                for line in pages(metadata["experiment_id"], metadata["run_id"]):
                    log(line)
        finally:
            # The uploader has written the status, unless it hung; then it was killed, so there is no second writer.
            with suppress(OSError):
                if read_metadata(self.run).get("status", status) != status:
                    update_metadata(self.run, status=status)


class MachineLogger(MetricsLogger):
    """The logger of the first rank of another machine than rank 0's: MLflow gets the machine's load."""

    def __init__(self, run: Path, run_key: str) -> None:
        """Start the process that logs it, to the run with this key in the folder `run`."""
        self.monitor = machine_monitor(run, run_key)

    def close(self, status: str) -> None:
        """End the process."""
        self.monitor.end()


def logger_of_rank(run: Path, run_key: str) -> MetricsLogger:
    """Return the logger of a rank other than 0, of a job whose rank 0 uploads the run with this key, or none."""
    return MachineLogger(run, run_key) if run_key and is_first_of_another_machine() else MetricsLogger()

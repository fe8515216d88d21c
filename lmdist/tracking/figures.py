"""Figures of a run that are measured after its training: lmdist-evaluate adds them to metrics.jsonl, and MLflow gets them.

This module does not know how they are measured.
"""

from __future__ import annotations

from pathlib import Path

from lmdist.console import log
from lmdist.errors import DataError, MissingInputError, Stopped
from lmdist.storage.locks import exclusive_lock
from lmdist.tracking.address import configure
from lmdist.tracking.failures import UploadError
from lmdist.tracking.run_folder import METRICS, RUN_METADATA, TEST, UPLOAD_LOCK, append_figures, is_training, sync_command
from lmdist.tracking.sync import upload


def add_figures(run: Path, step: int, values: dict[str, float], command: str) -> None:
    """Add figures of a run's checkpoint of `step`, and upload them where MLflow has the run. What fails is a log line."""
    try:
        append_figures(run / METRICS, step, {f"{TEST}{name}": value for name, value in values.items()})
    except (DataError, OSError) as error:
        log(f"warning: {run / METRICS} does not get the figures: {getattr(error, 'strerror', error)}", command)
        return
    try:
        if not (run / RUN_METADATA).exists() or is_training(run):  # without MLflow, or its job uploads them
            return
        configure()
        with exclusive_lock(run / UPLOAD_LOCK, 0):
            upload(run)
    except (UploadError, DataError, MissingInputError, Stopped, OSError) as error:
        log(f"warning: MLflow does not get the figures ({error}); {sync_command(run)} uploads them later", command)

"""A run's folder: the names of its files, and `metrics.jsonl`.

The folder is the source of truth and MLflow holds a copy. This module does not know how MLflow is accessed.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdist.console import log
from lmdist.errors import Stopped, UsageError
from lmdist.storage.atomic import check_output_folder, write_atomic
from lmdist.storage.locks import exclusive_lock
from lmdist.storage.reading import refuse_link
from lmdist.storage.schema import is_number

if TYPE_CHECKING:
    from lmdist.settings import Recipe

CHECKPOINTS, SAMPLES = "checkpoints", "samples"
STEP = re.compile("step-([0-9]{9,})")
"""The name of a checkpoint's folder among the checkpoints, with its step; any other folder there is the user's own."""
NEWEST = "newest"
"""Among the checkpoints: a file with the name of the one that was written last."""
RECIPE = "recipe.toml"
"""The resolved recipe."""
FINISHED = "finished.toml"
"""Written after the last step: the recipe that the run was trained by, with `resume` auto."""
METRICS = "metrics.jsonl"
PICTURE = "loss.png"
SAMPLE = "sample.txt"
"""The last sample."""
RUN_METADATA = "mlflow.json"
"""What links the run to MLflow, and how it ended."""
JOB_LOCK = ".lock"
"""Held by the job that trains in the folder."""
MAX_TIME = 1 << 40
"""Of a row, in seconds since 1970."""
TEST = "test/"
"""How the names of the figures begin that lmdist-evaluate adds to metrics.jsonl."""
UPLOAD_LOCK = ".mlflow.lock"
"""Held by the one process that uploads the folder to MLflow and writes the run metadata."""


class MetricsFile:
    """`metrics.jsonl`, open for appending. Lines that a full disk rejects stay in memory and are written later."""

    def __init__(self, path: Path, step: int) -> None:
        """Open the file without its rows after `step`: a run resumed from that step logs them again."""
        kept = [row for row in read_metrics(path) if row["step"] <= step] if step else []
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))
        self.path = path
        self.file = path.open("ab", buffering=0)
        self.pending = b""
        self.warned = False

    def append(self, step: int, values: dict[str, float]) -> None:
        """Append one row."""
        self.pending += (json.dumps(row_of(step, values)) + "\n").encode()
        self.write()

    def write(self) -> None:
        """Write the pending lines; warn once while the disk rejects them."""
        try:
            while self.pending:
                self.pending = self.pending[self.file.write(self.pending) :]
            self.warned = False
        except OSError as error:
            if not self.warned:
                log(f"warning: {self.path} cannot be written ({error.strerror}); its lines are kept and tried again")
            self.warned = True

    def close(self) -> None:
        """Try the pending lines once more and close the file."""
        self.write()
        self.file.close()


def row_of(step: int, values: Mapping[str, float]) -> dict[str, Any]:
    """Return a row of metrics.jsonl, as of now, without the values that are not finite, for JSON has no such numbers."""
    return {"step": step, "time": round(time.time(), 3), **finite(values)}


def finite(values: Mapping[str, float]) -> dict[str, float]:
    """Return the values that are finite."""
    return {name: value for name, value in values.items() if math.isfinite(value)}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl, without a last line that a kill has truncated; raise DataError for a link."""
    refuse_link(path)
    if not path.exists():
        return []
    rows = (parse_row(line) for line in path.read_bytes().splitlines())
    return [row for row in rows if row is not None]


def parse_row(line: bytes) -> dict[str, Any] | None:
    """Return a row of metrics.jsonl, finite numbers by name; None for a line that a kill has truncated, or somebody changed."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not all(type(value) in (int, float) for value in row.values()):
        return None
    numbers = {name: value for name, value in row.items() if is_number(value, float)}
    is_row = type(numbers.get("step")) is int and 0 <= numbers.get("time", -1) < MAX_TIME
    return numbers if is_row else None


def append_figures(path: Path, step: int, values: dict[str, float]) -> None:
    """Append a row to the metrics.jsonl `path` of a run that may be in training, unless it has these values already.

    Raise DataError for a link, which may lead to any file of the user.
    """
    if any(row["step"] == step and finite(values).items() <= row.items() for row in read_metrics(path)):
        return
    with path.open("ab", buffering=0) as file:  # one write, at the end, whoever else appends
        truncated = path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"  # by a kill
        file.write((("\n" if truncated else "") + json.dumps(row_of(step, values)) + "\n").encode())


def sync_command(run: Path) -> str:
    """Return the command that uploads what MLflow lacks of a run."""
    return shlex.join(["lmdist-sync", str(run)])


def checkpoint_folders(checkpoints: Path) -> list[Path]:
    """Return the folders with a checkpoint's name, damaged or not, newest first."""
    return sorted((path for path in checkpoints.glob("step-*") if STEP.fullmatch(path.name) and path.is_dir()), reverse=True)


def newest_name(checkpoints: Path) -> str:
    """Return the name of the newest of these folders; empty where there is none."""
    return next((folder.name for folder in checkpoint_folders(checkpoints)), "")


def check_run_folder(run: Path, *, writes: bool) -> None:
    """Raise DataError where a part of a run is a link: what is written there would be written somewhere else.

    Where this machine `writes` the run (machine 0; the others read), raise UsageError before it trains for hours if it could
    not: for a folder that is none, or a file.
    """
    names = (RECIPE, FINISHED, METRICS, PICTURE, SAMPLE, RUN_METADATA, JOB_LOCK, UPLOAD_LOCK, f"{CHECKPOINTS}/{NEWEST}")
    for name in (CHECKPOINTS, SAMPLES, *names):
        refuse_link(run / name)
    if not writes:
        return
    for folder in (run, run / CHECKPOINTS, run / SAMPLES):
        check_output_folder("--run_folder", folder)
    for path in (run / name for name in names):
        if os.path.lexists(path) and not os.path.isfile(path):
            raise UsageError(f"--run_folder {run}: {path} is no file, and is to be one: move it away, or name another folder")


def is_finished(recipe: Recipe) -> bool:
    """Return whether the run was trained to its end by this very recipe, and may be resumed."""
    from lmdist import config

    finished = Path(recipe.run_folder) / FINISHED
    return recipe.resume == "auto" and finished.is_file() and finished.read_text("utf-8", "replace") == config.as_toml(recipe)


def is_training(run: Path) -> bool:
    """Return whether a job holds the folder's lock."""
    if not (run / JOB_LOCK).exists():
        return False
    try:
        with exclusive_lock(run / JOB_LOCK, 0):
            return False
    except Stopped:
        return True

"""A run's folder: the names of its files, `metrics.jsonl`, and the run metadata that link it to a run in MLflow.

The folder is the source of truth and MLflow holds a copy. This module does not know how MLflow is accessed.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdist.console import log
from lmdist.errors import DataError, Stopped, UsageError
from lmdist.storage.atomic import check_output_folder, write_atomic
from lmdist.storage.locks import exclusive_lock
from lmdist.storage.reading import read_json, refuse_link

if TYPE_CHECKING:
    from lmdist.settings import Recipe

CHECKPOINTS, SAMPLES = "checkpoints", "samples"
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
"""What it takes to find the run in MLflow or to create it there, and how the run ended. It holds no address."""
JOB_LOCK = ".lock"
"""Held by the job that trains in the folder."""
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
        row = {"step": step, "time": round(time.time(), 3), **values}
        self.pending += (json.dumps(row) + "\n").encode()
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


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl, without a last line that a kill has truncated."""
    if not path.exists():
        return []
    rows = (parse_row(line) for line in path.read_bytes().splitlines())
    return [row for row in rows if row is not None]


def parse_row(line: bytes) -> dict[str, Any] | None:
    """Return a row of metrics.jsonl; None for a line that a kill has truncated."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def new_metadata(
    run: Path, experiment: str, parameters: dict[str, Any], datasets: list[dict[str, str]], start_time: int
) -> dict[str, Any]:
    """Return the metadata of a run that MLflow does not know yet; `start_time` is in milliseconds since 1970."""
    return {
        "run_key": uuid.uuid4().hex,  # a tag of the run: it finds the run when the response to its creation was lost
        "experiment": experiment,
        "name": run.absolute().name,
        "start_time": start_time,
        "status": "RUNNING",
        "parameters": parameters,
        "datasets": datasets,
        "files": {},  # name and sha256 of each file that was uploaded
    }


def dataset_inputs(name: str, meta: dict[str, Any]) -> list[dict[str, str]]:
    """Return the splits of a data folder as inputs of an MLflow run; `meta` is the folder's meta.json."""
    return [
        {
            "name": name,
            "context": split,
            "digest": meta["files"][f"{split}.bin"]["sha256"][:36],
            "source": json.dumps({"sources": meta["sources"]}),
            "profile": json.dumps(counts),
        }
        for split, counts in meta.get("splits", {}).items()
    ]


def read_metadata(run: Path) -> dict[str, Any]:
    """Return the run metadata; empty where they are missing or unreadable."""
    try:
        return read_json(run / RUN_METADATA)
    except (FileNotFoundError, DataError):
        return {}


def write_metadata(run: Path, metadata: dict[str, Any]) -> None:
    """Write the run metadata atomically."""
    write_atomic(run / RUN_METADATA, json.dumps(metadata, indent=1, ensure_ascii=False) + "\n")


def update_metadata(run: Path, **changes: Any) -> dict[str, Any]:
    """Change some entries of the run metadata on disk; return all of them."""
    metadata = {**read_metadata(run), **changes}
    write_metadata(run, metadata)
    return metadata


def check_run_folder(run: Path) -> None:
    """Raise UsageError where a job could not write its run, before it trains for hours: a folder that is none, or a file.

    Raise DataError where one of them is a link: what is written there would be written somewhere else.
    """
    names = (RECIPE, FINISHED, METRICS, PICTURE, SAMPLE, RUN_METADATA, JOB_LOCK, UPLOAD_LOCK, f"{CHECKPOINTS}/{NEWEST}")
    for name in (CHECKPOINTS, SAMPLES, *names):
        refuse_link(run / name)
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

"""Where a run's figures go: metrics.jsonl always, and from there to MLflow.

The run's folder is the truth. A process beside rank 0, the follower (sync.py), copies it to MLflow, so that a slow or dead
server costs the training nothing: no request, no import, no thread. Rank 0 tells the follower one thing, how the run ended;
the rest it sees in the folder. What it cannot bring in while the job runs, `lmdist-sync RUN` brings in later. Only rank 0
has a tracker that writes; the others have a `Tracker`, which takes everything and keeps nothing. This module does not know
how MLflow is spoken to, only what must be noted for it.

    mlflow ui --backend-store-uri sqlite:///mlflow.db      # the page, for the default store
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lmdist.errors import EXIT_AGAIN, DataError, Stopped
from lmdist.settings import TrackingSettings
from lmdist.storage.atomic import write_atomic
from lmdist.storage.locks import exclusive_lock
from lmdist.storage.reading import read_json

DEFAULT_STORE = "sqlite:///mlflow.db"
METRICS = "metrics.jsonl"
MLFLOW_NOTE = "mlflow.json"
"""In the run's folder: what it takes to find the run in MLflow or to make it there, and how the run ended. No address."""
JOB_LOCK = ".lock"
"""In the run's folder: held by the job that trains there."""
MLFLOW_LOCK = ".mlflow.lock"
"""In the run's folder: held by the one process that copies the folder to MLflow and writes the note."""
LOCK_PATIENCE = 6.0
"""Seconds that a new job waits for the follower of one that was killed a moment ago; it lives for 4."""
SERVER_PATIENCE = 9.0
"""Seconds that the end of a job waits for a server; a killed follower and the rest of the exit stay below 10."""
FILE_PATIENCE = 120.0
"""The same for a file, which is only slow when many jobs share it."""


class Tracker:
    """Takes figures, texts and files of a run, and keeps none of them."""

    writes = False
    """Whether anything comes of what it is given."""
    page = ""
    """How to open the run's page, where it has one."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        stopped = kind is not None and (
            issubclass(kind, KeyboardInterrupt | SystemExit) or getattr(kind, "exit_code", None) == EXIT_AGAIN
        )
        self.close("FINISHED" if kind is None else "KILLED" if stopped else "FAILED")

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Figures as they are after `step` steps."""

    def text(self, name: str, text: str) -> None:
        """A text, such as a sample, under a file name."""

    def close(self, status: str) -> None:
        """The end of the run: FINISHED, FAILED or KILLED."""


class RunTracker(Tracker):
    """Writes the run's folder, and has a follower copy it to MLflow if the settings say so."""

    writes = True

    def __init__(
        self,
        run: Path,
        settings: TrackingSettings,
        parameters: dict[str, Any],
        data_name: str,
        data: dict[str, Any],
        step: int,
        *,
        going_on: bool,
    ) -> None:
        """Track a run that is at `step`; `going_on` says whether a run that was here before is the same one."""
        self.run = run
        self.unwritten = b""
        self.warned = False
        with contextlib.ExitStack() as held:
            if (run / MLFLOW_NOTE).exists():
                with contextlib.suppress(Stopped):  # a long lmdist-sync: it reads the file as it was when it began
                    held.enter_context(exclusive_lock(run / MLFLOW_LOCK, LOCK_PATIENCE))
            if not going_on:
                (run / MLFLOW_NOTE).unlink(missing_ok=True)
            # What a killed run wrote beyond its last checkpoint is about to be written again.
            kept = [row for row in read_metrics(run / METRICS) if row["step"] <= step] if step else []
            write_atomic(run / METRICS, "".join(json.dumps(row) + "\n" for row in kept))
            before = read_note(run)
            if settings.mlflow or before:
                # What has been noted stays: MLflow refuses a parameter that changes.
                made = new_note(run, settings.experiment, parameters, datasets(data_name, data), int(time.time() * 1000))
                write_note(run, {**made, **before, "status": "RUNNING"})
        self.lines = (run / METRICS).open("ab", buffering=0)
        store = store_address()
        self.follower = Follower(run, FILE_PATIENCE if is_file(store) else SERVER_PATIENCE) if settings.mlflow else None
        if settings.mlflow:  # the address of a server may hold a password, so it is not shown
            ours = f"mlflow ui --backend-store-uri {DEFAULT_STORE}"
            self.page = ours if store == DEFAULT_STORE else "on the server that MLFLOW_TRACKING_URI names"

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Append one line."""
        row = {"step": step, "time": round(time.time(), 3), **values}
        self.unwritten += (json.dumps(row) + "\n").encode()
        self.write()

    def write(self) -> None:
        """Write what has not been written; on a full disk it is kept for the next time."""
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.lines.write(self.unwritten) :]
            self.warned = False
        except OSError as error:
            if not self.warned:
                warn(f"{self.run / METRICS} cannot be written ({error.strerror}); its lines are kept and tried again")
            self.warned = True

    def text(self, name: str, text: str) -> None:
        """Write the text into the run's folder."""
        path = self.run / name
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, text)

    def close(self, status: str) -> None:
        """Close the file, and wait for the follower within its patience."""
        self.write()
        self.lines.close()
        try:
            if self.follower and not self.follower.end(status):
                warn(f"MLflow has not got all of this run; lmdist-sync {self.run} brings in the rest")
        finally:
            # The follower has written it, unless it was stuck; then it is dead by now, and does not write at the same time.
            with contextlib.suppress(OSError):
                if read_note(self.run).get("status", status) != status:
                    change_note(self.run, status=status)


class Follower:
    """The process that copies a run's folder to MLflow while the job runs; whatever becomes of it, nothing is raised here."""

    def __init__(self, run: Path, patience: float) -> None:
        """Start it; it ends when it is told to, and within 4 seconds when this process is gone."""
        self.patience = patience
        self.child: subprocess.Popen[bytes] | None = None
        one_thread = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL", "NUMEXPR")}
        with contextlib.suppress(OSError):  # no memory, no process to be had: the end of the job says that points are missing
            self.child = subprocess.Popen(
                [sys.executable, "-m", "lmdist.tracking.sync", "--follow", str(run)],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                env={**os.environ, **one_thread},
                process_group=0,  # Ctrl-C and the signals to a process group are for the job, which tells it
            )

    def end(self, status: str) -> bool:
        """Tell it how the run ended and wait for it; gives whether MLflow has all of the run."""
        if self.child is None:
            return False
        assert self.child.stdin
        try:
            with contextlib.suppress(OSError):  # it died before
                self.child.stdin.write(f"{status}\n".encode())
            return self.child.wait(self.patience) == 0
        except subprocess.TimeoutExpired:
            return False
        finally:
            self.child.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # a process that hangs in a file system cannot be killed
                self.child.wait(1)
            self.child.stdin.close()


def warn(line: str) -> None:
    """Say something that a person should know and the training does not care about."""
    sys.stderr.write(f"warning: {line}\n")
    sys.stderr.flush()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that a kill has cut short is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def store_address() -> str:
    """Where MLflow's runs are kept; it may hold a password."""
    return os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_STORE


def is_file(store: str) -> bool:
    """Whether a store is a file on this machine, and no server."""
    return store.startswith(("sqlite:", "file:", "/", "."))


def new_note(
    run: Path, experiment: str, parameters: dict[str, Any], inputs: list[dict[str, str]], start_time: int
) -> dict[str, Any]:
    """What is noted of a run that MLflow has not got yet; `start_time` is in milliseconds since 1970."""
    return {
        "run_key": uuid.uuid4().hex,  # a tag of the run: it is found again where the answer to its making was lost
        "experiment": experiment,
        "name": run.absolute().name,
        "start_time": start_time,
        "status": "RUNNING",
        "parameters": parameters,
        "datasets": inputs,
        "files": {},  # name and sha256 of what MLflow has
    }


def datasets(name: str, data: dict[str, Any]) -> list[dict[str, str]]:
    """The splits of a data folder, as MLflow shows a run's inputs; `data` is the folder's meta.json."""
    return [
        {
            "name": name,
            "context": split,
            "digest": data["files"][f"{split}.bin"]["sha256"][:36],
            "source": json.dumps({"sources": data["sources"]}),
            "profile": json.dumps(facts),
        }
        for split, facts in data.get("splits", {}).items()
    ]


def read_note(run: Path) -> dict[str, Any]:
    """The note; empty where there is none that can be read."""
    try:
        return read_json(run / MLFLOW_NOTE)
    except (FileNotFoundError, DataError):
        return {}


def write_note(run: Path, note: dict[str, Any]) -> None:
    """Write the note, whole or not at all."""
    write_atomic(run / MLFLOW_NOTE, json.dumps(note, indent=1, ensure_ascii=False) + "\n")


def change_note(run: Path, **changes: Any) -> dict[str, Any]:
    """Change some entries of the note as it is now; gives all of it."""
    note = {**read_note(run), **changes}
    write_note(run, note)
    return note

"""Where a run's figures go: metrics.jsonl always, MLflow beside it.

MLflow has a thread of its own, fed by a queue, so that a slow or dead server costs the training nothing; a failure is one
warning, and the points are in metrics.jsonl all the same. Only rank 0 has a tracker that writes; the others have a `Tracker`,
which takes everything and keeps nothing. This is the one file in which mlflow is said.

    mlflow ui --backend-store-uri sqlite:///mlflow.db      # the page, for the default store
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from lmdist.errors import DataError
from lmdist.files import read_json, write_json, write_whole
from lmdist.settings import TrackingSettings

if TYPE_CHECKING:
    from mlflow import MlflowClient

DEFAULT_STORE = "sqlite:///mlflow.db"
MLFLOW_NOTE = "mlflow.json"
"""In the run's folder: the id of its MLflow run."""
LINES_A_BATCH = 200
"""Lines of metrics.jsonl in one request; MLflow takes 1,000 values."""


class Tracker:
    """Takes figures, texts and files of a run, and keeps none of them."""

    writes = False
    """Whether anything comes of what it is given."""
    page = ""
    """How to open the run's page, where it has one."""

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        stopped = kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit)
        self.close("FINISHED" if kind is None else "KILLED" if stopped else "FAILED")

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Figures as they are after `step` steps."""

    def text(self, name: str, text: str) -> None:
        """A text, such as a sample, under a file name."""

    def file(self, path: Path) -> None:
        """A file as it is now, such as a picture."""

    def close(self, status: str) -> None:
        """The end of the run: FINISHED, FAILED or KILLED."""


class RunTracker(Tracker):
    """Writes metrics.jsonl, and hands everything on to MLflow if the settings say so."""

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
        if not going_on:
            (run / MLFLOW_NOTE).unlink(missing_ok=True)
        self.path = run / "metrics.jsonl"
        # What a killed run wrote beyond its last checkpoint is about to be written again.
        kept = [row for row in read_metrics(self.path) if row["step"] <= step] if step else []
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.lines: IO[str] = self.path.open("a", encoding="utf-8", buffering=1)
        self.mlflow = MlflowThread(run, settings.experiment, parameters, data_name, data) if settings.mlflow else None
        self.page = self.mlflow.page if self.mlflow else ""

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Append one line."""
        row = {"step": step, "time": round(time.time(), 3), **values}
        self.lines.write(json.dumps(row) + "\n")
        if self.mlflow:
            self.mlflow.send(row)

    def text(self, name: str, text: str) -> None:
        """Write the text into the run's folder."""
        path = self.run / name
        path.parent.mkdir(exist_ok=True)
        write_whole(path, text)
        if self.mlflow:
            self.mlflow.send(lambda client, run_id: client.log_text(run_id, text, name))

    def file(self, path: Path) -> None:
        """Show the file on MLflow's page."""
        if self.mlflow:
            self.mlflow.send(lambda client, run_id: client.log_artifact(run_id, str(path)))

    def close(self, status: str) -> None:
        """Close the file, and wait for MLflow as long as it gets on."""
        self.lines.close()
        if self.mlflow:
            self.mlflow.close(status)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that a kill has cut short is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


Item = dict[str, Any] | Callable[["MlflowClient", str], Any]
"""A line of metrics, or something to do with the run."""


class MlflowThread:
    """One MLflow run, written by a thread of its own."""

    def __init__(self, run: Path, experiment: str, parameters: dict[str, Any], data_name: str, data: dict[str, Any]) -> None:
        self.run = run
        self.experiment = experiment
        self.parameters = parameters
        self.data_name = data_name
        self.data = data
        self.store = os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_STORE
        # MLflow's own retries would hold on to a dead server for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        self.queue: queue.Queue[Item | None] = queue.Queue()
        self.status = "FINISHED"
        self.warned = False
        self.thread = threading.Thread(target=self.work, name="mlflow", daemon=True)
        self.thread.start()

    @property
    def page(self) -> str:
        """How to open MLflow's page; the address of a server may hold a password, so it is not shown."""
        if self.store == DEFAULT_STORE:
            return f"mlflow ui --backend-store-uri {DEFAULT_STORE}"
        return "on the server that MLFLOW_TRACKING_URI names"

    def send(self, item: Item) -> None:
        """Queue a line of metrics, or something to do; never waits."""
        self.queue.put(item)

    def close(self, status: str) -> None:
        """End the run with `status`; waits for a file as long as it takes, for a server 10 seconds."""
        self.status = status
        self.queue.put(None)
        self.thread.join(timeout=10 if self.store.startswith("http") else 120)
        if self.thread.is_alive():
            self.warn(TimeoutError("it did not take the last points in time"))

    def warn(self, error: Exception) -> None:
        """Say once that MLflow does not work; an address may hold a password, so neither it nor the error's text is shown."""
        if not self.warned:
            self.warned = True
            sys.stderr.write(
                f"warning: MLflow does not take this run's points ({type(error).__name__}); "
                f"they are in {self.run}/metrics.jsonl\n"
            )

    def work(self) -> None:
        """The thread: start or find the run, then take what the queue holds until the end."""
        try:
            client, run_id, logged = self.begin()
            monitor = start_system_metrics(run_id, self.store)
        except Exception as error:  # whatever MLflow raises: tracking never hurts training
            self.warn(error)
            return
        ended = False
        while not ended:
            items = [self.queue.get()]
            while len(items) < LINES_A_BATCH and not self.queue.empty():
                items.append(self.queue.get())
            ended = None in items
            lines = [item for item in items if isinstance(item, dict) and item["step"] > logged]
            if lines:
                self.attempt(lambda lines=lines: client.log_batch(run_id, metrics=as_metrics(lines)))
            for item in items:
                if callable(item):
                    self.attempt(lambda item=item: item(client, run_id))
        if monitor:
            self.attempt(monitor.finish)
        self.attempt(lambda: client.set_terminated(run_id, self.status))

    def attempt(self, action: Callable[[], Any]) -> None:
        """Do it, or warn."""
        try:
            action()
        except Exception as error:  # as above
            self.warn(error)

    def begin(self) -> tuple[MlflowClient, str, int]:
        """The client, the id of the run, and the last step that MLflow has already: 0 for a new run."""
        import mlflow
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param

        for name in ("alembic", "mlflow"):
            logging.getLogger(name).setLevel(logging.WARNING)
        client = mlflow.MlflowClient(self.store)
        note = self.run / MLFLOW_NOTE
        with contextlib.suppress(FileNotFoundError, DataError, KeyError, mlflow.MlflowException):
            # A run that goes on is the same run on MLflow's page.
            run_id = read_json(note)["run_id"]
            client.update_run(run_id, status="RUNNING")
            history = client.get_metric_history(run_id, "train/loss")
            return client, run_id, max((point.step for point in history), default=0)
        run_id = client.create_run(self.experiment_id(client), run_name=self.run.name).info.run_id
        write_json(note, {"run_id": run_id})
        client.log_batch(run_id, params=[Param(key, str(value)) for key, value in self.parameters.items()])
        for split, facts in self.data["splits"].items():
            dataset = Dataset(
                name=self.data_name,
                digest=self.data["files"][f"{split}.bin"]["sha256"][:36],
                source_type="lmdist-prepare",
                source=json.dumps({"sources": self.data["sources"]}),
                profile=json.dumps(facts),
            )
            client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", split)])])
        client.log_artifact(run_id, str(self.run / "recipe.toml"))
        return client, run_id, 0

    def experiment_id(self, client: MlflowClient) -> str:
        """The experiment's id; made where it is not there."""
        found = client.get_experiment_by_name(self.experiment)
        if found:
            return found.experiment_id
        # With this tag the page opens on runs and their curves, not on traces of chat models.
        return client.create_experiment(self.experiment, tags={"mlflow.experimentKind": "custom_model_development"})


def as_metrics(lines: list[dict[str, Any]]) -> list[Any]:
    """Lines of metrics.jsonl as MLflow's points."""
    from mlflow.entities import Metric

    return [
        Metric(key, float(value), int(line["time"] * 1000), line["step"])
        for line in lines
        for key, value in line.items()
        if key not in ("step", "time")
    ]


def start_system_metrics(run_id: str, store: str) -> Any:
    """MLflow's own watch over CPU, memory, disk, network and GPUs."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=store)
    monitor.start()
    return monitor

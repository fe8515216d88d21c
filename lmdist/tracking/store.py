"""MLflow's tracking store: its creation, and the requests that need MLflow's own classes.

An address may hold a password, so `silence` discards what MLflow and the libraries below it print. This module does not know
what a run's folder holds. It imports mlflow only when a store is opened: that takes two seconds.
"""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from lmdist.storage.atomic import is_running
from lmdist.tracking.address import configuration, sqlite_file, store_address
from lmdist.tracking.failures import FinalError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

KEY_TAG = "lmdist.run_key"
CONTEXT_TAG = "mlflow.data.context"
POINTS_PER_REQUEST = 1000
"""MLflow's limit."""
DOWNLOAD_TIMEOUT_SECONDS = 120
"""A server may fetch a large file from its artifact store before it answers."""
ONE_DOWNLOAD = Lock()
"""Held while the environment, which all threads share, is that of a download."""
SQLITE_MAGIC = b"SQLite format 3\0"
"""How each database of SQLite begins, unless it is empty."""


class Point(NamedTuple):
    """One value of a metric."""

    key: str
    value: float
    time: int
    """Milliseconds since 1970."""
    step: int


class Store:
    """A connection to MLflow. Each method may raise any exception of MLflow or of a library below it."""

    def __init__(self, address: str) -> None:
        """Connect to `address`; create a store in SQLite where it is missing."""
        if path := sqlite_file(address):
            prepare_sqlite(path)
        from mlflow import MlflowClient

        self.address = address
        self.client: MlflowClient = MlflowClient(address)

    def experiment_id(self, name: str) -> str:
        """Return the id of an experiment; create it where it is missing. Raise FinalError where it was deleted."""
        found = self.client.get_experiment_by_name(name)
        if found and found.lifecycle_stage == "deleted":
            raise FinalError(
                f"the experiment {name} was deleted there: mlflow experiments restore --experiment-id {found.experiment_id} "
                "brings it back; MLFLOW_EXPERIMENT_NAME=OTHER names another one, for a run that MLflow has with --new-run"
            )
        if found:
            return found.experiment_id
        # With this tag the page opens on runs and their curves, not on traces of chat models.
        return self.client.create_experiment(name, tags={"mlflow.experimentKind": "custom_model_development"})

    def get_run(self, run_id: str) -> Run | None:
        """Return the run with this id; None where the store has none."""
        from mlflow import MlflowException

        try:
            return self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    def find_run(self, experiment: str, run_key: str) -> Run | None:
        """Return the run that was created with this key."""
        condition = f"tags.`{KEY_TAG}` = '{run_key}'"
        return next(iter(self.client.search_runs([self.experiment_id(experiment)], condition, order_by=["start_time"])), None)

    def create_run(self, experiment: str, run_key: str, name: str, start_time: int, tags: dict[str, str]) -> Run:
        """Create a run."""
        return self.client.create_run(self.experiment_id(experiment), start_time, {**tags, KEY_TAG: run_key}, name)

    def log_parameters(self, run_id: str, parameters: dict[str, Any]) -> None:
        """Log parameters; MLflow rejects one that the run has with another value."""
        from mlflow.entities import Param

        self.client.log_batch(run_id, params=[Param(key, str(value)) for key, value in parameters.items()], synchronous=True)

    def log_dataset(self, run_id: str, dataset: dict[str, str]) -> None:
        """Log an entry of `metadata.dataset_inputs` as an input of the run."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        entity = Dataset(dataset["name"], dataset["digest"], "lmdist-prepare", dataset["source"], profile=dataset["profile"])
        self.client.log_inputs(run_id, [DatasetInput(entity, [InputTag(CONTEXT_TAG, dataset["context"])])])

    def log_points(self, run_id: str, points: list[Point]) -> None:
        """Log at most POINTS_PER_REQUEST points in one request."""
        from mlflow.entities import Metric

        self.client.log_batch(run_id, metrics=[Metric(*point) for point in points], synchronous=True)

    def logged_points(self, run_id: str, key: str) -> list[Point]:
        """Return the points that the run has of this metric."""
        return [Point(key, point.value, point.timestamp, point.step) for point in self.client.get_metric_history(run_id, key)]

    def system_monitor(self, run_id: str, machine: str | None) -> SystemMetricsMonitor:
        """Return MLflow's own logger of CPU, memory, disk, network and GPUs, which ends when the server is away.

        Of a job on several machines, the metrics have the name of the `machine`.
        """
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        return SystemMetricsMonitor(run_id, resume_logging=True, node_id=machine, tracking_uri=self.address)


def logged_contexts(run: Run) -> set[str]:
    """Return the contexts (train, valid ...) of the datasets that a run has."""
    inputs = run.inputs.dataset_inputs if run.inputs else []
    return {tag.value for dataset in inputs for tag in dataset.tags if tag.key == CONTEXT_TAG}


def prepare_sqlite(path: Path) -> None:
    """Create the file of a store in SQLite atomically where it is missing. Raise FinalError at once where it cannot be used.

    MLflow tries for two minutes to open a file that cannot be opened. It takes a second or more to create one; if it is killed
    meanwhile, or the disk is full, or two processes do it at once, the file may be unusable for ever.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for place in (path.parent, path):  # SQLite writes a journal beside the file
        if place.exists() and not os.access(place, os.W_OK):
            raise FinalError(f"{place.absolute()} cannot be written to: set MLFLOW_TRACKING_URI, or go to another folder")
    if not path.exists():
        create_sqlite(path)
    with path.open("rb") as file:
        if file.read(len(SQLITE_MAGIC)) not in (SQLITE_MAGIC, b""):
            raise FinalError(f"{path.absolute()} is not a database of SQLite")


def create_sqlite(path: Path) -> None:
    """Create the file of a store under another name, then link it to its own."""
    from mlflow import MlflowClient

    prefix = f"{path.name}.writing-{socket.gethostname()}-"
    for left in [left for left in path.parent.iterdir() if left.name.startswith(prefix)]:
        pid = left.name.removeprefix(prefix).partition("-")[0]  # SQLite's journal has the same name and "-journal"
        if pid.isdigit() and not is_running(int(pid)):
            left.unlink(missing_ok=True)
    temporary = path.with_name(f"{prefix}{os.getpid()}")
    try:
        MlflowClient(f"sqlite:///{temporary}").search_experiments(max_results=1)
        try:
            os.link(temporary, path)
        except FileExistsError:  # another job was faster; a rename would replace what it has written since
            pass
        except OSError:  # a file system without links
            temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
        temporary.with_name(f"{temporary.name}-journal").unlink(missing_ok=True)


@contextmanager
def silence() -> Iterator[None]:
    """Discard all output of MLflow and the libraries below it, inside; afterwards a program logs as before."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(nowhere()), redirect_stderr(nowhere()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@cache
def nowhere() -> TextIO:
    """Return a file that discards what is written, open for as long as the process: loggers keep it."""
    return open(os.devnull, "w", encoding="utf-8")


def download_artifacts(uri: str, folder: Path) -> Path:
    """Download what `models:/NAME@ALIAS` or `runs:/ID/PATH` names into a folder; return where it lies there.

    The store is MLflow's own, else `store_address()`. Threads download one after the other. Raise any exception of MLflow or
    of a library below it.
    """
    variables = {"MLFLOW_TRACKING_URI": store_address(), "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}
    with ONE_DOWNLOAD, environment(configuration(DOWNLOAD_TIMEOUT_SECONDS) | variables), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow warns of annotations of its own
        from mlflow import artifacts

        return Path(artifacts.download_artifacts(uri, dst_path=str(folder)))


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set those of the variables that are not set, inside only: a program may use MLflow for other things."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)

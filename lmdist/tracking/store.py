"""MLflow's tracking store: its address, its creation, and the requests that need MLflow's own classes.

An address may hold a password, and the texts of exceptions hold addresses. So `error_name` returns only the type of an error,
and `silence` discards what MLflow and the libraries below it print. This module does not know what a run's folder holds. It
imports mlflow only when a store is opened: that takes two seconds.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

DEFAULT_STORE = "sqlite:///mlflow.db"
DEFAULT_FILE = Path("mlflow.db")
KEY_TAG = "lmdist.run_key"
CONTEXT_TAG = "mlflow.data.context"
POINTS_PER_REQUEST = 1000
"""MLflow's limit."""


class UploadError(Exception):
    """MLflow did not accept a request. The message contains no secret."""


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
        """Connect to `address`; create the default store where it is missing."""
        from mlflow import MlflowClient

        if address == DEFAULT_STORE:
            create_default_store()
        self.address = address
        self.client: MlflowClient = MlflowClient(address)

    def experiment_id(self, name: str) -> str:
        """Return the id of an experiment; create it where it is missing."""
        found = self.client.get_experiment_by_name(name)
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

    def create_run(self, experiment: str, run_key: str, name: str, start_time: int) -> Run:
        """Create a run."""
        return self.client.create_run(self.experiment_id(experiment), start_time, {KEY_TAG: run_key}, name)

    def log_parameters(self, run_id: str, parameters: dict[str, Any]) -> None:
        """Log parameters; MLflow rejects one that the run has with another value."""
        from mlflow.entities import Param

        self.client.log_batch(run_id, params=[Param(key, str(value)) for key, value in parameters.items()], synchronous=True)

    def log_dataset(self, run_id: str, dataset: dict[str, str]) -> None:
        """Log an entry of `run_folder.dataset_inputs` as an input of the run."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        entity = Dataset(dataset["name"], dataset["digest"], "lmdist-prepare", dataset["source"], profile=dataset["profile"])
        self.client.log_inputs(run_id, [DatasetInput(entity, [InputTag(CONTEXT_TAG, dataset["context"])])])

    def log_points(self, run_id: str, points: list[Point]) -> None:
        """Log at most POINTS_PER_REQUEST points in one request."""
        from mlflow.entities import Metric

        self.client.log_batch(run_id, metrics=[Metric(*point) for point in points], synchronous=True)

    def logged_steps(self, run_id: str, key: str) -> set[int]:
        """Return the steps at which the run has a point of this metric."""
        return {point.step for point in self.client.get_metric_history(run_id, key)}

    def monitor_system(self, run_id: str) -> SystemMetricsMonitor:
        """Start MLflow's own logging of CPU, memory, disk, network and GPUs: a thread that stops when the server is away."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=self.address)
        monitor.start()
        return monitor


def logged_contexts(run: Run) -> set[str]:
    """Return the contexts (train, valid ...) of the datasets that a run has."""
    inputs = run.inputs.dataset_inputs if run.inputs else []
    return {tag.value for dataset in inputs for tag in dataset.tags if tag.key == CONTEXT_TAG}


def create_default_store() -> None:
    """Create mlflow.db atomically.

    MLflow takes a second or more to create it. If it is killed meanwhile, or two processes do it at once, the file may be
    unusable for ever.
    """
    from mlflow import MlflowClient

    if DEFAULT_FILE.exists():
        return
    temporary = Path(f"{DEFAULT_FILE}.writing-{os.getpid()}")
    try:
        MlflowClient(f"sqlite:///{temporary}").search_experiments(max_results=1)
        try:
            os.link(temporary, DEFAULT_FILE)
        except FileExistsError:  # another job was faster; a rename would replace what it has written since
            pass
        except OSError:  # a file system without links
            temporary.rename(DEFAULT_FILE)
    finally:
        temporary.unlink(missing_ok=True)


def configure(request_timeout_seconds: int = 10) -> None:
    """Set MLflow's environment variables where the user has not set them."""
    variables = {
        # MLflow's own retries wait minutes for a dead server, and create runs twice.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(request_timeout_seconds),
        # To print the address of a run, which `silence` discards, MLflow would send a request.
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    for name, value in variables.items():
        os.environ.setdefault(name, value)


@contextmanager
def silence() -> Iterator[None]:
    """Discard all output of MLflow and the libraries below it, now and when the process ends."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    devnull = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - loggers keep it
    with redirect_stdout(devnull), redirect_stderr(devnull):
        yield


def store_address() -> str:
    """Return the address of MLflow's store, which may hold a password."""
    return os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_STORE


def packages_of(address: str) -> list[str]:
    """Return the packages that a store needs: mlflow-skinny has no databases."""
    database = re.match(r"(sqlite|mysql|postgresql|mssql)\b", address)
    return [*(["sqlalchemy", "alembic"] if database else []), "mlflow"]


def is_file(address: str) -> bool:
    """Return whether a store is a file on this machine rather than a server."""
    return address.startswith(("sqlite:", "file:", "/", "."))


def without_password(address: str) -> str:
    """Return the address of a store without user name, password and query."""
    return re.sub(r"[?#].*", "", re.sub(r"//.*@", "//", address))


def page_hint() -> str:
    """Return how to open MLflow's page."""
    if store_address() == DEFAULT_STORE:
        return f"mlflow ui --backend-store-uri {DEFAULT_STORE}"
    return "on the server that MLFLOW_TRACKING_URI names"


def error_name(error: BaseException) -> str:
    """Return the type of an error without its text, which may hold an address with a password."""
    if isinstance(error, UploadError):
        return str(error)
    cause = error.__cause__ or error.__context__
    if type(error).__name__ == "MlflowException" and cause:
        error = cause
    code = getattr(error, "error_code", "")
    return f"{type(error).__name__} {code}" if re.fullmatch("[A-Z_]+", str(code)) else type(error).__name__

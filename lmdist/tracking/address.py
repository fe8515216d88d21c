"""Where MLflow is: the address of its store, the variables that it reads, and the pages that show a run.

An address may hold a password: `without_password` is what is printed. This module does not import mlflow.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from lmdist.settings import TrackingSettings

DEFAULT_STORE = "sqlite:///mlflow.db"
DEFAULT_FILE = Path("mlflow.db")
LOCAL_PAGE = "http://127.0.0.1:5000"
"""Where `mlflow ui` answers."""
MODELS_NOT_CHATS = "workflowType=machine_learning"
"""With this, MLflow's page opens on runs and their curves; without it, on traces of chat models, of which there are none."""


def configuration(request_timeout_seconds: int = 10) -> dict[str, str]:
    """Return the values of MLflow's environment variables that a command sets where the user has not set them."""
    return {
        # MLflow's own retries wait minutes for a dead server, and create runs twice.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(request_timeout_seconds),
        # To print the address of a run, which `silence` discards, MLflow would send a request.
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }


def configure(request_timeout_seconds: int = 10) -> None:
    """Set MLflow's environment variables where the user has not set them, in a process that is a command of ours.

    In a program, which may use MLflow for other things, tracking/store.py sets them for the time of a download.
    """
    for name, value in configuration(request_timeout_seconds).items():
        os.environ.setdefault(name, value)


def store_address() -> str:
    """Return the address of MLflow's store, which may hold a password."""
    return os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_STORE


def experiment_name(setting: str = TrackingSettings.experiment) -> str:
    """Return the experiment of a run: the one of its recipe, else of MLFLOW_EXPERIMENT_NAME, else the default."""
    return setting if setting != TrackingSettings.experiment else os.environ.get("MLFLOW_EXPERIMENT_NAME") or setting


def packages_of(address: str) -> list[str]:
    """Return the packages that a store needs: mlflow-skinny has no databases."""
    database = re.match(r"(sqlite|mysql|postgresql|mssql)\b", address)
    return [*(["sqlalchemy", "alembic"] if database else []), "mlflow"]


def is_file(address: str) -> bool:
    """Return whether a store is a file on this machine rather than a server."""
    return address.startswith(("sqlite:", "file:", "/", "."))


def sqlite_file(address: str) -> Path | None:
    """Return the file of a store in SQLite; None for any other store."""
    found = re.fullmatch(r"sqlite:///([^?]+)(?:\?.*)?", address)
    return Path(found[1]) if found else None


def without_password(address: str) -> str:
    """Return the address of a store without user name, password and query."""
    return re.sub(r"[?#].*", "", re.sub(r"//.*@", "//", address))


def run_path(experiment_id: str, run_id: str = "") -> str:
    """Return the path of a run's page, or of the page of an experiment's runs."""
    return f"/#/experiments/{experiment_id}/runs{f'/{run_id}' if run_id else ''}?{MODELS_NOT_CHATS}"


def pages(experiment_id: str, run_id: str) -> list[str]:
    """Return lines with the addresses of a run's page and of the page that compares the experiment's runs."""
    address = store_address()
    server = without_password(address).rstrip("/")
    by_http = address.startswith(("http://", "https://"))
    if not by_http:
        server = LOCAL_PAGE
    store = address if address == without_password(address) else '"$MLFLOW_TRACKING_URI"'
    return [
        f"MLflow: {server}{run_path(experiment_id, run_id)}",
        f"  all runs  {server}{run_path(experiment_id)}",
        *([] if by_http else [f"  server    mlflow ui --backend-store-uri {store}"]),
    ]

"""A bundle goes into MLflow: a LoggedModel with its files, a version of a registered model, and an alias that names it.

    lmdist-export runs/demo -o bundles/demo --register demo          # or later: lmdist-export bundles/demo --register demo

The store is the one that training logs to (tracking.py). The bundle has its run's id in `MLmodel`; where the store has that
run, the LoggedModel is one of its models. As in sync.py no address with a password is shown, nor the text of an error.
"""

from __future__ import annotations

import os
import re
import shlex
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdist.errors import DataError, Stopped, UsageError
from lmdist.settings import TrackingSettings
from lmdist.tracking.run_folder import DEFAULT_STORE, store_address
from lmdist.tracking.sync import MLFLOW_SETTINGS, experiment_id, make_default_store, name_of, silence, without_password
from lmdist_export.bundle import Bundle

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHAMPION = "champion"
SETTINGS = MLFLOW_SETTINGS | {"MLFLOW_HTTP_REQUEST_TIMEOUT": "120"}
"""A server may pass a whole file on before it answers."""


def check_names(name: str, alias: str) -> None:
    """Raise UsageError for names that MLflow does not take, or that `models:/NAME@ALIAS` cannot say."""
    if not name.strip() or not name.isprintable() or set("/:@") & set(name) or name in (".", "..") or len(name) > 255:
        raise UsageError(f"--register {name!r} is no name for a model: at least one letter is expected, and no / : @")
    if not re.fullmatch(r"[\w-]{1,255}", alias) or re.fullmatch(r"latest|v\d+", alias, re.IGNORECASE):
        raise UsageError(f"--alias {alias!r} is no alias: letters, digits, _ and - are expected, and not latest or v1")


def register(folder: Path, name: str, alias: str) -> str:
    """Register a bundle; gives lines that say how it is known and served. Raises Stopped where MLflow does not take it."""
    bundle = Bundle.load(folder)
    if not (folder / "MLmodel").is_file():
        raise DataError(f"{folder} has no MLmodel, which lmdist-export writes: export it again")
    for key, value in SETTINGS.items():
        os.environ.setdefault(key, value)
    store = store_address()
    try:
        with silence():
            version, run = record(bundle, store, name, alias)
    except Exception as error:  # whatever MLflow and the libraries below it raise
        again = shlex.join(["lmdist-export", str(folder), "--register", name, *(["--alias", alias] * (alias != CHAMPION))])
        raise Stopped(
            f"MLflow ({without_password(store)}) does not take the bundle ({name_of(error)}); "
            f"it is in {folder}, and this registers it later: {again}"
        ) from None
    lines = {
        "registered": f"{name}, version {version}, alias {alias}  ({without_password(store)})",
        "of run": run,
        "serve": shlex.join(["mlflow", "models", "serve", "-m", f"models:/{name}@{alias}", "--env-manager", "local"]),
    }
    return "".join(f"{key:<13}{value}\n" for key, value in lines.items())


def record(bundle: Bundle, store: str, name: str, alias: str) -> tuple[str, str]:
    """Bring a bundle into MLflow; gives its version and the run it belongs to. May raise anything."""
    from mlflow import MlflowClient, MlflowException
    from mlflow.entities import Metric
    from mlflow.models import Model

    if store == DEFAULT_STORE:
        make_default_store()
    client = MlflowClient(store)
    trained = Model.load(str(bundle.folder)).run_id
    run_id, experiment = (trained and run_of(client, trained)) or new_run(client, bundle.manifest["run"])
    title = re.sub(r"[/:.%\"']", "_", name)  # MLflow takes fewer of these here than in the name of a registered model
    model = client.create_logged_model(experiment, title, run_id, params=parameters(bundle), model_type="lmdist bundle")
    try:
        client.log_model_artifacts(model.model_id, str(bundle.folder))
        now = int(time.time() * 1000)
        step = bundle.manifest["step"]
        points = [Metric(key, value, now, step, model_id=model.model_id) for key, value in metrics(bundle).items()]
        client.log_batch(run_id, metrics=points, synchronous=True)
        client.finalize_logged_model(model.model_id, "READY")
    except BaseException:
        with suppress(Exception):
            client.finalize_logged_model(model.model_id, "FAILED")
        raise
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    version = client.create_model_version(name, f"models:/{model.model_id}", run_id, model_id=model.model_id).version
    client.set_registered_model_alias(name, alias, version)
    return str(version), run_id if run_id == trained else f"{run_id}  (a new one: the training's is not in this store)"


def run_of(client: MlflowClient, run_id: str) -> tuple[str, str] | None:
    """The run of this id and its experiment's id; None where this store has none."""
    from mlflow import MlflowException

    try:
        found = client.get_run(run_id).info
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return None if found.lifecycle_stage == "deleted" else (run_id, found.experiment_id)


def new_run(client: MlflowClient, name: str) -> tuple[str, str]:
    """A run for the figures of a bundle whose training is not known here, and its experiment's id."""
    experiment = experiment_id(client, TrackingSettings.experiment)
    run_id = client.create_run(experiment, run_name=name).info.run_id
    client.set_terminated(run_id)
    return run_id, experiment


def parameters(bundle: Bundle) -> dict[str, str]:
    """What a bundle is, for people who choose among several."""
    sizes, manifest = bundle.sizes, bundle.manifest
    facts: dict[str, Any] = {
        "run": manifest["run"],
        "step": manifest["step"],
        "precision": sizes.precision,
        "parameters": manifest["parameters"],
        "layer_sizes": "-".join(map(str, sizes.layer_sizes)),
        "embedding_size": sizes.embedding_size,
        "vocabulary_size": sizes.vocabulary_size,
        "tied": sizes.tied,
        "lmdist": manifest["versions"]["lmdist"],
    }
    return {key: str(value) for key, value in facts.items()}


def metrics(bundle: Bundle) -> dict[str, float]:
    """What a bundle costs, in bytes and on held-out text."""
    held_out = bundle.manifest["held_out"] or {}
    split = held_out.get("split")
    found = {
        "bundle/megabytes": sum(file["bytes"] for file in bundle.manifest["files"].values()) / 1e6,
        f"bundle/{split}_perplexity": held_out.get("onnxruntime"),
        f"bundle/{split}_loss_percent": held_out.get("loss_percent"),
        f"bundle/{split}_top_1_agreement": held_out.get("top_1_agreement"),
    }
    return {key: float(value) for key, value in found.items() if value is not None}

"""Register a bundle in MLflow: a LoggedModel with its files, a version of a registered model, and an alias for the version.

    lmdist-export runs/demo -o bundles/demo --register demo          # or later: lmdist-export bundles/demo --register demo

The store is the one that training uploads to (lmdist/tracking/store.py). The bundle's manifest has its run's id; where the
store has that run, the LoggedModel belongs to it. Only files that the manifest names are uploaded, and what MLflow runs is
written anew by the installed lmdist: a bundle may have come from a stranger. Messages contain no password. This module does
not know how a bundle is built.
"""

from __future__ import annotations

import re
import shlex
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lmdist.console import table
from lmdist.errors import DataError, MissingInputError, Stopped, UsageError
from lmdist.perplexity import COMPARED
from lmdist.tracking.address import configure, experiment_name, store_address, without_password
from lmdist.tracking.failures import FinalError, upload_error
from lmdist.tracking.store import Store, silence
from lmdist_export.bundle import GENERATION_CONFIG, MANIFEST, Bundle

CHAMPION = "champion"
REQUEST_TIMEOUT_SECONDS = 120
"""A server may forward a large file to its artifact store before it answers."""


def check_names(name: str, alias: str) -> None:
    """Raise UsageError for names that MLflow rejects, or that `models:/NAME@ALIAS` cannot express."""
    if not name.strip() or not name.isprintable() or set("/:@") & set(name) or name in (".", "..") or len(name) > 255:
        raise UsageError(f"--register {name!r} is no name for a model: at least one letter is expected, and no / : @")
    if not re.fullmatch(r"[\w-]{1,255}", alias) or re.fullmatch(r"latest|v\d+", alias, re.IGNORECASE):
        raise UsageError(f"--alias {alias!r} is no alias: letters, digits, _ and - are expected, and not latest or v1")


def register(folder: Path, name: str, alias: str) -> str:
    """Register a bundle; return lines with its name and how to serve it.

    Raise Stopped where MLflow does not accept it now, DataError where it never will.
    """
    bundle = Bundle.hold(folder)  # the bytes that were checked are those that are uploaded
    configure(REQUEST_TIMEOUT_SECONDS)
    address = without_password(store_address())
    try:
        with silence():
            version, run = upload(bundle, Store(store_address()), name, alias)
    except (DataError, MissingInputError):  # of the bundle
        raise
    except Exception as error:  # any exception of MLflow and the libraries below it
        again = shlex.join(["lmdist-export", str(folder), "--register", name, *(["--alias", alias] * (alias != CHAMPION))])
        failure = upload_error(error)
        raise (DataError if isinstance(failure, FinalError) else Stopped)(
            f"MLflow ({address}) does not accept the bundle ({failure}); "
            f"it is in {folder}, and this registers it later: {again}"
        ) from None
    rows = {
        "registered": f"{name}, version {version}, alias {alias}  ({address})",
        "of run": run,
        "serve": shlex.join(["mlflow", "models", "serve", "-m", f"models:/{name}@{alias}", "--env-manager", "local"]),
    }
    return table(rows, width=13)


def upload(bundle: Bundle, store: Store, name: str, alias: str) -> tuple[str, str]:
    """Upload a bundle; return its version and a description of its run. Raise any exception of MLflow."""
    from mlflow import MlflowException
    from mlflow.entities import Metric

    client = store.client
    trained = bundle.manifest.get("run_id")
    run_id, experiment = (trained and find_run(store, trained)) or create_run(store, bundle.manifest["run"])
    title = re.sub(r"[/:.%\"']", "_", name)  # MLflow allows these in the name of a registered model only
    model = client.create_logged_model(experiment, title, run_id, params=parameters(bundle), model_type="lmdist bundle")
    try:
        with staged(bundle) as folder:
            client.log_model_artifacts(model.model_id, str(folder))
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
    source = f"models:/{model.model_id}"
    version = client.create_model_version(
        name, source, run_id, description=description(bundle), model_id=model.model_id
    ).version
    client.set_registered_model_alias(name, alias, version)
    return str(version), run_id if run_id == trained else f"{run_id}  (a new one: the training's is not in this store)"


@contextmanager
def staged(bundle: Bundle) -> Iterator[Path]:
    """Yield a folder of what is uploaded: links to the files that were checked, and MLflow's own files, written anew.

    Raise DataError where one of them was written to meanwhile.
    """
    from lmdist_export.serving.mlflow_model import OWN_FILES, write_model

    if foreign := set(OWN_FILES) & set(bundle.manifest["files"]):
        raise DataError(f"{bundle.folder}: the manifest names {min(foreign)}, which no bundle has a checksum of")
    with tempfile.TemporaryDirectory(prefix="lmdist-") as name:
        folder = Path(name)
        uploaded = {*bundle.manifest["files"], MANIFEST, GENERATION_CONFIG}
        for file in uploaded:
            bundle.files.descriptor(file)  # raises an error for a link and for what is no file
            (folder / file).symlink_to(bundle.files.path_of(file).absolute())
        write_model(folder, bundle.manifest.get("run_id"), has_pieces=bundle.tokenizer.settings.has_pieces)
        yield folder
        for file in uploaded:
            bundle.files.check_unchanged(file)


def description(bundle: Bundle) -> str:
    """Return a sentence about a bundle, for people who choose among versions."""
    sizes, manifest = bundle.sizes, bundle.manifest
    layers = "-".join(map(str, [sizes.embedding_size, *sizes.layer_sizes]))
    return (
        f"LSTM {layers}, {manifest['parameters']:,} parameters, {sizes.precision}, vocabulary {sizes.vocabulary_size:,}: "
        f"run {manifest['run']}, step {manifest['step']:,}, lmdist {manifest['versions']['lmdist']}"
    )


def find_run(store: Store, run_id: str) -> tuple[str, str] | None:
    """Return the ids of a run and of its experiment; None where the store does not have the run."""
    run = store.get_run(run_id)
    return None if run is None or run.info.lifecycle_stage == "deleted" else (run_id, run.info.experiment_id)


def create_run(store: Store, name: str) -> tuple[str, str]:
    """Create a run for the metrics of a bundle whose training the store does not have; return the ids as `find_run` does."""
    experiment = store.experiment_id(experiment_name())
    run_id = store.client.create_run(experiment, run_name=name).info.run_id
    store.client.set_terminated(run_id)
    return run_id, experiment


def parameters(bundle: Bundle) -> dict[str, str]:
    """Return the parameters that tell bundles apart."""
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
    """Return the size of a bundle, and how it compares with torch on the beginning of a split.

    Perplexities of training are of the whole split: these have other names, and torch's beside onnxruntime's.
    """
    held_out = bundle.manifest["held_out"] or {}
    found = {
        "bundle/megabytes": sum(file["bytes"] for file in bundle.manifest["files"].values()) / 1e6,
        "bundle/compared_tokens": held_out.get("tokens"),
        "bundle/compared_perplexity": held_out.get("onnxruntime"),
        **{f"bundle/compared_{name}": held_out.get(name) for name in COMPARED},
        "bundle/compared_perplexity_by_torch": held_out.get("torch"),
        "bundle/compared_loss_percent": held_out.get("loss_percent"),
        "bundle/compared_top_1_agreement": held_out.get("top_1_agreement"),
    }
    return {key: float(value) for key, value in found.items() if value is not None}

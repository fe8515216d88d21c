"""A bundle as the base of a training: the model that a run starts from (lmdist/training/starting_point.py).

lmdist hands on to it by the name `lmdist.base_of_bundle`: a bundle is read by the package that writes it.
"""

from __future__ import annotations

from pathlib import Path

from lmdist.storage.reading import read_json
from lmdist.storage.schema import check_schema
from lmdist.tracking.metadata import run_id_of
from lmdist.training.checkpoints.format import FORMAT as CHECKPOINT_FORMAT
from lmdist.training.starting_point import Base
from lmdist_export.bundle import MANIFEST, WEIGHTS
from lmdist_export.conversion.unpacking import load_model
from lmdist_export.registered import is_registered, load_bundle


def base_of_bundle(name: str) -> Base | None:
    """Return a bundle, by its folder or its address in MLflow, as a base; None where `name` may be a run or a checkpoint.

    Quantized weights are what they stand for. Raises as `load_bundle`.
    """
    manifest = Path(name) / MANIFEST
    is_folder = manifest.is_file() and read_json(manifest).get("format") != CHECKPOINT_FORMAT
    if not (is_registered(name) or is_folder):
        return None
    bundle = load_bundle(name)
    check_schema(bundle.manifest, {"run": str, "step": int, "run_id": str | None}, Path(bundle.name) / MANIFEST)
    origin = {
        "run": bundle.manifest["run"],
        "step": bundle.manifest["step"],
        "sha256": bundle.manifest["files"][WEIGHTS]["sha256"],
        "run_id": run_id_of(bundle.manifest),
    }
    return Base(name, load_model(bundle), bundle.vocabulary, bundle.tokenizer, origin)

"""What all ranks must have in common to train one model: recipe, data, code and torch. What differs is named at the start."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

import lmdist
from lmdist import config
from lmdist.errors import UsageError
from lmdist.settings import Recipe
from lmdist.training.data import DataFolder
from lmdist.training.distributed import World

NOT_COMPARED = (
    "run_folder",
    "resume",
    "init_from",
    "init.embeddings",
    "data.folder",
    "prepare.",
    "sample.",
    "checkpoint.keep",
    "tracking.",
    "training.timeout_seconds",
)
"""Settings that may differ between ranks: what rank 0 alone acts on, what a machine has for itself, and the data, compared by
its content. What a resumed run may change is run.py's matter.

A launcher that restarts adds `--resume auto`, and another that starts late has not: rank 0's decides.
"""


def check_agreement(recipe: Recipe, folder: DataFolder, world: World) -> None:
    """Raise UsageError on every rank if some rank would train with something else than rank 0; a collective call."""
    if world.size == 1:
        return
    own = facts(recipe, folder)
    first = json.loads(world.broadcast(json.dumps(own)))
    names = [name for name in {**first, **own} if first.get(name) != own.get(name)]
    differences = ", ".join(
        f"{name} {first.get(name)} on rank 0 and {own.get(name)} on rank {world.rank}" for name in names[:5]
    )
    found = next(filter(None, world.gather_texts(differences)), "")
    if found:
        raise UsageError(f"the ranks would not train one model: {found}; start all of them with the same")


def facts(recipe: Recipe, folder: DataFolder) -> dict[str, str]:
    """Return what decides the figures of a training, by name: settings, and digests of data and code."""
    settings = {name: repr(value) for name, value in config.named_settings(recipe).items() if not name.startswith(NOT_COMPARED)}
    sources = hashlib.sha256()
    package = Path(lmdist.__file__).parent
    for path in sorted(package.rglob("*.py")):
        sources.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return {
        **settings,
        "data": hashlib.sha256(json.dumps(folder.meta["files"], sort_keys=True).encode()).hexdigest()[:12],
        "torch": torch.__version__,
        "lmdist": sources.hexdigest()[:12],
    }

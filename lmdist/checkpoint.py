"""Checkpoints: a run's state as tensors and JSON, whole or absent.

    runs/NAME/checkpoints/step-000001000/
        model.safetensors       the parameters
        training.safetensors    the optimizer's tensors and the state h, c of all the streams, (G, S)
        vocab.txt  text.json    how words become ids: copied from the data folder
        manifest.json           the model's shape, progress, recipe, facts of the data, and a sha256 for each file

A checkpoint is enough by itself to evaluate and to export. Nothing in it is pickled, so nothing in it can run. This
module does not know when to save, nor on how many ranks the job runs.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lmdist import __version__
from lmdist.errors import DataError, MissingInputError
from lmdist.files import check_sums, read_json, sums, whole_folder, write_json
from lmdist.model import LanguageModel, State
from lmdist.settings import ModelSettings
from lmdist.vocabulary import Vocabulary

FORMAT = "lmdist checkpoint"
VERSION = 1


@dataclasses.dataclass
class Progress:
    """Where a run stands. With the tensors, this is all that a resumed run needs."""

    step: int = 0
    """Steps done, and so the number of the next global batch."""
    tokens: int = 0
    """Words learnt from, over all ranks."""
    seconds: float = 0.0
    """Time spent in training steps."""
    valid_nats: float | None = None
    """Nats a word of the newest validation."""
    best_valid_nats: float | None = None
    """Nats a word of the best validation."""
    divisions: int = 0
    """How often the plateau schedule has divided the learning rate."""
    loss_scale: dict[str, float | int] = dataclasses.field(default_factory=dict)
    """State of the fp16 loss scaler."""


def save(
    checkpoints: Path,
    progress: Progress,
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    streams: State | None,
    recipe: dict[str, Any],
    data: Path,
) -> Path:
    """Write `checkpoints/step-N`, whole or not at all; `streams` is the state of all G streams, each (G, S)."""
    training = {
        f"optimizer.{index}.{name}": value
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }
    if streams is not None:
        training["streams.h"], training["streams.c"] = streams
    target = checkpoints / f"step-{progress.step:09d}"
    with whole_folder(target) as folder:
        save_file(parameters(model), folder / "model.safetensors")
        save_file({name: value.contiguous().cpu() for name, value in training.items()}, folder / "training.safetensors")
        for name in ("vocab.txt", "text.json"):
            shutil.copyfile(data / name, folder / name)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "lmdist": __version__,
            "torch": torch.__version__,
            "model": dataclasses.asdict(model.settings),
            "vocabulary_size": model.vocabulary_size,
            "progress": dataclasses.asdict(progress),
            "recipe": recipe,
            "data": read_json(data / "meta.json"),
            "files": sums(folder),
        }
        write_json(folder / "manifest.json", manifest)
    return target


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters by name, on the CPU; a tied matrix once, under its first name."""
    return {name: value.detach().contiguous().cpu() for name, value in model.named_parameters()}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose every file is what was written; raises MissingInputError or DataError."""
    manifest = read_json(folder / "manifest.json")
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise DataError(
            f"{folder} says it is {manifest.get('format')!r}, version {manifest.get('version')!r}; "
            f"this lmdist reads {FORMAT!r}, version {VERSION}"
        )
    check_sums(folder, manifest["files"])
    return manifest


def load_model(folder: Path) -> tuple[LanguageModel, dict[str, Any]]:
    """The model of a checkpoint, on the CPU and in evaluation mode, and the manifest."""
    manifest = read_manifest(folder)
    vocabulary = Vocabulary.load(folder / "vocab.txt")
    if len(vocabulary) != manifest["vocabulary_size"]:
        raise DataError(f"{folder}: vocab.txt has {len(vocabulary)} words, the model {manifest['vocabulary_size']}")
    model = LanguageModel(ModelSettings(**manifest["model"]), len(vocabulary))
    load_parameters(model, folder)
    return model.eval(), manifest


def load_parameters(model: nn.Module, folder: Path) -> None:
    """Copy the parameters of a checkpoint into `model`; raises DataError where names or shapes differ."""
    tensors = read_tensors(folder / "model.safetensors")
    expected = dict(model.named_parameters())
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    wanted = {name: tuple(value.shape) for name, value in expected.items()}
    if found != wanted:
        raise DataError(f"{folder}: the parameters are {found}; the model of the manifest has {wanted}")
    with torch.no_grad():
        for name, value in expected.items():
            value.copy_(tensors[name])


def load_training(folder: Path, optimizer: torch.optim.Optimizer) -> tuple[Progress, State | None]:
    """Restore the optimizer; give the progress and the state of all streams, each (G, S)."""
    tensors = read_tensors(folder / "training.safetensors")
    optimizer_state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            optimizer_state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": optimizer_state, "param_groups": optimizer.state_dict()["param_groups"]})
    progress = Progress(**read_json(folder / "manifest.json")["progress"])
    if "streams.h" not in tensors:
        return progress, None
    return progress, (tensors["streams.h"], tensors["streams.c"])


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; raises DataError where it is none."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def newest(checkpoints: Path) -> Path | None:
    """The newest checkpoint that is whole; a damaged one is named in a warning and passed over."""
    for folder in sorted(checkpoints.glob("step-*"), reverse=True):
        try:
            read_manifest(folder)
        except (DataError, MissingInputError) as error:
            sys.stderr.write(f"warning: passing over a damaged checkpoint: {error}\n")
        else:
            return folder
    return None


def best(checkpoints: Path) -> Path | None:
    """The checkpoint with the lowest validation loss, or the newest where none was validated."""
    validated = {}
    for folder in checkpoints.glob("step-*"):
        progress = read_json(folder / "manifest.json")["progress"]
        if progress["valid_nats"] is not None:
            validated[progress["valid_nats"], -progress["step"]] = folder
    return validated[min(validated)] if validated else newest(checkpoints)


def find(run_or_checkpoint: Path) -> Path:
    """The checkpoint a user means: the folder itself, or the best one of a run; raises MissingInputError."""
    if not run_or_checkpoint.is_dir():
        raise MissingInputError(f"{run_or_checkpoint} is not there; a run (runs/NAME) or a checkpoint is expected")
    if (run_or_checkpoint / "manifest.json").is_file():
        return run_or_checkpoint
    checkpoint = best(run_or_checkpoint / "checkpoints")
    if checkpoint is None:
        raise MissingInputError(f"{run_or_checkpoint} holds no checkpoint: train it first, or name another run")
    return checkpoint


def prune(checkpoints: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints and the best one."""
    kept = {*sorted(checkpoints.glob("step-*"))[-keep:], best(checkpoints)}
    for folder in checkpoints.glob("step-*"):
        if folder not in kept:
            shutil.rmtree(folder)

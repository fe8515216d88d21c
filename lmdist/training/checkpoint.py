"""Checkpoints: a run's state as tensors and JSON, whole or absent.

    runs/NAME/checkpoints/step-000001000/
        model.safetensors       the parameters
        training.safetensors    the optimizer's tensors and the state h, c of all the streams, (G, S)
        vocab.txt  text.json    how words become ids: copied from the data folder
        manifest.json           the model's shape, progress, recipe, facts of the data, and a sha256 for each file

A checkpoint is enough by itself to evaluate and to export. Nothing in it is pickled, so nothing in it can run. This
module does not know when to save, nor on how many ranks the job runs. Saving is in two steps: a snapshot, which the training
waits for, and the writing of it, which it does not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import reprlib
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lmdist import __version__
from lmdist.errors import DataError, MissingInputError, Stopped, one_line
from lmdist.model.language_model import LanguageModel, State
from lmdist.settings import DataSettings, ModelSettings, OptimizerSettings, TrainingSettings
from lmdist.storage.atomic import atomic_folder, write_atomic
from lmdist.storage.checksums import FileFacts, checksums, verify_checksums
from lmdist.storage.reading import check_folder, file_size, read_bytes, read_json, write_json
from lmdist.storage.schema import check_schema, check_version, dataclass_from_json
from lmdist.text.tokenizer import WordTokenizer
from lmdist.text.vocabulary import Vocabulary

FORMAT = "lmdist checkpoint"
VERSION = 1
NEWEST = "newest"
"""Beside the checkpoints: the name of the one that was written last."""

FILES = ("model.safetensors", "training.safetensors", "vocab.txt", "text.json")

# What whoever reads a manifest may count on. The objects that are settings are checked by their own classes.
MANIFEST = {
    "model": {},
    "vocabulary_size": int,
    "progress": {"step": int},
    "recipe": {
        "seed": int,
        "optimizer": {"name": get_type_hints(OptimizerSettings)["name"]},
        "model": {},
        "data": {},
        "training": {},
    },
    "data": {"files": {"train.bin": FileFacts}},
    "files": dict[str, FileFacts],
}
# What an optimizer keeps for a parameter, or for none: plain SGD keeps nothing. A `step` is one number, the rest is the
# parameter's size.
KEPT = {"SGD": ["momentum_buffer"], "Adam": ["step", "exp_avg", "exp_avg_sq"], "AdamW": ["step", "exp_avg", "exp_avg_sq"]}
# Above it, the bytes of a matrix may not fit into 64 bits.
LARGEST_SIZE = 1 << 28
LOSS_SCALE = torch.GradScaler("cpu").state_dict().keys()


@dataclasses.dataclass
class Progress:
    """Where a run stands. With the tensors, this is all that a resumed run needs."""

    step: int = 0
    """Steps done, and so the number of the next global batch."""
    tokens: int = 0
    """Words learnt from, over all ranks."""
    seconds: float = 0.0
    """Time spent in training steps."""
    nats: float = 0.0
    """Summed nats of the words since the last line of metrics, over all ranks."""
    counted: int = 0
    """The number of those words."""
    valid_nats: float | None = None
    """Nats a word of the newest validation."""
    best_valid_nats: float | None = None
    """Nats a word of the best validation."""
    divisions: int = 0
    """How often the plateau schedule has divided the learning rate."""
    loss_scale: dict[str, float | int] = dataclasses.field(default_factory=dict)
    """State of the fp16 loss scaler."""


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A run's state after a step, copied to memory: what the training does next does not change it."""

    progress: Progress
    model: ModelSettings
    vocabulary_size: int
    parameters: dict[str, Tensor]
    training: dict[str, Tensor]
    """The optimizer's tensors, and the state of all G streams, each (G, S)."""


def snapshot(progress: Progress, model: LanguageModel, optimizer: torch.optim.Optimizer, streams: State | None) -> Snapshot:
    """Copy a run's state; this is all that the training has to wait for. `streams` is that of all G streams, (G, S)."""
    training = {
        f"optimizer.{index}.{name}": value
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }
    if streams is not None:
        training["streams.h"], training["streams.c"] = streams
    return Snapshot(
        dataclasses.replace(progress),
        model.settings,
        model.vocabulary_size,
        {name: copied(value) for name, value in model.named_parameters()},  # a tied matrix once, under its first name
        {name: copied(value) for name, value in training.items()},
    )


def copied(tensor: Tensor) -> Tensor:
    """A copy on the CPU."""
    return tensor.detach().contiguous().to("cpu", copy=True)


def save(checkpoints: Path, taken: Snapshot, recipe: dict[str, Any], data: Path) -> Path:
    """Write `checkpoints/step-N`, whole or not at all, and then its name into `checkpoints/newest`."""
    target = checkpoints / f"step-{taken.progress.step:09d}"
    with atomic_folder(target) as folder:
        save_file(taken.parameters, folder / "model.safetensors")
        save_file(taken.training, folder / "training.safetensors")
        for name in ("vocab.txt", "text.json"):
            shutil.copyfile(data / name, folder / name)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "lmdist": __version__,
            "torch": torch.__version__,
            "model": dataclasses.asdict(taken.model),
            "vocabulary_size": taken.vocabulary_size,
            "progress": dataclasses.asdict(taken.progress),
            "recipe": recipe,
            "data": read_json(data / "meta.json"),
            "files": checksums(folder),
        }
        write_json(folder / "manifest.json", manifest)
    write_atomic(checkpoints / NEWEST, f"{target.name}\n")
    return target


class Saver:
    """Writes snapshots in a thread of its own, one at a time, while the training goes on."""

    def __init__(self, checkpoints: Path, recipe: dict[str, Any], data: Path, keep: int) -> None:
        self.checkpoints = checkpoints
        self.recipe = recipe
        self.data = data
        self.keep = keep
        self.thread: threading.Thread | None = None
        self.failure: Exception | None = None

    def save(self, taken: Snapshot) -> None:
        """Begin to write; waits for the snapshot before, if that is still being written."""
        self.wait()
        self.thread = threading.Thread(target=self.write, args=(taken,), name="checkpoint")
        self.thread.start()

    def write(self, taken: Snapshot) -> None:
        """The thread: a write that fails costs a warning, for the checkpoint before is still there."""
        try:
            save(self.checkpoints, taken, self.recipe, self.data)
            prune(self.checkpoints, self.keep)
        except Exception as error:  # a full disk has many names: OSError, SafetensorError
            self.failure = error
            sys.stderr.write(f"warning: the checkpoint of step {taken.progress.step} could not be written: {error}\n")
        else:
            self.failure = None

    def wait(self) -> None:
        """Wait until nothing is being written."""
        if self.thread:
            self.thread.join()

    def close(self) -> None:
        """Wait for the last write; raises Stopped where it failed, for then the last steps are not on the disk."""
        self.wait()
        if self.failure:
            newest_one = max((folder.name for folder in self.checkpoints.glob("step-*")), default="none")
            raise Stopped(
                f"the last checkpoint could not be written ({self.failure}); the newest one is {newest_one}. "
                "Make room for it and run again with --resume auto"
            )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose every file is what was written; raises MissingInputError or DataError."""
    manifest = manifest_of(folder)
    verify_checksums(folder, manifest["files"], FILES)
    return manifest


def manifest_of(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself, all of it of the right type; the files beside the manifest are not looked at.

    A setting that is younger than the checkpoint has its default.
    """
    path = folder / "manifest.json"
    manifest = read_json(path)
    check_version(manifest, (FORMAT, VERSION), path)
    check_schema(manifest, MANIFEST, path)
    recipe = manifest["recipe"]
    for place, holder, name, kind in (
        ("model", manifest, "model", ModelSettings),
        ("progress", manifest, "progress", Progress),
        ("recipe.model", recipe, "model", ModelSettings),
        ("recipe.data", recipe, "data", DataSettings),
        ("recipe.training", recipe, "training", TrainingSettings),
    ):
        holder[name] = dataclasses.asdict(dataclass_from_json(kind, holder[name], path, place))
    if manifest["model"] != recipe["model"]:
        raise DataError(f"{path} is damaged: its model is not its recipe's")
    if "\n" in recipe["data"]["folder"]:
        raise DataError(f"{path}: recipe.data.folder is {reprlib.repr(recipe['data']['folder'])}; one line is expected")
    progress = manifest["progress"]
    if progress["loss_scale"] and progress["loss_scale"].keys() != LOSS_SCALE:
        raise DataError(
            f"{path}: progress.loss_scale is {reprlib.repr(progress['loss_scale'])}; expected are {', '.join(LOSS_SCALE)}"
        )
    for name, value in progress.items():
        if isinstance(value, int | float) and value < 0:
            raise DataError(f"{path}: progress.{name} is {value}; it must not be negative")
    return manifest


def load_model(folder: Path) -> tuple[LanguageModel, dict[str, Any]]:
    """The model of a checkpoint, on the CPU and in evaluation mode, and the manifest."""
    manifest = read_manifest(folder)
    WordTokenizer.load(folder / "text.json")
    vocabulary = Vocabulary.load(folder / "vocab.txt")
    if len(vocabulary) != manifest["vocabulary_size"]:
        raise DataError(f"{folder}: vocab.txt has {len(vocabulary)} words, the model {manifest['vocabulary_size']}")
    settings = ModelSettings(**manifest["model"])
    # What a manifest asks for may be larger than any memory. It is made only where the file is as large.
    found = shapes(folder / "model.safetensors")
    if settings.num_layers > len(found) or max(settings.hidden_size, settings.embedding_size) > LARGEST_SIZE:
        raise DataError(f"{folder}: the model of the manifest is not the one of model.safetensors: {manifest['model']}")
    with torch.device("meta"):  # has shapes and no memory
        check_shapes(found, parameter_shapes(LanguageModel(settings, len(vocabulary))), folder / "model.safetensors")
    model = LanguageModel(settings, len(vocabulary))
    load_parameters(model, folder)
    return model.eval(), manifest


def load_parameters(model: nn.Module, folder: Path) -> None:
    """Copy the parameters of a checkpoint into `model`; raises DataError where names or shapes differ."""
    tensors = read_tensors(folder / "model.safetensors", parameter_shapes(model))
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(tensors[name])


def load_training(folder: Path, optimizer: torch.optim.Optimizer) -> tuple[Progress, State | None]:
    """Restore the optimizer; give the progress and the state of all streams, each (G, S)."""
    manifest = manifest_of(folder)
    path = folder / "training.safetensors"
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    streams = (manifest["recipe"]["data"]["global_batch"], sum(ModelSettings(**manifest["model"]).layer_sizes))  # (G, S)
    expected: dict[str, tuple[int, ...]] = {"streams.h": streams, "streams.c": streams}
    for index, parameter in enumerate(parameters):
        for name in KEPT[type(optimizer).__name__]:
            expected[f"optimizer.{index}.{name}"] = () if name == "step" else tuple(parameter.shape)
    groups = {name.rpartition(".")[0] for name in shapes(path)}  # all that is kept for a parameter is there, or nothing
    tensors = read_tensors(path, {name: shape for name, shape in expected.items() if name.rpartition(".")[0] in groups})

    optimizer_state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            optimizer_state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": optimizer_state, "param_groups": optimizer.state_dict()["param_groups"]})
    progress = Progress(**manifest["progress"])
    if "streams.h" not in tensors:
        return progress, None
    return progress, (tensors["streams.h"], tensors["streams.c"])


def read_tensors(path: Path, expected: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file; raises DataError where it is none, holds no finite numbers, or not `expected`."""
    found = shapes(path)
    if expected is not None:
        check_shapes(found, expected, path)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).float() for name in found}  # states of bf16 and fp16 runs are half as wide
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise DataError(f"{path}: {reprlib.repr(name)} holds numbers that are not finite")
    return tensors


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """What a safetensors file says at its beginning: the shape of each tensor; raises DataError where it is no such file.

    That the file is as long as the shapes say is safetensors' own check.
    """
    file_size(path)
    try:
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            for name, part in parts.items():
                if part.get_dtype() not in ("F32", "F16", "BF16"):
                    raise DataError(f"{path}: {reprlib.repr(name)} is of the type {part.get_dtype()}; F32 is expected")
            return {name: tuple(part.get_shape()) for name, part in parts.items()}
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is not a file of safetensors: {one_line(error)}") from None


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter; a tied matrix once, under its first name."""
    return {name: tuple(value.shape) for name, value in model.named_parameters()}


def check_shapes(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Raise DataError, naming the first tensor that is not what it should be, unless names and shapes agree."""
    for name in sorted({*found, *expected}):
        if found.get(name) != expected.get(name):
            raise DataError(
                f"{path}: the shape of {reprlib.repr(name)} is {found.get(name, 'missing')}; "
                f"expected is {expected.get(name, 'none')}"
            )


def newest(checkpoints: Path) -> Path | None:
    """The newest checkpoint that is whole; one that is damaged or missing is named in a warning and passed over."""
    with contextlib.suppress(DataError, MissingInputError):
        last = read_bytes(checkpoints / NEWEST, 1000).decode(errors="replace").strip()
        if not os.path.isdir(checkpoints / last):
            sys.stderr.write(f"warning: the checkpoint that was written last, {reprlib.repr(last)}, is missing\n")
    return next((folder for folder, _ in readable(checkpoints, read_manifest)), None)


def best(checkpoints: Path) -> Path | None:
    """The checkpoint with the lowest validation loss, or the newest where none was validated."""
    validated = {}
    for folder, manifest in readable(checkpoints, manifest_of):
        progress = manifest["progress"]
        if progress["valid_nats"] is not None:
            validated[progress["valid_nats"], -progress["step"]] = folder
    return validated[min(validated)] if validated else newest(checkpoints)


def readable(checkpoints: Path, read: Callable[[Path], dict[str, Any]]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The checkpoints of a run and their manifests, newest first; one that is damaged is named in a warning."""
    for folder in sorted(checkpoints.glob("step-*"), reverse=True):
        if is_numbered(folder):
            try:
                yield folder, read(folder)
            except (DataError, MissingInputError) as error:
                sys.stderr.write(f"warning: passing over a damaged checkpoint: {error}\n")


def find(run_or_checkpoint: Path) -> Path:
    """The checkpoint a user means: the folder itself, or the best one of a run; raises MissingInputError or DataError."""
    check_folder(run_or_checkpoint, "a run (runs/NAME) or a checkpoint is expected")
    if (run_or_checkpoint / "manifest.json").is_file():
        return run_or_checkpoint
    checkpoint = best(run_or_checkpoint / "checkpoints")
    if checkpoint is None:
        raise MissingInputError(f"{run_or_checkpoint} holds no checkpoint: train it first, or name another run")
    return checkpoint


def tidy(checkpoints: Path) -> None:
    """Remove what a job left half written when it was killed; no other job may be writing here."""
    for left in checkpoints.glob(".*"):
        shutil.rmtree(left, ignore_errors=True)


def prune(checkpoints: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints and the best one."""
    numbered = [folder for folder in sorted(checkpoints.glob("step-*")) if is_numbered(folder)]
    kept = {*numbered[-keep:], best(checkpoints)}
    for folder in numbered:
        if folder not in kept:
            # Renamed first, so that a kill leaves no half of it under a checkpoint's name; `tidy` removes what is left.
            removed = folder.rename(folder.with_name(f".{folder.name}.removed"))
            shutil.rmtree(removed)


def is_numbered(folder: Path) -> bool:
    """Whether the name is one that `save` gives; what is called `step-old` is somebody's own."""
    return folder.is_dir() and folder.name.removeprefix("step-").isdigit()

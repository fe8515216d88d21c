"""Read a checkpoint strictly: checksums, schema, names and shapes of all tensors, finite numbers.

A checkpoint may come from a stranger: what is damaged or foreign raises DataError before memory is allocated for it.
"""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lmdist.errors import DataError, one_line
from lmdist.model.language_model import LanguageModel, State
from lmdist.model.lstm import STATE_PARTS
from lmdist.settings import AveragingSettings, DataSettings, ModelSettings, TrainingSettings
from lmdist.storage.checksums import verify_checksums, verify_sizes
from lmdist.storage.reading import file_size, read_json
from lmdist.storage.schema import check_schema, check_version, dataclass_from_json
from lmdist.text.data_folder import TEXT, VOCABULARY
from lmdist.text.tokenizer import WordTokenizer
from lmdist.text.vocabulary import Vocabulary
from lmdist.tracking.run_folder import STEP
from lmdist.training.checkpoints.format import (
    AVERAGED,
    FILES,
    FIRST_KEYS,
    FORMAT,
    LOSS_SCALE,
    MANIFEST,
    MANIFEST_SCHEMA,
    MODEL,
    OWN_CHECKSUM,
    TRAINING,
    VERSION,
    Progress,
    own_checksum,
)
from lmdist.training.optimizer import load_optimizer_state, optimizer_state_shapes

LARGEST_SIZE = 1 << 28
"""The bytes of a matrix with a larger side may not fit into 64 bits."""


def read_verified_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint after checking the sha256 of each file; raise MissingInputError or DataError."""
    manifest = read_manifest(folder)
    needed = (*FILES, AVERAGED) if is_averaged(manifest) else FILES
    # What a look at the sizes refuses costs no time: the sha256 of many gigabytes takes a minute.
    verify_sizes(folder, manifest["files"], needed)
    for file in {MODEL, parameters_file(manifest)}:
        check_model(folder, manifest, file)
    verify_checksums(folder, manifest["files"], needed)
    return manifest


def read_resumable(folder: Path) -> dict[str, Any]:
    """Return the same after a look at each number of each tensor: earlier versions saved numbers that are not finite."""
    manifest = read_verified_manifest(folder)
    for name in manifest["files"]:
        if name in (MODEL, TRAINING, AVERAGED):
            for _ in finite_tensors(folder / name):
                pass
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint, all of it of the right type; the files beside it are not read.

    A setting that is younger than the checkpoint has its default.
    """
    path = folder / MANIFEST
    manifest = read_json(path)
    check_version(manifest, (FORMAT, VERSION), path)
    check_own_checksum(manifest, path)
    check_schema(manifest, MANIFEST_SCHEMA, path)
    recipe = manifest["recipe"]
    check_schema(recipe.setdefault("averaging", {}), {}, path, "recipe.averaging")  # absent from the first checkpoints
    for place, holder, name, kind in (
        ("model", manifest, "model", ModelSettings),
        ("progress", manifest, "progress", Progress),
        ("recipe.model", recipe, "model", ModelSettings),
        ("recipe.data", recipe, "data", DataSettings),
        ("recipe.training", recipe, "training", TrainingSettings),
        ("recipe.averaging", recipe, "averaging", AveragingSettings),
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
    if is_averaged(manifest) and progress["averaged_from"] > progress["step"]:
        raise DataError(f"{path}: progress.averaged_from is {progress['averaged_from']}, after step {progress['step']}")
    named = STEP.fullmatch(folder.name)
    if named and int(named[1]) != progress["step"]:
        raise DataError(f"{path} is of step {progress['step']}, and not of the step that the folder is named after")
    return manifest


def check_own_checksum(manifest: dict[str, Any], path: Path) -> None:
    """Raise DataError unless a manifest has the checksum that it holds; the first ones hold none."""
    if OWN_CHECKSUM not in manifest and manifest.keys() <= FIRST_KEYS:
        return
    with suppress(RecursionError):  # nested more deeply than anything that was written
        if manifest.get(OWN_CHECKSUM) == own_checksum(manifest):
            return
    raise DataError(f"{path} is damaged: its sha256 is not the one recorded when it was written")


def is_averaged(manifest: dict[str, Any]) -> bool:
    """Return whether a checkpoint holds an average of the parameters."""
    return manifest["progress"]["averaged_from"] is not None


def parameters_file(manifest: dict[str, Any]) -> str:
    """Return the file of the parameters that a checkpoint's model has: the average, where it holds one."""
    return AVERAGED if is_averaged(manifest) else MODEL


def load_model(folder: Path) -> tuple[LanguageModel, dict[str, Any]]:
    """Return the model of a checkpoint, on the CPU and in evaluation mode, and the manifest.

    Its parameters are the average over the steps, where the checkpoint holds one.
    """
    manifest = read_verified_manifest(folder)
    WordTokenizer.load(folder / TEXT)
    vocabulary = Vocabulary.load(folder / VOCABULARY, manifest["vocabulary_size"], "the model")
    model = LanguageModel(ModelSettings(**manifest["model"]), len(vocabulary))
    load_parameters(model, folder, parameters_file(manifest))
    return model.eval(), manifest


def check_model(folder: Path, manifest: dict[str, Any], file: str) -> None:
    """Raise DataError unless a file of parameters has the shapes of the manifest's model, which may exceed any memory."""
    settings, vocabulary_size = ModelSettings(**manifest["model"]), manifest["vocabulary_size"]
    found = read_shapes(folder / file)
    largest = max(settings.hidden_size, settings.embedding_size, vocabulary_size)
    if settings.num_layers > len(found) or largest > LARGEST_SIZE or vocabulary_size < 1:
        raise DataError(f"{folder}: the model of the manifest is not the one of {file}: {manifest['model']}")
    with torch.device("meta"):  # has shapes and no memory
        check_shapes(found, parameter_shapes(LanguageModel(settings, vocabulary_size)), folder / file)


def load_parameters(model: nn.Module, folder: Path, file: str = MODEL) -> None:
    """Copy the parameters in a file of a checkpoint into `model`; raise DataError if names or shapes differ."""
    tensors = read_tensors(folder / file, parameter_shapes(model))
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(tensors[name])


def load_training(folder: Path, optimizer: torch.optim.Optimizer) -> tuple[Progress, State | None]:
    """Restore `optimizer`, the one that the checkpoint's recipe names; return the progress and the state of all streams.

    Each part of the state is (G, S). Raise DataError if names or shapes differ.
    """
    manifest = read_manifest(folder)
    recipe = manifest["recipe"]
    path = folder / TRAINING
    streams_shape = (recipe["data"]["global_batch"], sum(ModelSettings(**manifest["model"]).layer_sizes))  # (G, S)
    expected: dict[str, tuple[int, ...]] = {f"streams.{name}": streams_shape for name in STATE_PARTS}
    for name, shape in optimizer_state_shapes(recipe["optimizer"]["name"], optimizer).items():
        expected[f"optimizer.{name}"] = shape
    # The state of a parameter, or of the streams, is in the file completely or not at all.
    groups = {name.rpartition(".")[0] for name in read_shapes(path)}
    tensors = read_tensors(path, {name: shape for name, shape in expected.items() if name.rpartition(".")[0] in groups})

    prefix = "optimizer."
    optimizer_tensors = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    load_optimizer_state(optimizer, optimizer_tensors)
    streams = tuple(tensors[f"streams.{name}"] for name in STATE_PARTS) if "streams" in groups else None
    return Progress(**manifest["progress"]), streams


def read_tensors(path: Path, expected: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, in fp32.

    Raise DataError if it is none, if a number is not finite, or if names and shapes are not those `expected`.
    """
    if expected is not None:
        check_shapes(read_shapes(path), expected, path)
    return dict(finite_tensors(path))


def finite_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a safetensors file and their names, in fp32; raise DataError if a number is not finite."""
    found = read_shapes(path)
    with safe_open(path, framework="pt") as file:
        for name in found:
            value = file.get_tensor(name).float()  # states of bf16 and fp16 runs are half as wide
            if not value.isfinite().all():
                raise DataError(f"{path}: {reprlib.repr(name)} holds numbers that are not finite")
            yield name, value


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor from the header of a safetensors file; raise DataError if it is no such file.

    safetensors itself checks that the file is as long as the shapes say.
    """
    file_size(path)
    try:
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            for name, part in parts.items():
                if part.get_dtype() not in ("F32", "F16", "BF16"):
                    raise DataError(f"{path}: {reprlib.repr(name)} is of the type {part.get_dtype()}; F32 is expected")
            return {name: tuple(part.get_shape()) for name, part in parts.items()}
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is not a file of safetensors: {one_line(error)}") from None


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter; a tied matrix once, under its first name."""
    return {name: tuple(value.shape) for name, value in model.named_parameters()}


def check_shapes(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Raise DataError, naming the first tensor that differs, unless names and shapes agree."""
    for name in sorted({*found, *expected}):
        if found.get(name) != expected.get(name):
            raise DataError(
                f"{path}: the shape of {reprlib.repr(name)} is {found.get(name, 'missing')}; "
                f"expected is {expected.get(name, 'none')}"
            )

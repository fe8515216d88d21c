"""Read a checkpoint strictly: checksums, schema, names and shapes of all tensors, finite numbers.

    checkpoint = open_checkpoint(path)          # its files are opened and checked once, and read as they were then
    model = checkpoint.model()

A checkpoint may come from a stranger: what is damaged or foreign raises DataError before memory is allocated for it.
"""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lmdist.errors import DataError, one_line
from lmdist.model.language_model import LanguageModel, State
from lmdist.model.lstm import STATE_PARTS
from lmdist.settings import AveragingSettings, DataSettings, ModelSettings, TrainingSettings
from lmdist.storage.checksums import check_own_checksum, verify_checksums, verify_sizes
from lmdist.storage.held import HeldFolder, read_held
from lmdist.storage.reading import MAX_JSON_BYTES, read_json
from lmdist.storage.schema import check_schema, check_version, dataclass_from_json
from lmdist.text.data_folder import TEXT, VOCABULARY
from lmdist.text.tokenizer import WordTokenizer
from lmdist.text.vocabulary import MAX_BYTES, Vocabulary
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
    TRAINING,
    VERSION,
    Progress,
)
from lmdist.training.optimizer import load_optimizer_state, optimizer_state_shapes

LARGEST_SIZE = 1 << 28
"""The bytes of a matrix with a larger side may not fit into 64 bits."""


class Checkpoint:
    """A checkpoint that is held open, and whose files have the checksums of its manifest."""

    def __init__(self, files: HeldFolder) -> None:
        """Read the manifest and check the sha256 of each file; raise MissingInputError or DataError."""
        self.files = files
        self.path = files.path
        self.manifest = check_manifest(files.read_json(MANIFEST), self.path / MANIFEST)
        listed, needed = self.manifest["files"], (*FILES, AVERAGED) if is_averaged(self.manifest) else FILES
        # What a look at the sizes refuses costs no time: the sha256 of many gigabytes takes a minute.
        verify_sizes(files, listed, needed)
        for file in {MODEL, parameters_file(self.manifest)}:
            check_model(files, self.manifest, file)
        self.contents = {VOCABULARY: files.read(VOCABULARY, MAX_BYTES), TEXT: files.read(TEXT, MAX_JSON_BYTES)}
        """The vocabulary's and the tokenizer's files."""
        verify_checksums(files, listed)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Return the vocabulary; raise DataError where it is not the model's."""
        size = self.manifest["vocabulary_size"]
        return Vocabulary.parse(self.contents[VOCABULARY], self.path / VOCABULARY, size, "the model")

    @cached_property
    def tokenizer(self) -> WordTokenizer:
        """Return the tokenizer; raise DataError where it is none."""
        return WordTokenizer.parse(self.contents[TEXT], self.path / TEXT)

    def model(self) -> LanguageModel:
        """Return the model, on the CPU and in evaluation mode; raise DataError where vocabulary or tokenizer are none of it.

        Its parameters are the average over the steps, where the checkpoint holds one.
        """
        vocabulary, _ = self.vocabulary, self.tokenizer
        model = LanguageModel(ModelSettings(**self.manifest["model"]), len(vocabulary))
        self.load_parameters(model, parameters_file(self.manifest))
        return model.eval()

    def load_parameters(self, model: nn.Module, file: str = MODEL) -> None:
        """Copy the parameters in a file into `model`; raise DataError if names or shapes differ."""
        tensors = read_tensors(self.files, file, parameter_shapes(model))
        with torch.no_grad():
            for name, value in model.named_parameters():
                value.copy_(tensors[name])

    def load_training(self, optimizer: torch.optim.Optimizer) -> tuple[Progress, State | None]:
        """Restore `optimizer`, the one that the recipe names; return the progress and the state of all streams.

        Each part of the state is (G, S). Raise DataError if names or shapes differ.
        """
        recipe = self.manifest["recipe"]
        state_size = sum(ModelSettings(**self.manifest["model"]).layer_sizes)
        streams_shape = (recipe["data"]["global_batch"], state_size)  # (G, S)
        expected: dict[str, tuple[int, ...]] = {f"streams.{name}": streams_shape for name in STATE_PARTS}
        for name, shape in optimizer_state_shapes(recipe["optimizer"]["name"], optimizer).items():
            expected[f"optimizer.{name}"] = shape
        # The state of a parameter, or of the streams, is in the file completely or not at all.
        groups = {name.rpartition(".")[0] for name in read_shapes(self.files, TRAINING)}
        expected = {name: shape for name, shape in expected.items() if name.rpartition(".")[0] in groups}
        tensors = read_tensors(self.files, TRAINING, expected)

        prefix = "optimizer."
        optimizer_tensors = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        load_optimizer_state(optimizer, optimizer_tensors)
        streams = tuple(tensors[f"streams.{name}"] for name in STATE_PARTS) if "streams" in groups else None
        return Progress(**self.manifest["progress"]), streams


def open_checkpoint(path: Path) -> Checkpoint:
    """Return a checkpoint, all of it checked; raise MissingInputError or DataError."""
    return read_held(path, Checkpoint, "a checkpoint is expected")


def open_resumable(path: Path) -> Checkpoint:
    """Return the same after a look at each number of each tensor: earlier versions saved numbers that are not finite."""
    checkpoint = open_checkpoint(path)
    for name in (MODEL, TRAINING, AVERAGED):
        if name in checkpoint.manifest["files"]:
            check_numbers(checkpoint.files, name)
    return checkpoint


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint, all of it of the right type; the files beside it are not read.

    A setting that is younger than the checkpoint has its default.
    """
    return check_manifest(read_json(folder / MANIFEST), folder / MANIFEST)


def check_manifest(manifest: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return what was read from a manifest.json, as `read_manifest` does; raise DataError."""
    check_version(manifest, (FORMAT, VERSION), path)
    check_own_checksum(manifest, path, FIRST_KEYS)
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
    named = STEP.fullmatch(path.parent.name)
    if named and int(named[1]) != progress["step"]:
        raise DataError(f"{path} is of step {progress['step']}, and not of the step that the folder is named after")
    return manifest


def is_averaged(manifest: dict[str, Any]) -> bool:
    """Return whether a checkpoint holds an average of the parameters."""
    return manifest["progress"]["averaged_from"] is not None


def parameters_file(manifest: dict[str, Any]) -> str:
    """Return the file of the parameters that a checkpoint's model has: the average, where it holds one."""
    return AVERAGED if is_averaged(manifest) else MODEL


def check_model(files: HeldFolder, manifest: dict[str, Any], file: str) -> None:
    """Raise DataError unless a file of parameters has the shapes of the manifest's model, which may exceed any memory."""
    settings, vocabulary_size = ModelSettings(**manifest["model"]), manifest["vocabulary_size"]
    found = read_shapes(files, file)
    largest = max(settings.hidden_size, settings.embedding_size, vocabulary_size)
    if settings.num_layers > len(found) or largest > LARGEST_SIZE or vocabulary_size < 1:
        raise DataError(f"{files.path}: the model of the manifest is not the one of {file}: {manifest['model']}")
    with torch.device("meta"):  # has shapes and no memory
        check_shapes(found, parameter_shapes(LanguageModel(settings, vocabulary_size)), files.path / file)


def read_tensors(files: HeldFolder, name: str, expected: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, in fp32.

    Raise DataError if it is none, if a number is not finite, if names and shapes are not those `expected`, or if the file was
    written to since it was opened.
    """
    if expected is not None:
        check_shapes(read_shapes(files, name), expected, files.path / name)
    return dict(tensors_of(files, name))


def tensors_of(files: HeldFolder, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor of a safetensors file with its name, one at a time in memory, and raise as `read_tensors`."""
    found = read_shapes(files, name)
    with safe_open(files.path_of(name), framework="pt") as file:
        for tensor in found:
            # A copy, for the file is mapped into memory. States of bf16 and fp16 runs are half as wide.
            value = file.get_tensor(tensor).to(torch.float32, copy=True)
            if not value.isfinite().all():
                raise DataError(f"{files.path / name}: {reprlib.repr(tensor)} holds numbers that are not finite")
            yield tensor, value
    files.check_unchanged(name)


def check_numbers(files: HeldFolder, name: str) -> None:
    """Look at each number of a safetensors file, one tensor in memory at a time, and raise as `read_tensors`."""
    for _ in tensors_of(files, name):
        pass


def read_shapes(files: HeldFolder, name: str) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor from the header of a safetensors file; raise DataError if it is no such file.

    safetensors itself checks that the file is as long as the shapes say.
    """
    path = files.path / name
    try:
        with safe_open(files.path_of(name), framework="pt") as file:
            parts = {tensor: file.get_slice(tensor) for tensor in file.keys()}  # noqa: SIM118 (not a dict)
            for tensor, part in parts.items():
                if part.get_dtype() not in ("F32", "F16", "BF16"):
                    raise DataError(f"{path}: {reprlib.repr(tensor)} is of the type {part.get_dtype()}; F32 is expected")
            return {tensor: tuple(part.get_shape()) for tensor, part in parts.items()}
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

"""From a token file to this rank's part of global batch number s.

A batch is a pure function of (seed, s): the position in the data is one integer, whatever the number of ranks. Windows are
cut from the memory-mapped file when they are needed, and never written.

streams (G = 3, window = 4): the file is cut into G contiguous streams, read side by side, the LSTM's state carried from
batch to batch. Each token is predicted once per epoch, the first one of the file from an end mark.

    file      a b c d e f g h i j k l m n o p
    stream 0  a b c d | e              streams 0 and 1 are one token shorter than stream 2: their last
    stream 1  f g h i | j              window has padding, which the loss ignores
    stream 2  k l m n | o p
              batch 0 | batch 1

windows (window = 4, stride = 3): independent windows of `window` tokens every `stride` tokens, each from a zero state. The
first `window - 1` tokens of one are read, the last `window - 1` are predicted. Shuffled anew in each epoch.

    file      a b c d e f g h i j
    window 0  a b c d                  reads a b c, predicts b c d
    window 1        d e f g            reads d e f, predicts e f g
    window 2              g h i j

Shapes: G global batch size, B batch size of this rank, T tokens. This module knows neither the model nor where the ranks run.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lmdist.errors import DataError, MissingInputError
from lmdist.model.loss import IGNORED
from lmdist.settings import DataSettings
from lmdist.storage.checksums import verify_checksums
from lmdist.storage.reading import check_folder, file_size
from lmdist.text.data_folder import TEXT, VOCABULARY, read_meta, token_file
from lmdist.text.tokenizer import WordTokenizer
from lmdist.text.vocabulary import END_ID, Vocabulary


class Batch(NamedTuple):
    """One rank's part of a global batch."""

    inputs: Tensor
    """Tokens to read, (B, T) int64."""
    targets: Tensor
    """The token after each, (B, T) int64; IGNORED for padding."""
    num_tokens: int
    """Tokens predicted in the global batch."""
    state_reset: bool
    """Whether the state before this batch is zero."""

    def tensors_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return inputs and targets on a device; copies to a GPU run while it still computes the previous batch."""
        if device.type == "cpu":
            return self.inputs, self.targets
        inputs, targets = (tensor.pin_memory().to(device, non_blocking=True) for tensor in (self.inputs, self.targets))
        return inputs, targets


class DataFolder:
    """A data folder: its meta.json, tokenizer and vocabulary, and its token files as memory-mapped arrays.

    All of it is read or held open from the start: a job goes on, and saves checkpoints of the words it began with, when the
    folder is removed or another one is put in its place.
    """

    def __init__(self, path: Path) -> None:
        """Read all but the token files."""
        check_folder(path, f"a data folder is expected: lmdist-prepare YOUR.csv -o {path} writes it")
        self.path = path
        self.meta = read_meta(path)
        files, names = self.meta["files"], (VOCABULARY, TEXT)
        verify_checksums(path, {name: files[name] for name in names if name in files}, names)
        self.tokenizer = WordTokenizer.load(path / TEXT)
        self.vocabulary = Vocabulary.load(path / VOCABULARY, self.meta["vocabulary_size"], "meta.json")
        self.contents = {name: (path / name).read_bytes() for name in names}
        """The vocabulary's and the tokenizer's files."""
        for name, content in self.contents.items():
            if hashlib.sha256(content).hexdigest() != files[name]["sha256"]:
                raise DataError(f"{path / name} was changed while it was read: wait until the folder is complete")
        self.in_use: dict[str, tuple[np.ndarray, os.stat_result]] = {}
        """The token files that are mapped, and what they were then, by name."""

    @property
    def vocabulary_size(self) -> int:
        """Return the number of words in the vocabulary."""
        return len(self.vocabulary)

    def has(self, split: str) -> bool:
        """Return whether the folder has this split."""
        return split in self.meta["splits"]

    def check_vocabulary(self, manifest: dict[str, Any]) -> None:
        """Raise DataError unless the folder has the vocabulary of the checkpoint with this manifest."""
        if self.meta["files"][VOCABULARY]["sha256"] != manifest["files"][VOCABULARY]["sha256"]:
            raise DataError(f"{self.path} has another vocabulary than the model: name the model's own folder by --data FOLDER")

    def tokens(self, split: str) -> np.ndarray:
        """Return the tokens of a split, (N,) uint16 or uint32, memory-mapped."""
        if not self.has(split):
            raise MissingInputError(f"{self.path} has no {split} split; it has {', '.join(self.meta['splits'])}")
        path = self.path / token_file(split)
        dtype = np.dtype(self.meta["dtype"]).newbyteorder("<")
        expected, size = self.meta["splits"][split]["tokens"], file_size(path)
        if size != expected * dtype.itemsize:
            raise DataError(f"{path} has {size} bytes; {expected} tokens of {dtype.itemsize} are expected")
        if not size:
            raise DataError(f"{path} is empty: prepare the folder anew from more text")
        try:
            with path.open("rb") as file:
                tokens = np.memmap(file, dtype=dtype, mode="r")
                self.in_use[path.name] = tokens, os.fstat(file.fileno())
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error}") from None
        # This reads the whole file, which then is in the page cache for the first epoch. Without the check an id outside the
        # vocabulary ends a job on a GPU hours later, by an error that does not name the file.
        largest = int(tokens.max())
        if largest >= self.vocabulary_size:
            raise DataError(
                f"{path} is damaged: it has a token {largest}, and the vocabulary ends at {self.vocabulary_size - 1}"
            )
        return tokens

    def check_unchanged(self) -> None:
        """Raise DataError if a token file in use was written to since it was mapped: batches would come from another text.

        One that was removed, or replaced by another file, is still what it was to this process.
        """
        for name, (tokens, before) in self.in_use.items():
            try:
                now = os.stat(self.path / name)
            except OSError:
                continue
            if (now.st_dev, now.st_ino) != (before.st_dev, before.st_ino) or now.st_mtime_ns == before.st_mtime_ns:
                continue
            expected = self.meta["files"][name]["sha256"]
            if now.st_size != before.st_size or hashlib.sha256(tokens.view(np.uint8).data).hexdigest() != expected:
                raise DataError(
                    f"{self.path / name} was overwritten while the job read it, and nothing is saved since: prepare other text "
                    "into another folder, and this one anew to continue"
                )
            self.in_use[name] = tokens, now


def folder_of_model(manifest: dict[str, Any], given: Path | None, otherwise: str = "") -> DataFolder:
    """Return the data folder that is `given`, or that a checkpoint's model was trained on; its vocabulary is the model's.

    Raise MissingInputError, with what to do `otherwise`, or DataError.
    """
    path = given or Path(manifest["recipe"]["data"]["folder"])
    if not path.exists():
        which = "" if given else ", which the model was trained on,"
        raise MissingInputError(
            f"the data folder {path}{which} does not exist here: give its place by --data FOLDER{otherwise}"
        )
    folder = DataFolder(path)
    folder.check_vocabulary(manifest)
    return folder


class Streams:
    """Global batches of G contiguous streams whose state is carried on."""

    def __init__(self, tokens: np.ndarray, global_batch: int, window: int) -> None:
        self.tokens = tokens
        self.window = window
        # Stream g is tokens[bounds[g]:bounds[g + 1]]; the lengths differ by one at most.
        self.bounds = np.arange(global_batch + 1) * len(tokens) // global_batch
        self.longest = int(np.diff(self.bounds).max())
        self.steps_per_epoch = -(-self.longest // window)

    def batch(self, step: int, part: slice) -> Batch:
        """Return the sequences `part` of global batch number `step`."""
        position = step % self.steps_per_epoch
        offset = position * self.window
        starts, ends = self.bounds[:-1] + offset, self.bounds[1:]
        length = min(self.window, self.longest - offset)
        return batch_of(self.tokens, starts, ends, length, part, state_reset=position == 0)


class Windows:
    """Global batches of G independent windows, shuffled by a permutation that takes no memory."""

    def __init__(self, tokens: np.ndarray, global_batch: int, window: int, stride: int, seed: int) -> None:
        self.tokens = tokens
        self.global_batch = global_batch
        self.window = window
        self.stride = stride or window - 1
        self.seed = seed
        self.count = 1 + max(0, -(-(len(tokens) - window) // self.stride))
        self.steps_per_epoch = -(-self.count // global_batch)

    def batch(self, step: int, part: slice) -> Batch:
        """Return the sequences `part` of global batch number `step`."""
        epoch, position = divmod(step, self.steps_per_epoch)
        index = position * self.global_batch + np.arange(self.global_batch)  # (G)
        exists = index < self.count  # the last batch of an epoch may have fewer than G windows
        window = permute(index % self.count, self.count, (self.seed % (1 << 64), epoch))
        starts = window * self.stride + 1
        ends = np.where(exists, np.minimum(starts - 1 + self.window, len(self.tokens)), 0)
        return batch_of(self.tokens, starts, ends, self.window - 1, part, state_reset=True)


def batch_of(tokens: np.ndarray, starts: np.ndarray, ends: np.ndarray, length: int, part: slice, *, state_reset: bool) -> Batch:
    """Return the sequences `part` of a global batch whose sequence g predicts tokens[starts[g]:ends[g]], `length` at most."""
    num_tokens = int(np.clip(ends - starts, 0, length).sum())
    starts, ends = starts[part, None], ends[part, None]  # (B, 1)
    positions = starts + np.arange(-1, length)  # (B, T + 1): from one token before the first that is predicted
    ids = np.take(tokens, positions, mode="clip").astype(np.int64)  # (B, T + 1)
    ids[positions < 0] = END_ID  # a file begins as if a document had just ended
    targets = np.where(positions[:, 1:] < ends, ids[:, 1:], IGNORED)  # (B, T)
    return Batch(torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(targets), num_tokens, state_reset)


def permute(index: np.ndarray, size: int, key: tuple[int, int]) -> np.ndarray:
    """Return the image of each number of `index` under a permutation of range(size) chosen by `key`.

    A Feistel network over the smallest even number of bits that holds `size`, applied again to results outside the range
    (cycle walking: Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains"). O(1) memory however large `size` is.
    """
    half = max(1, -(-(size - 1).bit_length() // 2))
    mask = np.uint64((1 << half) - 1)
    keys = np.random.SeedSequence(key).generate_state(4, np.uint64)
    values = index.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        left, right = values[outside] >> np.uint64(half), values[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (mix(right + round_key) & mask)
        values[outside] = (left << np.uint64(half)) | right
        outside = values >= size
    return values.astype(np.int64)


def mix(values: np.ndarray) -> np.ndarray:
    """Hash 64-bit numbers by the finalizer of SplitMix64 (Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def training_batches(folder: DataFolder, settings: DataSettings, seed: int) -> Streams | Windows:
    """Return the batches that a recipe trains on; raise DataError if the text is too short for them."""
    tokens = folder.tokens("train")
    num_sequences = settings.global_batch if settings.batching == "streams" else 1
    if len(tokens) < num_sequences * settings.window:
        raise DataError(
            f"{folder.path} has {len(tokens):,} tokens to train on; {num_sequences} sequence(s) of {settings.window} need "
            f"{num_sequences * settings.window:,}: take more text, or lower --data.window or --data.global_batch"
        )
    if settings.batching == "streams":
        return Streams(tokens, settings.global_batch, settings.window)
    return Windows(tokens, settings.global_batch, settings.window, settings.stride, seed)

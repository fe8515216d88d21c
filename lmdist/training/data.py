"""From a token file to this rank's part of global batch number s.

A batch is a pure function of (seed, s): the position in the data is one integer, whatever the number of ranks. Windows are
never written out; they are cut from the memory-mapped file when their turn comes.

streams (G = 3 rows, window = 4): the file is cut into G contiguous streams, read side by side, the LSTM's state carried
from batch to batch. Each word is predicted once an epoch, the first one of the file from an end mark.

    file      a b c d e f g h i j k l m n o p
    row 0     a b c d | e              rows 0 and 1 are one word shorter than row 2: their last
    row 1     f g h i | j              window has a hole, which counts for nothing
    row 2     k l m n | o p
              batch 0 | batch 1

windows (window = 4, stride = 3): independent windows of `window` words every `stride` words, each from a zero state. The
first `window - 1` words of one are read, the last `window - 1` are predicted. Shuffled anew in each epoch.

    file      a b c d e f g h i j
    window 0  a b c d                  reads a b c, predicts b c d
    window 1        d e f g            reads d e f, predicts e f g
    window 2              g h i j

Shapes: G rows of the global batch, R rows of this rank, T words. This module does not know the model, nor where the ranks
run.
"""

from __future__ import annotations

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
    """Words to read, (R, T) int64."""
    targets: Tensor
    """The word after each, (R, T) int64; IGNORED where there is none."""
    tokens: int
    """Words predicted in the whole global batch."""
    fresh: bool
    """The state before this batch is zero."""

    def words(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Inputs and targets on a device; a GPU fetches them while it still computes the batch before."""
        if device.type == "cpu":
            return self.inputs, self.targets
        inputs, targets = (tensor.pin_memory().to(device, non_blocking=True) for tensor in (self.inputs, self.targets))
        return inputs, targets


class Folder:
    """A data folder: its facts, and its token files as memory-mapped arrays."""

    def __init__(self, path: Path) -> None:
        """Read all but the token files: a job must not learn after hours that the words are not there to be written."""
        check_folder(path, f"a data folder is expected: lmdist-prepare YOUR.csv -o {path} makes it")
        self.path = path
        self.meta = read_meta(path)
        files, words = self.meta["files"], (VOCABULARY, TEXT)
        verify_checksums(path, {name: files[name] for name in words if name in files}, words)
        WordTokenizer.load(path / TEXT)
        self.vocabulary_size = len(Vocabulary.load(path / VOCABULARY))
        if self.meta["vocabulary_size"] != self.vocabulary_size:
            raise DataError(f"{path}: vocab.txt has {self.vocabulary_size} words, meta.json {self.meta['vocabulary_size']}")

    def has(self, split: str) -> bool:
        """Whether the folder has this split."""
        return split in self.meta["splits"]

    def check_vocabulary(self, manifest: dict[str, Any]) -> None:
        """Raise DataError unless the folder has the words of the checkpoint whose manifest this is."""
        if self.meta["files"]["vocab.txt"]["sha256"] != manifest["files"]["vocab.txt"]["sha256"]:
            raise DataError(f"{self.path} has another vocabulary than the model: give the model's own by --data FOLDER")

    def tokens(self, split: str) -> np.ndarray:
        """The words of a split as ids, (tokens,) uint16 or uint32, read from the disk as they are asked for."""
        if not self.has(split):
            raise MissingInputError(f"{self.path} has no {split} split; it has {', '.join(self.meta['splits'])}")
        path = self.path / token_file(split)
        dtype = np.dtype(self.meta["dtype"]).newbyteorder("<")
        expected, size = self.meta["splits"][split]["tokens"], file_size(path)
        if size != expected * dtype.itemsize:
            raise DataError(f"{path} has {size} bytes; {expected} words of {dtype.itemsize} are expected")
        if not size:
            raise DataError(f"{path} is empty: prepare the folder anew from more text")
        try:
            tokens = np.memmap(path, dtype=dtype, mode="r")
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error}") from None
        # The whole file is read for this, as fast as the disk gives it, and stays in memory for the first epoch. Without it
        # an id that no word has would end a job on a GPU hours later, and in words that say nothing of the file.
        largest = int(tokens.max())
        if largest >= self.vocabulary_size:
            raise DataError(
                f"{path} is damaged: it has a word {largest}, and the vocabulary ends at {self.vocabulary_size - 1}"
            )
        return tokens


class Streams:
    """Global batches of G contiguous streams whose state is carried on."""

    def __init__(self, tokens: np.ndarray, rows: int, window: int) -> None:
        self.tokens = tokens
        self.window = window
        # Row g is tokens[bounds[g]:bounds[g + 1]]; the lengths differ by one at most.
        self.bounds = np.arange(rows + 1) * len(tokens) // rows
        self.longest = int(np.diff(self.bounds).max())
        self.steps_per_epoch = -(-self.longest // window)

    def batch(self, step: int, rows: slice) -> Batch:
        """Rows `rows` of global batch number `step`."""
        position = step % self.steps_per_epoch
        offset = position * self.window
        starts, ends = self.bounds[:-1] + offset, self.bounds[1:]
        length = min(self.window, self.longest - offset)
        return cut(self.tokens, starts, ends, length, rows, fresh=position == 0)


class Windows:
    """Global batches of G independent windows, shuffled by a permutation that takes no memory."""

    def __init__(self, tokens: np.ndarray, rows: int, window: int, stride: int, seed: int) -> None:
        self.tokens = tokens
        self.rows = rows
        self.window = window
        self.stride = stride or window - 1
        self.seed = seed
        self.count = 1 + max(0, -(-(len(tokens) - window) // self.stride))
        self.steps_per_epoch = -(-self.count // rows)

    def batch(self, step: int, rows: slice) -> Batch:
        """Rows `rows` of global batch number `step`."""
        epoch, position = divmod(step, self.steps_per_epoch)
        index = position * self.rows + np.arange(self.rows)
        there = index < self.count  # in the last batch of an epoch some rows may be empty
        window = permute(index % self.count, self.count, (self.seed, epoch))
        starts = window * self.stride + 1
        ends = np.where(there, np.minimum(starts - 1 + self.window, len(self.tokens)), 0)
        return cut(self.tokens, starts, ends, self.window - 1, rows, fresh=True)


def cut(tokens: np.ndarray, starts: np.ndarray, ends: np.ndarray, length: int, rows: slice, *, fresh: bool) -> Batch:
    """Cut rows `rows` out of a global batch whose row g predicts tokens[starts[g]:ends[g]], `length` at most."""
    total = int(np.clip(ends - starts, 0, length).sum())
    starts, ends = starts[rows, None], ends[rows, None]  # (R, 1)
    positions = starts + np.arange(-1, length)  # (R, T + 1): one word before the first that is predicted
    words = np.take(tokens, positions, mode="clip").astype(np.int64)
    words[positions < 0] = END_ID  # a file begins as if a document had just ended
    targets = np.where(positions[:, 1:] < ends, words[:, 1:], IGNORED)  # (R, T)
    return Batch(torch.from_numpy(words[:, :-1].copy()), torch.from_numpy(targets), total, fresh)


def permute(index: np.ndarray, size: int, key: tuple[int, int]) -> np.ndarray:
    """Where a permutation of range(size), chosen by `key`, sends each number of `index`.

    A Feistel network over the smallest even number of bits that holds `size`, applied again to whatever lands outside
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
    """Scramble 64-bit numbers (the finaliser of SplitMix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def training_batches(folder: Folder, settings: DataSettings, seed: int) -> Streams | Windows:
    """The batches that a recipe trains on; raises DataError where the text is too short for them."""
    tokens = folder.tokens("train")
    rows = settings.global_batch if settings.batching == "streams" else 1
    if len(tokens) < rows * settings.window:
        raise DataError(
            f"{folder.path} has {len(tokens):,} words to train on; {rows} row(s) of {settings.window} need "
            f"{rows * settings.window:,}: take more text, or lower --data.window or --data.global_batch"
        )
    if settings.batching == "streams":
        return Streams(tokens, settings.global_batch, settings.window)
    return Windows(tokens, settings.global_batch, settings.window, settings.stride, seed)

"""From a token file to this rank's part of global batch number s.

A batch is a pure function of (seed, s): the position in the data is one integer, whatever the number of ranks. Windows are
read from the token files when they are needed, and never written.

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

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lmdist.counted import counted
from lmdist.errors import DataError, MissingInputError
from lmdist.model.loss import IGNORED
from lmdist.perplexity import TextSize
from lmdist.settings import DataSettings
from lmdist.storage.checksums import verify_checksums, verify_sizes
from lmdist.storage.held import HeldFolder, read_held
from lmdist.storage.reading import MAX_JSON_BYTES
from lmdist.text.data_folder import META, TEXT, VOCABULARY, check_meta, read_block_sums, token_files
from lmdist.text.token_files import TokenFile, Tokens
from lmdist.text.tokenizer import WordTokenizer
from lmdist.text.vocabulary import END_ID, MAX_BYTES, Vocabulary


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
    """A data folder: its meta.json, tokenizer and vocabulary, and its token files, of which batches are read.

    All of it is read or held open from the start: a job goes on, and saves checkpoints of the words it began with, when the
    folder is removed or another one is put in its place.
    """

    def __init__(self, path: Path) -> None:
        """Read all but the token files."""
        self.path = path
        self.in_use: list[TokenFile] = []
        """The token files that are open."""
        read_held(path, self.open, f"a data folder is expected: lmdist-prepare YOUR.csv -o {path} writes it")

    def open(self, files: HeldFolder) -> None:
        """Read and check all but the token files."""
        self.files = files
        self.meta = check_meta(files.read_json(META), self.path / META)
        names = VOCABULARY, TEXT
        listed = {name: self.meta["files"][name] for name in names if name in self.meta["files"]}
        verify_sizes(files, listed, names)
        self.contents = {VOCABULARY: files.read(VOCABULARY, MAX_BYTES), TEXT: files.read(TEXT, MAX_JSON_BYTES)}
        """The vocabulary's and the tokenizer's files."""
        verify_checksums(files, listed)
        self.tokenizer = WordTokenizer.parse(self.contents[TEXT], self.path / TEXT)
        self.vocabulary = Vocabulary.parse(
            self.contents[VOCABULARY], self.path / VOCABULARY, self.meta["vocabulary_size"], "meta.json"
        )
        self.block_sums = read_block_sums(files, self.meta)

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

    def tokens(self, split: str) -> Tokens:
        """Return the tokens of a split; raise MissingInputError, or DataError where it cannot be read."""
        if not self.has(split):
            raise MissingInputError(f"{self.path} has no {split} split; it has {', '.join(self.meta['splits'])}")
        names, left, dtype = token_files(split, self.meta["files"]), self.meta["splits"][split]["tokens"], self.meta["dtype"]
        if not left:
            raise DataError(f"{self.path / names[0]} is empty: prepare the folder anew from more text")
        files = []
        for name in names:
            count = self.meta["files"][name]["bytes"] // np.dtype(dtype).itemsize if name != names[-1] else left
            files.append(TokenFile(self.files, name, dtype, count, self.vocabulary_size, self.block_sums.get(name)))
            left -= count
        self.in_use += files
        return Tokens(files)

    def text_size(self, split: str) -> TextSize | None:
        """Return the size of a split's original text, if the folder has counted it."""
        return TextSize.read(self.meta["splits"][split])

    def check_unchanged(self) -> None:
        """Raise DataError if a token file in use was written to since it was opened: batches would come from another text."""
        for file in self.in_use:
            file.check_unchanged(self.meta["files"][file.name]["sha256"])


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

    def __init__(self, tokens: Tokens | np.ndarray, global_batch: int, window: int) -> None:
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

    def __init__(self, tokens: Tokens | np.ndarray, global_batch: int, window: int, stride: int, seed: int) -> None:
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


def batch_of(
    tokens: Tokens | np.ndarray, starts: np.ndarray, ends: np.ndarray, length: int, part: slice, *, state_reset: bool
) -> Batch:
    """Return the sequences `part` of a global batch whose sequence g predicts tokens[starts[g]:ends[g]], `length` at most."""
    num_tokens = int(np.clip(ends - starts, 0, length).sum())
    starts, ends = starts[part], ends[part]  # (B)
    ids = np.empty((len(starts), length + 1), np.int64)
    for row, start in zip(ids, starts.tolist(), strict=True):
        copy_row(tokens, start - 1, row)  # from one token before the first that is predicted
    predicted = starts[:, None] + np.arange(length) < ends[:, None]  # (B, T)
    targets = np.where(predicted, ids[:, 1:], IGNORED)  # (B, T)
    return Batch(torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(targets), num_tokens, state_reset)


def copy_row(tokens: Tokens | np.ndarray, start: int, row: np.ndarray) -> None:
    """Fill a row with the tokens from `start` on; an end mark is before the first one, and the last one is repeated."""
    start = min(start, len(tokens) - 1)
    before = max(0, -start)
    found = tokens[start + before : start + len(row)]
    row[:before] = END_ID  # a file begins as if a document had just ended
    row[before : before + len(found)] = found
    row[before + len(found) :] = found[-1]


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
            f"{folder.path} has {len(tokens):,} tokens to train on; {counted(num_sequences, 'sequence')} "
            f"of {settings.window} need {num_sequences * settings.window:,}: "
            "take more text, or lower --data.window or --data.global_batch"
        )
    if settings.batching == "streams":
        return Streams(tokens, settings.global_batch, settings.window)
    return Windows(tokens, settings.global_batch, settings.window, settings.stride, seed)

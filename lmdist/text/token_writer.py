"""`encode`, the last of three steps: each shard becomes its part of the token files: train.bin, valid.bin and test.bin.

    write_token_files(folder, corpus, corpus.split(0.05, 0.05), len(vocabulary), run)       # calls encode(shard, ...) for each

Each part has its place in the files, so the shards are encoded in any order, and the bytes are those of one process. Memory
holds the vocabulary, the words of a shard and blocks of a fixed size. This module does not know who runs the functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from functools import cache
from itertools import repeat
from pathlib import Path

import numpy as np

from lmdist.settings import SPLITS
from lmdist.text import data_folder
from lmdist.text.corpus import Corpus, Run
from lmdist.text.data_folder import VOCABULARY, Dtype, SplitFacts, dtype_of, token_file
from lmdist.text.shard_files import blocks, words_of_shard
from lmdist.text.vocabulary import END_ID, UNKNOWN_ID, Vocabulary


def write_token_files(
    folder: Path, corpus: Corpus, splits: np.ndarray, vocabulary_size: int, run: Run
) -> dict[str, SplitFacts]:
    """Write the token file of each split that has documents, <eos> after each; return the facts of each.

    `splits` are those of `Corpus.split`; the vocabulary must be in the folder.
    """
    name = dtype_of(vocabulary_size)
    lengths = corpus.documents["length"]
    sizes = {}
    facts: dict[str, SplitFacts] = {}
    for index, split in enumerate(SPLITS):
        in_split = splits == index
        tokens, documents = int((lengths + 1)[in_split].sum()), int(np.count_nonzero(in_split))
        if documents:
            sizes[split] = 0
            facts[split] = {
                "tokens": tokens,
                "documents": documents,
                "original_words": corpus.sum("original_words", in_split),
                "bytes": corpus.sum("bytes", in_split),
                "unknown_tokens": 0,
                "unknown_rate": 0.0,
            }
            size = tokens * np.dtype(name).itemsize
            for number, begin in enumerate(range(0, size, data_folder.FILE_BYTES)):
                with (folder / token_file(split, number)).open("wb") as file:
                    file.truncate(min(data_folder.FILE_BYTES, size - begin))

    def tasks() -> Iterator[tuple[Path, Path, Dtype, np.ndarray, dict[str, int], int]]:
        for shard, of_shard in zip(corpus.shards, corpus.slices, strict=True):
            yield shard, folder, name, splits[of_shard], dict(sizes), data_folder.FILE_BYTES
            for split in sizes:
                in_split = splits[of_shard] == SPLITS.index(split)
                sizes[split] += int((lengths[of_shard] + 1)[in_split].sum())

    try:
        for unknown in run(encode, tasks()):
            for split, number in unknown.items():
                facts[split]["unknown_tokens"] += number
    finally:
        ids_in.cache_clear()  # that of this process; a worker's ends with it
    for found in facts.values():
        found["unknown_rate"] = found["unknown_tokens"] / max(1, found["tokens"])
    return facts


@cache
def ids_in(folder: Path) -> dict[str, int]:
    """Return the ids of a folder's vocabulary, which a process loads once, and not for each shard."""
    return Vocabulary.load(folder / VOCABULARY).ids


def encode(
    shard: Path, folder: Path, dtype: Dtype, splits: np.ndarray, begins: dict[str, int], file_bytes: int
) -> dict[str, int]:
    """Write a shard's part of each split, which begins at a token; return the number of unknown words in each.

    `splits` are those of its documents, (documents,). The files and the vocabulary must be in the folder.
    """
    stored = np.dtype(dtype).newbyteorder("<")
    words = words_of_shard(shard)
    final_ids = np.fromiter(map(ids_in(folder).get, words, repeat(UNKNOWN_ID)), stored, len(words))
    unknown = dict.fromkeys(begins, 0)
    with ExitStack() as stack:
        files = {
            split: stack.enter_context(closing(SplitWriter(folder, split, begin * stored.itemsize, file_bytes)))
            for split, begin in begins.items()
        }
        for documents, lengths, tokens in blocks(shard):
            for split, file in files.items():
                wanted = splits[documents] == SPLITS.index(split)
                ends = np.cumsum(lengths[wanted] + 1) - 1
                block = np.empty(int(ends[-1]) + 1 if len(ends) else 0, dtype=stored)
                is_word = np.ones(len(block), dtype=bool)
                is_word[ends] = False
                block[is_word] = final_ids[tokens[np.repeat(wanted, lengths)]]
                block[ends] = END_ID
                file.write(block.tobytes())
                unknown[split] += int(np.count_nonzero(block == UNKNOWN_ID))
    return unknown


class SplitWriter:
    """Writes the bytes of a split from a place on into its token files, which exist and have `file_bytes` each, or the rest."""

    def __init__(self, folder: Path, split: str, place: int, file_bytes: int) -> None:
        self.folder = folder
        self.split = split
        self.place = place
        self.file_bytes = file_bytes
        self.number = -1
        """Of the file that is open."""

    def write(self, data: bytes) -> None:
        """Write at the place, which is then behind it."""
        while data:
            number, begin = divmod(self.place, self.file_bytes)
            if number != self.number:
                self.close()
                self.file = (self.folder / token_file(self.split, number)).open("r+b")
                self.file.seek(begin)
                self.number = number
            size = min(len(data), self.file_bytes - begin)
            self.file.write(data[:size])
            self.place += size
            data = data[size:]

    def close(self) -> None:
        """Close the file that is open."""
        if self.number >= 0:
            self.file.close()

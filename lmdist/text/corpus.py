"""The documents of all shards as one corpus: what comes twice is left out, and each document gets its split.

    corpus = Corpus(shards, keep_empty=False)
    splits = corpus.split(0.05, 0.05)
    vocabulary = vocabulary_of(corpus.counts(splits, run), min_count=2)     # the words of the train split

Shards lie in the order of the input, so the first of two equal texts is the one that one process would have met first. What is
decided here depends on the documents and on their order alone: neither on the number of shards nor on who has counted them,
and the same text gives the same bytes. Memory holds the distinct words, 42 bytes a document (80 for the moment in which
duplicates are looked for), the words of the shards that are at work, and blocks of a fixed size. This module does not know file
formats, nor how text is tokenized.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, repeat
from operator import add
from pathlib import Path
from typing import Any

import numpy as np

from lmdist.counted import counted
from lmdist.errors import CONTROLS, DataError
from lmdist.text.counting import UNTOKENIZABLE
from lmdist.text.documents import DUPLICATE, EMPTY
from lmdist.text.shard_files import DOCUMENT, DOCUMENTS, GAVE_UP, TO_CHOOSE, WORDS, blocks, words_of_shard
from lmdist.text.vocabulary import END, UNKNOWN, Vocabulary

NO_SPLIT = 255
"""In place of an index in SPLITS: the document is left out."""

Run = Callable[[Callable[..., Any], Iterable[tuple[Any, ...]]], Iterator[Any]]
"""Calls a function with each of several tuples of arguments, here or in worker processes; yields the results in order."""


class Corpus:
    """The documents of all shards, and which of them are kept."""

    def __init__(self, shards: Sequence[Path], *, keep_empty: bool) -> None:
        """`keep_empty` holds for documents without a word."""
        self.shards = shards
        sizes = [(shard / DOCUMENTS).stat().st_size // DOCUMENT.itemsize for shard in shards]
        self.slices = [slice(end - size, end) for end, size in zip(accumulate(sizes), sizes, strict=True)]
        """Where the documents of each shard lie."""
        self.documents = np.empty(sum(sizes), DOCUMENT)
        for shard, of_shard in zip(shards, self.slices, strict=True):
            self.documents[of_shard] = np.fromfile(shard / DOCUMENTS, DOCUMENT)
        lengths = self.documents["length"]
        is_new = first_ones(self.documents)
        gave_up = is_new & (lengths == GAVE_UP)
        empty = is_new & (lengths == 0) & (not keep_empty)
        self.is_kept = is_new & ~gave_up & ~empty
        """(documents,)"""
        counts = {DUPLICATE: ~is_new, UNTOKENIZABLE: gave_up, EMPTY: empty}
        self.skipped = Counter({reason: int(np.count_nonzero(mask)) for reason, mask in counts.items() if mask.any()})
        """Documents that are left out, by reason."""
        self.tokens = int(lengths[self.is_kept].sum())

    def split(self, valid_fraction: float, test_fraction: float, advice: str = "") -> np.ndarray:
        """Return the split of each document: its index in SPLITS, or NO_SPLIT, (documents,) uint8.

        It is the one that was given, or is chosen by the hash of the document's group. Raises DataError where there are too few
        of them; `advice` ends the message: what else could be done.
        """
        given = self.documents["split"]
        if (given != TO_CHOOSE).all():
            return np.where(self.is_kept, given, NO_SPLIT).astype(np.uint8)
        keys = self.documents["key"]
        groups = np.unique(keys[self.is_kept])  # sorted by the hash: the first are valid, the next test
        valid, test = (max(1, round(share * len(groups))) if share else 0 for share in (valid_fraction, test_fraction))
        if valid + test >= len(groups):
            raise DataError(
                f"{counted(len(groups), 'document or group is', 'documents or groups are')} too few "
                f"to hold back {valid} for valid and {test} for test: take more text, "
                f"or --valid-fraction 0 --test-fraction 0{advice}"
            )
        place = np.searchsorted(groups, keys)
        chosen = np.where(place < valid, 1, np.where(place < valid + test, 2, 0))
        return np.where(self.is_kept, chosen, NO_SPLIT).astype(np.uint8)

    def counts(self, splits: np.ndarray, run: Run) -> dict[str, int]:
        """Return how often each word stands in the train split, 0 for one of the others, in order of first occurrence."""
        counts: dict[str, int] = {}
        tasks = ((shard, splits[of_shard] == 0) for shard, of_shard in zip(self.shards, self.slices, strict=True))
        for shard, found in zip(self.shards, run(count_words, tasks), strict=True):
            words = words_of_shard(shard)
            counts.update(zip(words, map(add, map(counts.get, words, repeat(0)), found.tolist()), strict=True))
        return counts

    def sum(self, name: str, mask: np.ndarray) -> int:
        """Return the sum of a field of DOCUMENT over the documents of a `mask` (documents,)."""
        return int(self.documents[name][mask].sum(dtype=np.int64))


def vocabulary_of(counts: Mapping[str, int], min_count: int, size: int = 0, *, own_unknown: bool = False) -> Vocabulary:
    """Return the words of the train split by falling frequency, those of the same frequency in alphabetical order.

    `counts` are those of `Corpus.counts`. `own_unknown`: the text marks its unknown words as <unk> itself; raise DataError
    where it does not.
    """
    if own_unknown and not counts.get(UNKNOWN):
        raise DataError(f"unknown is file, and the text to train on has no {UNKNOWN}: leave it out, or take text with it")
    words = sorted(word for word, count in counts.items() if count >= min_count and word not in (UNKNOWN, END))
    words.sort(key=counts.__getitem__, reverse=True)  # stable, also in reverse
    words = [word for word in words if not CONTROLS.search(word)]
    return Vocabulary([UNKNOWN, END, *(words[: size - 2] if size else words)])


def first_ones(documents: np.ndarray) -> np.ndarray:
    """Return which documents are not duplicates of one before them in the same split, (documents,) bool."""
    is_first = documents["is_new"].copy()
    for split in np.unique(documents["split"]):
        places = np.flatnonzero(~documents["is_new"] & (documents["split"] == split))
        _, first = np.unique(documents["digest"][places], return_index=True)
        is_first[places[first]] = True
    return is_first


def count_words(shard: Path, is_counted: np.ndarray) -> np.ndarray:
    """Return how often each word of a shard stands in the documents of a mask, (words,) int64."""
    counts = np.zeros((shard / WORDS).read_bytes().count(b"\n"), dtype=np.int64)
    for documents, lengths, tokens in blocks(shard):
        counts += np.bincount(tokens[np.repeat(is_counted[documents], lengths)], minlength=len(counts))
    return counts

"""The words of a corpus as numbers in a file: first in the order in which they come, at last by frequency.

    documents ---> words, found by worker processes ---> spool: numbers in the order in which words first come
                                                             |  now the splits are known, and the counts of the train split
    train.bin  valid.bin  test.bin <-------------------------+  numbers by falling frequency in the train split

The text is read once. What grows with it lies on the disk; in memory are the words that are different, 20 bytes a document,
and blocks of a fixed size. Neither the order of the input nor the number of workers changes which split a document goes to.
This module does not know files of documents, nor how words are found.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
from array import array
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lmdist.errors import DataError
from lmdist.settings import SPLITS
from lmdist.text.documents import EMPTY, Documents
from lmdist.text.readers import Document
from lmdist.text.tokenizer import WordTokenizer
from lmdist.text.vocabulary import END, END_ID, UNKNOWN, UNKNOWN_ID, Vocabulary

UNTOKENIZABLE = "untokenizable"

CHUNK_CHARACTERS = 200_000  # what a worker gets at a time: a twentieth of a second
BLOCK_TOKENS = 1 << 20  # what is counted and renumbered at a time: some 20 MB


class Chunk(NamedTuple):
    """The words of a few documents, one after the other."""

    words: list[str]
    """The different ones."""
    ids: np.ndarray
    """Where in `words` each word of the text is, (tokens,) uint32."""
    lengths: list[int]
    """Words of each document; -1 where they could not be found."""


def find_words(texts: list[str], tokenizer: WordTokenizer) -> Chunk:
    """Tokenise a few documents."""
    ids: defaultdict[str, int] = defaultdict(count().__next__)  # a word that is asked for the first time gets the next one
    flat: list[int] = []
    lengths = []
    for text in texts:
        try:
            words = tokenizer.tokenize(text)
        except DataError:
            lengths.append(-1)
        else:
            flat.extend(map(ids.__getitem__, words))
            lengths.append(len(words))
    return Chunk(list(ids), np.array(flat, dtype=np.uint32), lengths)


# --- worker processes ----------------------------------------------------------------------------------------------

worker_tokenizer: WordTokenizer


def start_worker(text_json: Path) -> None:
    """Read the tokenizer, leave Ctrl-C to the parent, and do not outlive it: a pool's workers would wait for ever."""
    global worker_tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    worker_tokenizer = WordTokenizer.load(text_json)


def find_words_in_worker(texts: list[str]) -> Chunk:
    """Tokenise a few documents with the tokenizer of this process."""
    return find_words(texts, worker_tokenizer)


def in_order(chunks: Iterable[tuple[Any, list[str]]], text_json: Path, workers: int) -> Iterator[tuple[Any, Chunk]]:
    """The words of chunks, in the order of the chunks, each with what came beside it; few chunks are read ahead."""
    if workers == 1:
        tokenizer = WordTokenizer.load(text_json)
        for beside, texts in chunks:
            yield beside, find_words(texts, tokenizer)
        return
    # Not fork: the caller may be a training process with the threads of torch in it.
    context = multiprocessing.get_context("spawn")
    pending: deque[tuple[Any, Future[Chunk]]] = deque()
    with ExitStack() as stack:
        pool = ProcessPoolExecutor(workers, context, start_worker, (text_json,))
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        try:
            for beside, texts in chunks:
                pending.append((beside, pool.submit(find_words_in_worker, texts)))
                if len(pending) > 3 * workers:
                    beside, future = pending.popleft()
                    yield beside, future.result()
            for beside, future in pending:
                yield beside, future.result()
        except BrokenProcessPool:
            raise DataError("a worker process was killed, most likely for want of memory: take fewer --workers") from None


# --- the corpus ----------------------------------------------------------------------------------------------------


class Corpus:
    """The documents as numbers, and which of them go together."""

    def __init__(self, spool: Path, seed: int) -> None:
        self.spool = spool
        self.seed = seed
        self.ids: dict[str, int] = {}
        """Each word, and its number in the spool."""
        self.lengths = array("Q")
        """Words of each document."""
        self.keys = array("Q")
        """Documents with the same key belong together: their split, where it was given, or else a hash."""
        self.tokens = 0
        self.skipped: Counter[str] = Counter()

    def read(
        self,
        documents: Documents,
        split: str,
        text_json: Path,
        workers: int,
        *,
        keep_empty: bool,
        tell: Callable[[int], None],
    ) -> None:
        """Append the words of documents; `split` is the one they are for, or "" where `split_by_key` chooses.

        `tell` is called from time to time with the bytes whose words are there.
        """
        with self.spool.open("ab") as spool:
            for (keys, bytes_read), chunk in in_order(self.chunks(documents, split), text_json, workers):
                numbers = [self.ids.setdefault(word, len(self.ids)) for word in chunk.words]
                spool.write(np.array(numbers, dtype="<u4")[chunk.ids].tobytes())
                self.tokens += len(chunk.ids)
                for key, length in zip(keys, chunk.lengths, strict=True):
                    if length > 0 or (length == 0 and keep_empty):
                        self.lengths.append(length)
                        self.keys.append(key)
                    else:
                        self.skipped[EMPTY if length == 0 else UNTOKENIZABLE] += 1
                tell(bytes_read)

    def chunks(self, documents: Documents, split: str) -> Iterator[tuple[tuple[list[int], int], list[str]]]:
        """Some documents at a time: their keys, the bytes read so far, their texts."""
        keys: list[int] = []
        texts: list[str] = []
        characters = 0
        for document in documents:
            keys.append(SPLITS.index(split) if split else self.key(document))
            texts.append(document.text)
            characters += len(document.text) + 1
            if characters >= CHUNK_CHARACTERS:
                yield (keys, documents.bytes_read), texts
                keys, texts, characters = [], [], 0
        if texts:
            yield (keys, documents.bytes_read), texts

    def key(self, document: Document) -> int:
        """A hash of the seed and of the group; a document without one is its own group."""
        name = f"text {document.text}" if document.group is None else f"group {document.group}"
        digest = hashlib.blake2b(name.encode(), digest_size=8, salt=self.seed.to_bytes(16, "little", signed=True))
        return int.from_bytes(digest.digest())

    def given_splits(self) -> np.ndarray:
        """The split of each document, where all were given: its place in SPLITS, (documents,)."""
        return np.array(self.keys, dtype=np.uint8)

    def split_by_key(self, valid_fraction: float, test_fraction: float) -> np.ndarray:
        """The split of each document: its place in SPLITS, (documents,); raises DataError where there are too few."""
        keys = np.array(self.keys, dtype=np.uint64)
        groups = np.unique(keys)  # sorted by the hash: the first validate, the next test
        valid, test = (max(1, round(share * len(groups))) if share else 0 for share in (valid_fraction, test_fraction))
        if valid + test >= len(groups):
            raise DataError(
                f"{len(groups)} document(s) or group(s) are too few to hold back {valid} for valid and {test} for test: "
                "take more text, or --valid-fraction 0 --test-fraction 0"
            )
        place = np.searchsorted(groups, keys)
        return np.where(place < valid, 1, np.where(place < valid + test, 2, 0)).astype(np.uint8)

    def blocks(self) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """Some documents at a time: which, their lengths, and their words as numbers of the spool."""
        lengths = np.array(self.lengths, dtype=np.int64)
        ends = np.cumsum(lengths)
        first = 0
        with self.spool.open("rb") as spool:
            while first < len(lengths):
                before = int(ends[first - 1]) if first else 0
                last = max(first + 1, int(np.searchsorted(ends, before + BLOCK_TOKENS, side="right")))
                # At most so many documents too: blank lines have no words.
                last = min(last, first + BLOCK_TOKENS)
                yield slice(first, last), lengths[first:last], np.fromfile(spool, "<u4", int(ends[last - 1]) - before)
                first = last

    def vocabulary(self, splits: np.ndarray, min_count: int, size: int, *, own_unknown: bool) -> Vocabulary:
        """The words of the train split by falling frequency, those with the same by the alphabet."""
        counts = np.zeros(len(self.ids), dtype=np.int64)
        for documents, lengths, tokens in self.blocks():
            counts += np.bincount(tokens[np.repeat(splits[documents] == 0, lengths)], minlength=len(counts))
        if own_unknown and not (UNKNOWN in self.ids and counts[self.ids[UNKNOWN]]):
            raise DataError(f"unknown is file, and the text to train on has no {UNKNOWN}: leave it out, or bring such a text")
        kept = [(-int(counts[number]), word) for word, number in self.ids.items() if counts[number] >= min_count]
        words = [word for _, word in sorted(kept) if word not in (UNKNOWN, END)]
        return Vocabulary([UNKNOWN, END, *(words[: size - 2] if size else words)])

    def write(self, path: Path, documents_of_split: np.ndarray, vocabulary: Vocabulary, dtype: str) -> dict[str, Any]:
        """Write the documents of a split, an end mark after each; gives their figures."""
        numbers = np.fromiter((vocabulary.ids.get(word, UNKNOWN_ID) for word in self.ids), dtype=dtype, count=len(self.ids))
        written = documents_written = unknown = 0
        with path.open("wb") as file:
            for documents, lengths, tokens in self.blocks():
                wanted = documents_of_split[documents]
                ends = np.cumsum(lengths[wanted] + 1) - 1
                block = np.empty(int(ends[-1]) + 1 if len(ends) else 0, dtype=dtype)
                is_word = np.ones(len(block), dtype=bool)
                is_word[ends] = False
                block[is_word] = numbers[tokens[np.repeat(wanted, lengths)]]
                block[ends] = END_ID
                file.write(block.tobytes())
                written += len(block)
                documents_written += len(ends)
                unknown += int(np.count_nonzero(block == UNKNOWN_ID))
        return {
            "tokens": written,
            "documents": documents_written,
            "unknown_tokens": unknown,
            "unknown_rate": unknown / max(1, written),
        }

"""The tokens of a corpus on the disk: first with temporary ids, then with ids by frequency, split by split.

    documents ---> words, found by worker processes ---> temporary token file: ids in order of first occurrence
                                                             |  now the splits are known, and the counts of the train split
    train.bin  valid.bin  test.bin <-------------------------+  ids by falling frequency in the train split

The text is read once. What grows with it lies on the disk; memory holds the distinct words, 20 bytes a document, and blocks
of a fixed size. Neither the order of the input nor the number of workers changes which split a document goes to. This
module does not know file formats, nor how text is tokenized.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
from array import array
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lmdist.errors import CONTROLS, DataError
from lmdist.settings import SPLITS
from lmdist.text.data_folder import SplitFacts, dtype_of
from lmdist.text.documents import EMPTY, Documents
from lmdist.text.readers import Document
from lmdist.text.tokenizer import WordTokenizer
from lmdist.text.vocabulary import END, END_ID, UNKNOWN, UNKNOWN_ID, Vocabulary

UNTOKENIZABLE = "untokenizable"

CHUNK_CHARACTERS = 200_000  # what a worker tokenizes at a time: a twentieth of a second
BLOCK_TOKENS = 1 << 20  # what is counted and given its ids at a time: some 20 MB


class Chunk(NamedTuple):
    """A few documents, with their keys (see `Corpus.keys`) and the bytes read up to them."""

    texts: list[str]
    keys: list[int]
    bytes_read: int


class Tokenized(NamedTuple):
    """The words of a few documents, one after the other."""

    words: list[str]
    """The distinct ones."""
    ids: np.ndarray
    """The index in `words` of each word of the text, (tokens,) uint32."""
    lengths: list[int]
    """Words of each document; -1 where the tokenizer gave up."""


def tokenize(texts: list[str], tokenizer: WordTokenizer) -> Tokenized:
    """Tokenize a few documents."""
    ids: defaultdict[str, int] = defaultdict(count().__next__)  # a new word gets the next id
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
    return Tokenized(list(ids), np.array(flat, dtype=np.uint32), lengths)


def why_skipped(length: int, *, keep_empty: bool) -> str | None:
    """Return why a document with so many words, of those in `Tokenized.lengths`, is not in the corpus, if it is not."""
    if length < 0:
        return UNTOKENIZABLE
    return EMPTY if length == 0 and not keep_empty else None


class FoundIds(NamedTuple):
    """Documents as ids of a vocabulary that exists, as a data folder would have them."""

    tokens: np.ndarray
    """(N) uint32"""
    documents: int
    skipped: dict[str, int]
    """Rows without a document, by reason."""


def find_ids(documents: Documents, tokenizer: WordTokenizer, vocabulary: Vocabulary) -> FoundIds:
    """Return the ids of documents, an end mark after each; all are held in memory."""
    ids = array("I")
    num_documents = 0
    skipped: Counter[str] = Counter()
    for document in documents:
        found = tokenize([document.text], tokenizer)
        if reason := why_skipped(found.lengths[0], keep_empty=tokenizer.settings.line_by_line):
            skipped[reason] += 1
        else:
            ids.frombytes(np.array(vocabulary.encode(found.words), dtype=np.uint32)[found.ids].tobytes())
            ids.append(END_ID)
            num_documents += 1
    return FoundIds(np.array(ids, dtype=np.uint32), num_documents, dict(sorted((documents.skipped + skipped).items())))


# --- worker processes ----------------------------------------------------------------------------------------------

worker_tokenizer: WordTokenizer


def start_worker(text_json: Path) -> None:
    """Load the tokenizer, leave Ctrl-C to the parent, and exit with it: a pool's workers would wait forever."""
    global worker_tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    worker_tokenizer = WordTokenizer.load(text_json)


def tokenize_in_worker(texts: list[str]) -> Tokenized:
    """Tokenize a few documents with the tokenizer of this process."""
    return tokenize(texts, worker_tokenizer)


def tokenized(chunks: Iterable[Chunk], text_json: Path, workers: int) -> Iterator[tuple[Chunk, Tokenized]]:
    """Yield each chunk and its words, in order; few chunks are read ahead."""
    if workers == 1:
        tokenizer = WordTokenizer.load(text_json)
        for chunk in chunks:
            yield chunk, tokenize(chunk.texts, tokenizer)
        return
    # Not fork: the caller may be a training process with torch's threads in it.
    context = multiprocessing.get_context("spawn")
    pending: deque[tuple[Chunk, Future[Tokenized]]] = deque()
    with ExitStack() as stack:
        pool = ProcessPoolExecutor(workers, context, start_worker, (text_json,))
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        try:
            for chunk in chunks:
                pending.append((chunk, pool.submit(tokenize_in_worker, chunk.texts)))
                if len(pending) > 3 * workers:
                    first, future = pending.popleft()
                    yield first, future.result()
            for chunk, future in pending:
                yield chunk, future.result()
        except BrokenProcessPool:
            raise DataError("a worker process was killed, most likely out of memory: lower --workers") from None


# --- the corpus ----------------------------------------------------------------------------------------------------


class Corpus:
    """The documents as temporary ids in a file, and which of them belong together."""

    def __init__(self, temporary_file: Path, seed: int) -> None:
        self.temporary_file = temporary_file
        self.seed = seed
        self.ids: dict[str, int] = {}
        """Each word and its temporary id."""
        self.lengths = array("Q")
        """Tokens of each document."""
        self.keys = array("Q")
        """Documents with the same key belong together: the index of a given split, or else a hash."""
        self.tokens = 0
        self.skipped: Counter[str] = Counter()
        """Documents without a word, by reason."""

    def read(self, documents: Documents, split: str, text_json: Path, workers: int, *, keep_empty: bool) -> Iterator[int]:
        """Append the tokens of documents chunk by chunk; yield the bytes read after each.

        `split` is the one that the documents are for, or "" where `split_by_key` will choose.
        """
        with self.temporary_file.open("ab") as file:
            for chunk, found in tokenized(self.chunks(documents, split), text_json, workers):
                ids = [self.ids.setdefault(word, len(self.ids)) for word in found.words]
                file.write(np.array(ids, dtype="<u4")[found.ids].tobytes())
                self.tokens += len(found.ids)
                for key, length in zip(chunk.keys, found.lengths, strict=True):
                    if reason := why_skipped(length, keep_empty=keep_empty):
                        self.skipped[reason] += 1
                    else:
                        self.lengths.append(length)
                        self.keys.append(key)
                yield chunk.bytes_read

    def chunks(self, documents: Documents, split: str) -> Iterator[Chunk]:
        """Yield some documents at a time."""
        texts: list[str] = []
        keys: list[int] = []
        characters = 0
        for document in documents:
            texts.append(document.text)
            keys.append(SPLITS.index(split) if split else self.key(document))
            characters += len(document.text) + 1
            if characters >= CHUNK_CHARACTERS:
                yield Chunk(texts, keys, documents.bytes_read)
                texts, keys, characters = [], [], 0
        if texts:
            yield Chunk(texts, keys, documents.bytes_read)

    def key(self, document: Document) -> int:
        """Return a hash of the seed and of the group; a document without a group is its own."""
        name = f"text {document.text}" if document.group is None else f"group {document.group}"
        digest = hashlib.blake2b(name.encode(), digest_size=8, salt=self.seed.to_bytes(16, "little", signed=True))
        return int.from_bytes(digest.digest())

    def given_splits(self) -> np.ndarray:
        """Return the split of each document, where all were given: its index in SPLITS, (documents,)."""
        return np.array(self.keys, dtype=np.uint8)

    def split_by_key(self, valid_fraction: float, test_fraction: float, advice: str = "") -> np.ndarray:
        """Return the split of each document: its index in SPLITS, (documents,); raise DataError where there are too few.

        `advice` ends the message: what else could be done.
        """
        keys = np.array(self.keys, dtype=np.uint64)
        groups = np.unique(keys)  # sorted by the hash: the first are valid, the next test
        valid, test = (max(1, round(share * len(groups))) if share else 0 for share in (valid_fraction, test_fraction))
        if valid + test >= len(groups):
            raise DataError(
                f"{len(groups)} document(s) or group(s) are too few to hold back {valid} for valid and {test} for test: "
                f"take more text, or --valid-fraction 0 --test-fraction 0{advice}"
            )
        place = np.searchsorted(groups, keys)
        return np.where(place < valid, 1, np.where(place < valid + test, 2, 0)).astype(np.uint8)

    def blocks(self) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """Yield some documents at a time: which, their lengths, and their temporary ids."""
        lengths = np.array(self.lengths, dtype=np.int64)
        ends = np.cumsum(lengths)
        first = 0
        with self.temporary_file.open("rb") as file:
            while first < len(lengths):
                before = int(ends[first - 1]) if first else 0
                last = max(first + 1, int(np.searchsorted(ends, before + BLOCK_TOKENS, side="right")))
                # The number of documents is limited too: blank lines have no tokens.
                last = min(last, first + BLOCK_TOKENS)
                yield slice(first, last), lengths[first:last], np.fromfile(file, "<u4", int(ends[last - 1]) - before)
                first = last

    def vocabulary(self, splits: np.ndarray, min_count: int, size: int, *, own_unknown: bool) -> Vocabulary:
        """Return the words of the train split by falling frequency, those of the same frequency in alphabetical order.

        `own_unknown`: the text marks its unknown words as <unk> itself; raise DataError where it does not.
        """
        counts = np.zeros(len(self.ids), dtype=np.int64)
        for documents, lengths, tokens in self.blocks():
            counts += np.bincount(tokens[np.repeat(splits[documents] == 0, lengths)], minlength=len(counts))
        if own_unknown and not (UNKNOWN in self.ids and counts[self.ids[UNKNOWN]]):
            raise DataError(f"unknown is file, and the text to train on has no {UNKNOWN}: leave it out, or take text with it")
        kept = [(-int(counts[number]), word) for word, number in self.ids.items() if counts[number] >= min_count]
        words = [word for _, word in sorted(kept) if word not in (UNKNOWN, END) and not CONTROLS.search(word)]
        return Vocabulary([UNKNOWN, END, *(words[: size - 2] if size else words)])

    def write(self, path: Path, in_split: np.ndarray, vocabulary: Vocabulary) -> SplitFacts:
        """Write the token file of a split, <eos> after each document; `in_split` is a mask, (documents,)."""
        dtype = np.dtype(dtype_of(len(vocabulary))).newbyteorder("<")
        final_ids = np.fromiter((vocabulary.ids.get(word, UNKNOWN_ID) for word in self.ids), dtype=dtype, count=len(self.ids))
        num_tokens = num_documents = num_unknown = 0
        with path.open("wb") as file:
            for documents, lengths, tokens in self.blocks():
                wanted = in_split[documents]
                ends = np.cumsum(lengths[wanted] + 1) - 1
                block = np.empty(int(ends[-1]) + 1 if len(ends) else 0, dtype=dtype)
                is_word = np.ones(len(block), dtype=bool)
                is_word[ends] = False
                block[is_word] = final_ids[tokens[np.repeat(wanted, lengths)]]
                block[ends] = END_ID
                file.write(block.tobytes())
                num_tokens += len(block)
                num_documents += len(ends)
                num_unknown += int(np.count_nonzero(block == UNKNOWN_ID))
        return {
            "tokens": num_tokens,
            "documents": num_documents,
            "unknown_tokens": num_unknown,
            "unknown_rate": num_unknown / max(1, num_tokens),
        }

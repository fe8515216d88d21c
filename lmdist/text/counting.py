"""`count`, the first of three steps: a part of the documents is read, tokenized and counted, and lies on the disk as a shard.

    count(folder, cut(sources, 3, 16), seed, lambda: tokenizer)     # the fourth of sixteen shards, into an empty folder

The text is read once. What grows with it lies on the disk; memory holds the distinct words and the hash of each text. A text
that comes twice in a shard is counted once; corpus.py merges the shards and finds those that come in two. This module does not
know file formats, nor how text is tokenized, nor who else counts.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from itertools import accumulate, pairwise
from itertools import count as count_from
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lmdist.errors import DataError
from lmdist.perplexity import TextSize
from lmdist.settings import SPLITS
from lmdist.storage.reading import write_json
from lmdist.text.data_folder import TEXT
from lmdist.text.documents import EMPTY, Documents
from lmdist.text.rows import Document
from lmdist.text.shard_files import DOCUMENTS, GAVE_UP, PACK_DOCUMENT, READ, TO_CHOOSE, TOKENS, WORDS
from lmdist.text.sources import size_of
from lmdist.text.tokenizer import WordTokenizer
from lmdist.text.vocabulary import END_ID, Vocabulary

Sources = Mapping[str, Documents]
"""The documents of each given split, or of the inputs under the name ""."""

UNTOKENIZABLE = "untokenizable"
"""Why a document is left out that the tokenizer gives up."""
SKIPPING = 0.075
"""What it costs to skip a byte, beside counting it."""
BYTES_OF_START = 5_000_000
"""So many are counted while one process learns where sentences end, and the others skip what is not theirs."""
CHUNK_CHARACTERS = 200_000
"""Characters between two reports: a tenth of a second."""
BUFFERED_TOKENS = 1 << 17

Report = Callable[[int, int, int], None]
"""Is told how many bytes were read of a shard, and how many documents and tokens they had."""


def cut(sources: Sources, index: int, number: int) -> Sources:
    """Return what one of `number` shards reads, those with the same number of bytes."""
    if number == 1:
        return sources
    total = sum(documents.bytes for documents in sources.values())
    return between(sources, total * index // number, total * (index + 1) // number if index + 1 < number else total + 1)


def cut_evenly(sources: Sources, number: int) -> list[Sources]:
    """Return what each of `number` processes reads that begin at the same time, so that they end at the same time."""
    if number == 1:
        return [sources]
    sizes = [size_of(file) for documents in sources.values() for file in documents.files]
    begins, total = [0, *accumulate(sizes)], sum(sizes)

    def ends(time: int) -> list[int]:
        """Return where each part ends if each process has so much time, in bytes that it would count in it."""
        found = [0]
        for _ in range(number):
            skipped = found[-1] - begins[bisect_right(begins, found[-1]) - 1]
            found.append(found[-1] + max(0, time - max(BYTES_OF_START, int(SKIPPING * skipped))))
        return found

    time = bisect_left(range(2 * total + BYTES_OF_START * number), total, key=lambda time: ends(time)[-1])
    cuts = [*ends(time)[:-1], total + 1]
    return [between(sources, start, stop) for start, stop in pairwise(cuts)]


def between(sources: Sources, start: int, stop: int) -> Sources:
    """Return the part of the sources between two bytes of all of them together."""
    before = 0
    parts = {}
    for split, documents in sources.items():
        parts[split] = documents.part_of(start - before, stop - before)
        before += documents.bytes
    return parts


def count(
    folder: Path, sources: Sources, seed: int, learned: Callable[[], WordTokenizer], report: Report = lambda *done: None
) -> tuple[int, int]:
    """Fill the empty folder of a shard; return the number of its documents and of its tokens.

    `learned` returns the tokenizer, which is asked for when the first document is there: reading up to it takes a while too.
    """
    tokenizer = None
    ids: defaultdict[str, int] = defaultdict(count_from().__next__)  # a new word gets the next id
    salt = seed.to_bytes(16, "little", signed=True)
    buffered = array("I")
    num_documents = num_tokens = characters = bytes_before = 0
    read = {}
    with (folder / TOKENS).open("wb") as tokens, (folder / DOCUMENTS).open("wb") as table:
        for split, documents in sources.items():
            start = max(0, documents.part.start)
            for document, digest in documents.with_digests():
                tokenizer = tokenizer or learned()
                words = words_of(document.text, tokenizer)
                buffered.extend(map(ids.__getitem__, words or ()))
                if len(buffered) >= BUFFERED_TOKENS:
                    tokens.write(np.array(buffered, "<u4").tobytes())
                    buffered = array("I")
                row = PACK_DOCUMENT(
                    digest or 0,
                    key_of(document, salt),
                    GAVE_UP if words is None else len(words),
                    *TextSize.of(document.text),
                    SPLITS.index(split) if split else TO_CHOOSE,
                    digest is None,
                )
                table.write(row)
                num_documents += 1
                num_tokens += len(words or ())
                characters += len(document.text) + 1
                if characters >= CHUNK_CHARACTERS:
                    report(bytes_before + max(0, documents.bytes_read - start), num_documents, num_tokens)
                    characters = 0
            bytes_before += max(0, documents.bytes_read - start)
            read[split] = documents.facts()
        tokens.write(np.array(buffered, "<u4").tobytes())
    (tokenizer or learned()).save(folder / TEXT)
    assert not any("\n" in word for word in ids), "a word has a line break"
    (folder / WORDS).write_text("".join(f"{word}\n" for word in ids), encoding="utf-8", newline="\n")
    write_json(folder / READ, read)
    report(bytes_before, num_documents, num_tokens)
    return num_documents, num_tokens


def key_of(document: Document, salt: bytes) -> int:
    """Return a hash of the seed and of the group; a document without a group is its own."""
    name = f"text {document.text}" if document.group is None else f"group {document.group}"
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8, salt=salt).digest())


def words_of(text: str, tokenizer: WordTokenizer) -> list[str] | None:
    """Return the words of a document, or None where the tokenizer gives up."""
    try:
        return tokenizer.tokenize(text)
    except DataError:
        return None


# --- ids of a vocabulary that exists -------------------------------------------------------------------------------


class FoundIds(NamedTuple):
    """Documents as ids of a vocabulary that exists, as a data folder would have them."""

    tokens: np.ndarray
    """(N) uint32"""
    documents: int
    skipped: dict[str, int]
    """Rows without a document, by reason."""
    size: TextSize
    """Of the documents' texts."""


def find_ids(documents: Documents, tokenizer: WordTokenizer, vocabulary: Vocabulary) -> FoundIds:
    """Return the ids of documents, an end mark after each; all are held in memory."""
    ids = array("I")
    num_documents = 0
    size = TextSize(0, 0)
    skipped: Counter[str] = Counter()
    for document in documents:
        words = words_of(document.text, tokenizer)
        if words is None:
            skipped[UNTOKENIZABLE] += 1
        elif not words and not tokenizer.settings.line_by_line:
            skipped[EMPTY] += 1
        else:
            ids.extend(vocabulary.encode(words))
            ids.append(END_ID)
            num_documents += 1
            size = size.plus(TextSize.of(document.text))
    reasons = dict(sorted((documents.skipped + skipped).items()))
    return FoundIds(np.array(ids, dtype=np.uint32), num_documents, reasons, size)

"""The format of a shard, a part of the documents that is counted: a folder that `count` writes, and the later steps read.

    tokens.bin      the words of its documents as temporary ids, little-endian uint32
    words.txt       its words, one a line; the line number, from 0, is the temporary id: the order of first occurrence
    documents.bin   a DOCUMENT for each: how long it is, by what it is split, and how a duplicate in another shard is recognized
    text.json       the tokenizer
    read.json       of each split: lines, notes, losses, rows that were skipped and why

This module does not know who counts, nor what becomes of it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

GAVE_UP = -1
"""In place of the length of a document that cannot be tokenized."""

TOKENS, WORDS, DOCUMENTS, READ = "tokens.bin", "words.txt", "documents.bin", "read.json"
DOCUMENT = np.dtype(
    [
        ("digest", "<u8"),
        ("key", "<u8"),
        ("length", "<i8"),
        ("original_words", "<u8"),
        ("bytes", "<u8"),
        ("split", "u1"),
        ("is_new", "?"),
    ]
)
"""What a shard has of a document: the hash of its text; that of its group; its tokens, or GAVE_UP; its TextSize; the split that
it is given for, an index in SPLITS, or TO_CHOOSE; whether it is new whatever was read before it, since its format keeps
duplicates."""
PACK_DOCUMENT = struct.Struct("<QQqQQB?").pack
"""Returns the bytes of a DOCUMENT, ten times as fast as numpy."""
TO_CHOOSE = 255

BLOCK_TOKENS = 1 << 20
"""What is counted and given its ids at a time: some 20 MB."""


def words_of_shard(shard: Path) -> list[str]:
    """Return the words of a shard, by their temporary ids."""
    return (shard / WORDS).read_bytes().decode().split("\n")[:-1]


def blocks(shard: Path) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Yield some documents of a shard at a time: which, their lengths, and their temporary ids."""
    lengths = np.maximum(np.fromfile(shard / DOCUMENTS, DOCUMENT)["length"], 0)
    ends = np.cumsum(lengths)
    first = 0
    with (shard / TOKENS).open("rb") as file:
        while first < len(lengths):
            before = int(ends[first - 1]) if first else 0
            last = max(first + 1, int(np.searchsorted(ends, before + BLOCK_TOKENS, side="right")))
            # The number of documents is limited too: blank lines have no tokens.
            last = min(last, first + BLOCK_TOKENS)
            yield slice(first, last), lengths[first:last], np.fromfile(file, "<u4", int(ends[last - 1]) - before)
            first = last

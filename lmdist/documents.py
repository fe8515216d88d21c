"""From files to documents: CSV, TSV, JSON Lines, Parquet and plain text, packed with gzip, bzip2, xz, zstd or not.

    documents = Documents(find_files(["news/*.csv.gz"]))
    for document in documents:
        document.text, document.group
    documents.skipped      # {"empty": 3, "duplicate": 11}

One row is held at a time, so memory does not grow with the files, except for 8 bytes (in Python some 100) for each row,
by which it is known when it comes again. Nothing vanishes in silence: what is skipped is counted, with the reason. This
module does not know what a word is.

Rows are split by Python's csv module, not by pandas, whose C parser pads a short row with empty texts, shifts or cuts a long
one without a word, and gives up the whole file for one quote that is never closed. It reads 60 MB/s; words are found at 0.6.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import difflib
import glob
import gzip
import hashlib
import io
import json
import lzma
import os
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from lmdist.errors import DataError, MissingInputError, UsageError

TEXT_COLUMNS = ("content", "text", "article", "body")
FORMATS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
}
PACKED = (".gz", ".bz2", ".xz", ".zst")

# Past this a quote was left open: the longest novels have 20 million characters.
LONGEST_CELL = 1 << 27

EMPTY, MISSING, DUPLICATE, MALFORMED = "empty", "missing", "duplicate", "malformed"


class Document(NamedTuple):
    """A text, and what must stay together with it."""

    text: str
    group: str | None


class Documents:
    """The documents of several files, one after the other; each iteration reads them anew."""

    def __init__(
        self,
        files: list[Path],
        *,
        text_column: str = "",
        group_by: str = "",
        lines: bool = False,
        rows: int = 0,
        encoding: str = "",
    ) -> None:
        """`lines`: in plain text each line is a document, the blank ones too; else what stands between blank lines is one."""
        self.files = files
        self.text_column = text_column
        self.group_by = group_by
        self.lines = lines
        self.rows = rows
        self.encoding = encoding
        self.bytes = sum(file.stat().st_size for file in files)
        self.bytes_read = 0
        """How far the reading is, in bytes as they lie on the disk."""
        self.skipped: Counter[str] = Counter()
        """Rows that gave no document, by reason."""
        try:
            codecs.lookup(encoding or "utf-8")
        except LookupError:
            raise UsageError(f"encoding is {encoding!r}, which Python does not know; utf-16 or gb18030 are such") from None

    def __iter__(self) -> Iterator[Document]:
        self.skipped.clear()
        self.bytes_read = 0
        seen: set[int] = set()
        rows = 0
        for file in self.files:
            before = self.bytes_read
            for document in self._read(file):
                rows += 1
                if document is not None:
                    reason = self._unfit(document, seen)
                    if reason is None:
                        yield document
                    else:
                        self.skipped[reason] += 1
                if rows == self.rows:
                    return
            self.bytes_read = before + file.stat().st_size

    def _unfit(self, document: Document, seen: set[int]) -> str | None:
        """Why a document is left out. In plain text nothing comes twice by mistake, and with `lines` a blank line counts."""
        if not document.text or document.text.isspace():
            return None if self.lines else EMPTY
        if self.lines:
            return None
        digest = int.from_bytes(hashlib.blake2b(document.text.encode(), digest_size=8).digest())
        if digest in seen:
            return DUPLICATE
        seen.add(digest)
        return None

    def _read(self, path: Path) -> Iterator[Document | None]:
        """The rows of a file; None for one that gives no document, counted already."""
        kind = kind_of(path)
        if kind == "text" and (self.group_by or self.text_column):
            raise UsageError(f"{path} is plain text, which has no columns: leave out --text-column and --group-by")
        try:
            if kind == "parquet":
                yield from self._parquet(path)
                return
            with path.open("rb") as raw, unpacked(raw, path) as stream:
                text = io.TextIOWrapper(stream, self._encoding(stream), self._errors(path), newline="")
                before = self.bytes_read
                for row in self._jsonl(text, path) if kind == "jsonl" else self._table_or_text(text, path, kind):
                    self.bytes_read = before + raw.tell()
                    yield row
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not {error.encoding}: {error.reason}; name its --encoding") from None
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            if isinstance(error, MissingInputError):
                raise
            raise DataError(f"{path} cannot be read: {error}") from None

"""The documents of several files: each text once, and a count of what was skipped and why.

    documents = Documents(find_files(["news/*.csv.gz"]), ReadOptions(group_by="title"))
    for document in documents:
        document.text, document.group
    documents.skipped      # {"empty": 3, "duplicate": 11}

One row is held at a time. Memory grows by 100 bytes a row, the hash by which a duplicate is recognized. This module does not
know file formats (readers.py does), nor what a word is.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from lmdist.errors import MissingInputError, UsageError
from lmdist.text.readers import Document, ReadOptions, Source, format_of, read

# Why a row has no document, beside the reasons of the readers.
EMPTY, DUPLICATE = "empty", "duplicate"


class Documents:
    """The documents of several files, one after the other; each iteration reads the files again."""

    def __init__(self, files: Sequence[Path], options: ReadOptions | None = None) -> None:
        self.files = files
        self.options = options or ReadOptions()
        self.bytes = sum(file.stat().st_size for file in files)
        self.bytes_read = 0
        """Bytes read so far, as they lie on the disk."""
        self.skipped: Counter[str] = Counter()
        """Rows without a document, by reason."""
        self.notes: list[str] = []
        """What the user should know about the files."""

    def check(self) -> None:
        """Read the first row of each file, so that an error in the last one is known before the first takes hours."""
        for file in self.files:
            next(read(Source(file, self.options, self.notes)), None)

    def __iter__(self) -> Iterator[Document]:
        self.skipped.clear()
        self.notes.clear()
        self.bytes_read = bytes_before = rows = 0
        seen: set[int] = set()
        for file in self.files:
            source = Source(file, self.options, self.notes)
            keeps_duplicates = format_of(file).keeps_duplicates
            for row in read(source):
                self.bytes_read = bytes_before + source.bytes_read
                if isinstance(row, str):
                    self.skipped[row] += 1
                else:
                    document = Document(well_formed(row.text), row.group and well_formed(row.group))
                    if keeps_duplicates or self._is_new(document.text, seen):
                        yield document
                rows += 1
                if rows == self.options.rows:
                    return
            bytes_before += file.stat().st_size
            self.bytes_read = bytes_before

    def _is_new(self, text: str, seen: set[int]) -> bool:
        """Return whether a text is neither empty nor a duplicate; count the reason if it is."""
        digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
        reason = EMPTY if not text or text.isspace() else DUPLICATE if digest in seen else None
        if reason is None:
            seen.add(digest)
            return True
        self.skipped[reason] += 1
        return False


def well_formed(text: str) -> str:
    """Return a text without lone surrogates, which JSON and some encodings can write, and no file can hold."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def find_files(patterns: Iterable[str]) -> list[Path]:
    """Return the files that names and globs match, each once; raise MissingInputError naming what does not exist."""
    files: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        if os.path.isfile(path):  # not Path.is_file(), which raises where it may not look
            files[path] = None
        elif os.path.isdir(path):
            raise UsageError(f"{pattern} is a folder; name files in it, like {path / '*.csv'}")
        elif any(mark in pattern for mark in "*?["):
            found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if Path(name).is_file()]
            if not found:
                raise MissingInputError(f"no file matches {pattern}")
            files |= dict.fromkeys(found)
        else:
            raise MissingInputError(f"{pattern} does not exist{near(path)}")
    return list(files)


def near(path: Path) -> str:
    """Return what else lies in the folder of a missing file, as the rest of a sentence."""
    if not os.path.isdir(path.parent):
        return f", nor does the folder {path.parent}"
    if not os.access(path.parent, os.R_OK | os.X_OK):
        return f"; {path.parent} cannot be listed"
    names = [entry.name for entry in path.parent.iterdir() if entry.is_file()]
    close = difflib.get_close_matches(path.name, names, 5, 0.5) or sorted(names)[:5]
    return f"; {path.parent} has: {', '.join(close)}" if close else f"; {path.parent} has no files"

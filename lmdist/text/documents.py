"""From files to documents: CSV, TSV, JSON Lines, Parquet and plain text, packed with gzip, bzip2, xz, zstd or not.

    documents = Documents(find_files(["news/*.csv.gz"]))
    for document in documents:
        document.text, document.group
    documents.skipped      # {"empty": 3, "duplicate": 11}

One row is held at a time, so memory does not grow with the files, but for the 100 bytes a row by which it is known when it
comes again. Nothing vanishes in silence: what is skipped is counted, with the reason. This module does not know what a word
is.

Rows are split by Python's csv module and not by pandas, whose C parser pads a short row with empty texts, shifts or cuts a
long one without a word, and gives up a whole file for one quote that is never closed. It reads 60 MB/s of news, which is
ten times faster than words are found.
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
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from lmdist.errors import DataError, MissingInputError, UsageError, one_line

TEXT_COLUMNS = ("content", "text", "article", "body")
FORMATS = {".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".parquet": "parquet", ".pq": "parquet"}
FORMATS |= dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl")
OPENERS: dict[str, Callable[[IO[bytes]], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
PACKED = (*OPENERS, ".zst")

# Longer than any novel: past it, a quote was left open, or the file is one line of zeros that gzip made small.
LONGEST_ROW = 1 << 27

# Why a row gives no document.
EMPTY, MISSING, DUPLICATE, MALFORMED = "empty", "missing", "duplicate", "malformed"


class Document(NamedTuple):
    """A text, and what it belongs to: the cell of the column that documents are grouped by."""

    text: str
    group: str | None


class OddBytes:
    """Takes what is not UTF-8, byte by byte, for Windows-1252, as browsers do, and counts it."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, error: UnicodeError) -> tuple[str, int]:
        """What the bytes of an error mean, and where to go on (the protocol of codecs.register_error)."""
        assert isinstance(error, UnicodeDecodeError)
        self.count += error.end - error.start
        return error.object[error.start : error.end].decode("cp1252", "replace"), error.end


class Documents:
    """The documents of several files, one after the other; each iteration reads them anew."""

    def __init__(
        self,
        files: Sequence[Path],
        *,
        text_column: str = "",
        group_by: str = "",
        lines: bool = False,
        rows: int = 0,
        encoding: str = "",
    ) -> None:
        """With `lines` each line of a plain text is a document, blank or not; else what stands between blank lines is."""
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
        self.notes: list[str] = []
        """What a person should know of the files."""
        try:
            "".encode(encoding or "utf-8")
        except (LookupError, UnicodeError):
            raise UsageError(f"encoding is {encoding!r}, which Python does not know; utf-16 and gb18030 are such") from None

    def check(self) -> None:
        """Read the first row of each file: what is wrong with the last is known before the first takes hours."""
        for file in self.files:
            next(self._read(file), None)

    def __iter__(self) -> Iterator[Document]:
        self.skipped.clear()
        self.notes.clear()
        self.bytes_read = rows = 0
        seen: set[int] = set()
        for file in self.files:
            before = self.bytes_read
            whole = kind_of(file) == "text"  # what comes twice in one text is meant to
            for found in self._read(file):
                if isinstance(found, str):
                    self.skipped[found] += 1
                else:
                    document = Document(well_formed(found.text), found.group and well_formed(found.group))
                    if whole or self._is_new(document.text, seen):
                        yield document
                rows += 1
                if rows == self.rows:
                    return
            self.bytes_read = before + file.stat().st_size

    def _is_new(self, text: str, seen: set[int]) -> bool:
        """Whether a cell holds a text that has not been there before; counts it where not."""
        digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
        reason = EMPTY if not text or text.isspace() else DUPLICATE if digest in seen else None
        if reason is None:
            seen.add(digest)
            return True
        self.skipped[reason] += 1
        return False

    def _read(self, path: Path) -> Iterator[Document | str]:
        """For each row of a file its document, or the reason why there is none."""
        kind = kind_of(path)
        if kind == "text" and (self.group_by or self.text_column):
            raise UsageError(f"{path} is plain text, which has no columns: leave out --text-column and --group-by")
        try:
            if kind == "parquet":
                yield from self._parquet(path)
                return
            begin = self.bytes_read
            with path.open("rb") as raw, unpacked(raw, path) as stream:
                odd_bytes = OddBytes()
                decoded = self._decoded(stream, odd_bytes, newline="\n" if kind == "text" else "")
                try:
                    if kind == "text":
                        rows = self._text(decoded, path)
                    elif kind == "jsonl":
                        rows = self._jsonl(decoded, path)
                    else:
                        rows = self._table(decoded, path, "\t" if kind == "tsv" else ",")
                    for row in rows:
                        self.bytes_read = begin + raw.tell()
                        yield row
                finally:
                    decoded.detach()  # else it closes the file when it likes
                if odd_bytes.count:
                    self.notes.append(
                        f"{path}: {odd_bytes.count:,} bytes are not UTF-8 and were read as Windows-1252 (or name --encoding)"
                    )
        except UnicodeError as error:
            raise DataError(f"{path} is not {self.encoding or 'UTF-16'}: {error}") from None
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            if isinstance(error, MissingInputError):
                raise
            raise DataError(f"{path} cannot be read: {one_line(error)}") from None

    def _decoded(self, stream: IO[bytes], odd_bytes: OddBytes, newline: str) -> io.TextIOWrapper:
        """The lines of a file."""
        if self.encoding:
            return io.TextIOWrapper(stream, self.encoding, newline=newline)
        mark = stream.peek(2)[:2]  # pyright: ignore[reportAttributeAccessIssue]
        if mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return io.TextIOWrapper(stream, "utf-16", newline=newline)
        codecs.register_error("lmdist", odd_bytes)
        return io.TextIOWrapper(stream, "utf-8-sig", "lmdist", newline=newline)

    def _text(self, decoded: IO[str], path: Path) -> Iterator[Document]:
        block: list[str] = []
        length = 0
        for line in lines_of(decoded, path):
            text = line.rstrip("\r\n")
            length = length + len(line) if block else 0
            if length > LONGEST_ROW:
                raise DataError(
                    f"{path} has no blank line in {length:,} characters, and documents are what stands between blank lines: "
                    "put some in, or take each line for a document by --tokenizer whitespace"
                )
            if self.lines:
                yield Document(text, None)
            elif text.strip():
                block.append(text)
            elif block:
                yield Document("\n".join(block), None)
                block = []
        if block:
            yield Document("\n".join(block), None)

    def _table(self, decoded: IO[str], path: Path, delimiter: str) -> Iterator[Document | str]:
        ended = False
        length = 0

        def lines() -> Iterator[str]:
            nonlocal ended, length
            for line in lines_of(decoded, path):
                length += len(line)
                if length > LONGEST_ROW:
                    raise csv.Error(f"the row has more than {LONGEST_ROW:,} characters")
                yield line
            ended = True

        csv.field_size_limit(LONGEST_ROW)
        reader = csv.reader(lines(), delimiter=delimiter)
        try:
            header = next(reader, None)
            if not header:
                raise DataError(f"{path} has no first line with the names of its columns")
            text_column, group_column = self._columns(header, path)
            begin = reader.line_num + 1
            for row in reader:
                length = 0
                if ended:  # The reader asked for a line after the last: the row is not complete.
                    self.notes.append(
                        f"{path}: a quote opened in the row at line {begin:,} is never closed; the row is skipped"
                    )
                    yield MALFORMED
                elif any(row[len(header) :]):
                    yield MALFORMED
                elif len(row) > text_column:
                    group = row[group_column] if group_column is not None and group_column < len(row) else None
                    yield Document(row[text_column], group or None)
                elif row:
                    yield MISSING
                begin = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num:,}: {error}; is a quote left open?") from None

    def _jsonl(self, decoded: IO[str], path: Path) -> Iterator[Document | str]:
        names: tuple[str, str | None] | None = None
        for number, line in enumerate(lines_of(decoded, path), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if names is None:
                if not isinstance(row, dict):
                    raise DataError(f"{path}, line {number}: JSON Lines are expected, one object of columns a line")
                columns = list(row)
                text, group = self._columns(columns, path)
                names = columns[text], None if group is None else columns[group]
            yield document_of(row.get(names[0]), names[1] and row.get(names[1])) if isinstance(row, dict) else MALFORMED

    def _parquet(self, path: Path) -> Iterator[Document | str]:
        import pyarrow
        from pyarrow.parquet import ParquetFile

        begin = self.bytes_read
        try:
            file = ParquetFile(path)
            names = file.schema_arrow.names
            text, group = self._columns(names, path)
            wanted = [names[text]] if group is None else [names[text], names[group]]
            for number in range(file.num_row_groups):
                for batch in file.iter_batches(1000, row_groups=[number], columns=wanted):
                    cells = batch.to_pydict()
                    for index, value in enumerate(cells[wanted[0]]):
                        yield document_of(value, cells[wanted[-1]][index] if group is not None else None)
                self.bytes_read = begin + path.stat().st_size * (number + 1) // file.num_row_groups
        except DataError:
            raise
        except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # the last two: values that Python has no type for
            raise DataError(f"{path} cannot be read: {one_line(error)}") from None

    def _columns(self, names: Sequence[str], path: Path) -> tuple[int, int | None]:
        """Where the text is and where the group, if it is asked for; raises DataError naming the columns that exist."""
        folded = [name.strip().casefold() for name in names]

        def find(wanted: Iterable[str], flag: str) -> int:
            for name in wanted:
                if name in names:
                    return names.index(name)
                if name.casefold() in folded:
                    return folded.index(name.casefold())
            printable = [name if name.isprintable() else repr(name) for name in names[:20]]
            there = ", ".join(name if len(name) < 40 else f"{name[:40]}..." for name in printable)
            raise DataError(f"{path} has no column {' or '.join(wanted)}; it has: {there}. Name one with {flag}")

        text = find([self.text_column] if self.text_column else TEXT_COLUMNS, "--text-column")
        return text, find([self.group_by], "--group-by") if self.group_by else None


def document_of(value: Any, group: Any) -> Document | str:
    """The document of a typed cell."""
    if value is None:
        return MISSING
    if not isinstance(value, str):
        return MALFORMED
    return Document(value, None if group in (None, "") else str(group))


def well_formed(text: str) -> str:
    """A text without halves of surrogate pairs, which JSON and some encodings can write, and no file can hold."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def lines_of(decoded: IO[str], path: Path) -> Iterator[str]:
    """The lines of a file, one at a time; raises DataError for one that is too long to be held in memory."""
    while line := decoded.readline(LONGEST_ROW):
        if len(line) == LONGEST_ROW:
            raise DataError(f"{path} has a line of more than {LONGEST_ROW:,} characters: text has line breaks")
        yield line


def kind_of(path: Path) -> str:
    """csv, tsv, jsonl, parquet or text, by the name of the file."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return FORMATS.get(suffixes[-1], "text") if suffixes else "text"


@contextmanager
def unpacked(raw: IO[bytes], path: Path) -> Iterator[IO[bytes]]:
    """The bytes that a file holds once unpacked."""
    suffix = path.suffix.lower()
    if suffix in OPENERS:
        with OPENERS[suffix](raw) as stream:
            yield stream
    elif suffix == ".zst":
        try:
            import zstandard
        except ImportError:
            raise MissingInputError(f"{path} needs zstandard to be read: pip install 'lmdist[zstd]'") from None
        try:
            yield io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True))
        except zstandard.ZstdError as error:
            raise DataError(f"{path} cannot be read: {one_line(error)}") from None
    else:
        yield raw


def find_files(patterns: Iterable[str]) -> list[Path]:
    """The files that names and globs mean, each once; raises MissingInputError naming what is not there."""
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
            raise MissingInputError(f"{pattern} is not there{near(path)}")
    return list(files)


def near(path: Path) -> str:
    """What else lies where a missing file was looked for."""
    if not os.path.isdir(path.parent):
        return f", nor is the folder {path.parent}"
    if not os.access(path.parent, os.R_OK | os.X_OK):
        return f"; {path.parent} may not be looked into"
    names = [entry.name for entry in path.parent.iterdir() if entry.is_file()]
    close = difflib.get_close_matches(path.name, names, 5, 0.5) or sorted(names)[:5]
    return f"; {path.parent} has: {', '.join(close)}" if close else f"; {path.parent} has no files"

"""Readers of file formats: CSV, TSV, JSON Lines, Parquet and plain text, compressed with gzip, bzip2, xz, zstd or not.

    for row in read(Source(Path("news.csv.gz"), ReadOptions(group_by="title"))):
        row                 # Document(text="...", group="...") or the reason why the row has none: "missing", "malformed"

A format is a function from a `Source` to its rows, and a line in FORMATS; a compression is a line in OPENERS. Readers hold
one row at a time. This module does not know which documents were read before, nor what a word is.

CSV is parsed by Python's csv module and not by pandas, whose C parser pads a short row with empty texts, shifts or cuts a
long row silently, and gives up the file at one quote that is never closed. It reads 60 MB/s of news, ten times faster than
text is tokenized.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

from lmdist.errors import DataError, MissingInputError, UsageError, one_line, require

TEXT_COLUMNS = ("content", "text", "article", "body")

LONGEST_ROW = 1 << 27
"""Characters, more than any novel has. A longer row is a quote left open, or a line of zeros that gzip made small."""
PROGRESS_CHARACTERS = 1 << 16
"""Characters between two updates of `Source.bytes_read`."""

# Why a row has no document.
MISSING, MALFORMED = "missing", "malformed"


class Document(NamedTuple):
    """A text, and its cell in the column that documents are grouped by."""

    text: str
    group: str | None


Row = Document | str
"""A document, or the reason why a row has none."""


@dataclass(frozen=True)
class ReadOptions:
    """What to read of a file, and how."""

    text_column: str = ""
    """The column with the text; by default the first of TEXT_COLUMNS that exists."""
    group_by: str = ""
    """The column of the groups, if any."""
    lines: bool = False
    """Each line of plain text is a document, blank or not; by default blank lines separate documents."""
    rows: int = 0
    """Stop after so many rows of all files together; 0 reads all."""
    encoding: str = ""
    """By default UTF-8, or UTF-16 with a byte order mark; undecodable bytes are read as Windows-1252."""

    def __post_init__(self) -> None:
        try:
            "".encode(self.encoding or "utf-8")
        except (LookupError, UnicodeError):
            raise UsageError(
                f"encoding is {self.encoding!r}, which Python does not know; utf-16 and gb18030 are encodings"
            ) from None


@dataclass
class Source:
    """A file that is being read."""

    path: Path
    options: ReadOptions = field(default_factory=ReadOptions)
    notes: list[str] = field(default_factory=list)
    """What the user should know about the file."""
    bytes_read: int = 0
    """Bytes read so far, as they lie on the disk."""


class Format(NamedTuple):
    """A file format: its name, the extensions of its files, and its reader."""

    name: str
    extensions: tuple[str, ...]
    read: Callable[[Source], Iterator[Row]]
    has_columns: bool = True
    keeps_duplicates: bool = False
    """A text that comes twice in one file is meant to; a row that comes twice is an accident."""


def read(source: Source) -> Iterator[Row]:
    """Yield the rows of a file; raise DataError, naming the file, for what cannot be read."""
    path, options = source.path, source.options
    found = format_of(path)
    if not found.has_columns and (options.group_by or options.text_column):
        raise UsageError(f"{path} is {found.name}, which has no columns: leave out --text-column and --group-by")
    try:
        yield from found.read(source)
    except MissingInputError:
        raise
    except UnicodeError as error:
        raise DataError(f"{path} is not {options.encoding or 'UTF-16'}: {error}") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path} cannot be read: {one_line(error)}") from None


def format_of(path: Path) -> Format:
    """Return the format of a file by its name; an unknown extension is plain text."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in OPENERS:
        suffixes.pop()
    return next((row for row in FORMATS if suffixes and suffixes[-1] in row.extensions), PLAIN_TEXT)


# --- formats -------------------------------------------------------------------------------------------------------


def read_text(source: Source) -> Iterator[Row]:
    """Yield the paragraphs that blank lines separate, or each line where the options say so."""
    paragraph: list[str] = []
    length = 0
    for line in lines_of(source, newline="\n"):
        text = line.rstrip("\r\n")
        length = length + len(line) if paragraph else 0
        if length > LONGEST_ROW:
            raise DataError(
                f"{source.path} has no blank line in {length:,} characters, and blank lines separate documents: "
                "insert some, or read each line as a document by --tokenizer whitespace"
            )
        if source.options.lines:
            yield Document(text, None)
        elif text.strip():
            paragraph.append(text)
        elif paragraph:
            yield Document("\n".join(paragraph), None)
            paragraph = []
    if paragraph:
        yield Document("\n".join(paragraph), None)


def read_table(source: Source, delimiter: str) -> Iterator[Row]:
    """Yield the rows of CSV or TSV, of which the first line names the columns."""
    path = source.path
    at_end = False
    length = 0

    def lines() -> Iterator[str]:
        nonlocal at_end, length
        for line in lines_of(source, newline=""):
            length += len(line)
            if length > LONGEST_ROW:
                raise csv.Error(f"the row has more than {LONGEST_ROW:,} characters")
            yield line
        at_end = True

    csv.field_size_limit(LONGEST_ROW)
    reader = csv.reader(lines(), delimiter=delimiter)
    try:
        header = next(reader, None)
        if not header:
            raise DataError(f"{path} has no first line with the names of its columns")
        text_column, group_column = find_columns(header, source)
        first_line = reader.line_num + 1
        for row in reader:
            length = 0
            if at_end:  # The reader asked for a line after the last: the row is not complete.
                source.notes.append(
                    f"{path}: a quote opened in the row at line {first_line:,} is never closed; the row is skipped"
                )
                yield MALFORMED
            elif any(row[len(header) :]):
                yield MALFORMED
            elif len(row) > text_column:
                group = row[group_column] if group_column is not None and group_column < len(row) else None
                yield Document(row[text_column], group or None)
            elif row:
                yield MISSING
            first_line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num:,}: {error}; is a quote left open?") from None


def read_jsonl(source: Source) -> Iterator[Row]:
    """Yield the rows of JSON Lines, of which the first has all columns that matter."""
    names: tuple[str, str | None] | None = None
    for number, line in enumerate(lines_of(source, newline=""), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if names is None:
            if not isinstance(row, dict):
                raise DataError(f"{source.path}, line {number}: JSON Lines are expected, one object of columns a line")
            columns = list(row)
            text, group = find_columns(columns, source)
            names = columns[text], None if group is None else columns[group]
        yield document_of(row.get(names[0]), names[1] and row.get(names[1])) if isinstance(row, dict) else MALFORMED


def read_parquet(source: Source) -> Iterator[Row]:
    """Yield the rows of Parquet, one row group at a time."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    size = source.path.stat().st_size
    try:
        file = ParquetFile(source.path)
        names = file.schema_arrow.names
        text, group = find_columns(names, source)
        wanted = [names[text]] if group is None else [names[text], names[group]]
        for number in range(file.num_row_groups):
            for batch in file.iter_batches(1000, row_groups=[number], columns=wanted):
                cells = batch.to_pydict()
                for index, value in enumerate(cells[wanted[0]]):
                    yield document_of(value, cells[wanted[-1]][index] if group is not None else None)
            source.bytes_read = size * (number + 1) // file.num_row_groups
    except DataError:
        raise
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # the last two: values that Python has no type for
        raise DataError(f"{source.path} cannot be read: {one_line(error)}") from None


FORMATS = (
    Format("CSV", (".csv",), partial(read_table, delimiter=",")),
    Format("TSV", (".tsv", ".tab"), partial(read_table, delimiter="\t")),
    Format("JSON Lines", (".jsonl", ".ndjson", ".json"), read_jsonl),
    Format("Parquet", (".parquet", ".pq"), read_parquet),
)
PLAIN_TEXT = Format("plain text", (), read_text, has_columns=False, keeps_duplicates=True)


# --- columns and cells ---------------------------------------------------------------------------------------------


def find_columns(names: Sequence[str], source: Source) -> tuple[int, int | None]:
    """Return the index of the text column and of the group column, if any; raise DataError naming the columns that exist."""
    folded = [name.strip().casefold() for name in names]

    def find(wanted: Iterable[str], flag: str) -> int:
        for name in wanted:
            if name in names:
                return names.index(name)
            if name.casefold() in folded:
                return folded.index(name.casefold())
        printable = [name if name.isprintable() else repr(name) for name in names[:20]]
        existing = ", ".join(name if len(name) < 40 else f"{name[:40]}..." for name in printable)
        raise DataError(f"{source.path} has no column {' or '.join(wanted)}; it has: {existing}. Name one with {flag}")

    options = source.options
    text = find([options.text_column] if options.text_column else TEXT_COLUMNS, "--text-column")
    return text, find([options.group_by], "--group-by") if options.group_by else None


def document_of(value: Any, group: Any) -> Row:
    """Return the document of a typed cell, or the reason why there is none."""
    if value is None:
        return MISSING
    if not isinstance(value, str):
        return MALFORMED
    return Document(value, None if group in (None, "") else str(group))


# --- bytes, characters, lines --------------------------------------------------------------------------------------


def lines_of(source: Source, newline: str) -> Iterator[str]:
    """Yield the lines of a file, decompressed and decoded; `newline` is that of `open`, and line breaks stay.

    Raises DataError for a line that is too long to be held in memory.
    """
    path = source.path
    open_compressed = OPENERS.get(path.suffix.lower(), nullcontext)
    undecodable = UndecodableBytes()
    characters = 0
    with path.open("rb") as raw, open_compressed(raw) as stream:
        decoded = decode(stream, source.options.encoding, undecodable, newline)
        try:
            while line := decoded.readline(LONGEST_ROW):
                if len(line) == LONGEST_ROW:
                    raise DataError(f"{path} has a line of more than {LONGEST_ROW:,} characters: text has line breaks")
                characters += len(line)
                if characters > PROGRESS_CHARACTERS:  # tell() is a system call: one a line would take a third of the time
                    source.bytes_read, characters = raw.tell(), 0
                yield line
        finally:
            decoded.detach()  # else its finalizer closes the file
    if undecodable.count:
        source.notes.append(
            f"{path}: {undecodable.count:,} bytes are not UTF-8 and were read as Windows-1252 (or name --encoding)"
        )


def decode(stream: IO[bytes], encoding: str, undecodable: UndecodableBytes, newline: str) -> io.TextIOWrapper:
    """Return the text of a stream, whose encoding is guessed from its first bytes where none is named."""
    if encoding:
        return io.TextIOWrapper(stream, encoding, newline=newline)
    mark = stream.peek(2)[:2]  # pyright: ignore[reportAttributeAccessIssue]
    if mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return io.TextIOWrapper(stream, "utf-16", newline=newline)
    codecs.register_error("lmdist", undecodable)
    return io.TextIOWrapper(stream, "utf-8-sig", "lmdist", newline=newline)


class UndecodableBytes:
    """An error handler of codecs: reads bytes that are not UTF-8 as Windows-1252, as browsers do, and counts them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, error: UnicodeError) -> tuple[str, int]:
        """Return the characters of undecodable bytes, and where to continue (the protocol of codecs.register_error)."""
        assert isinstance(error, UnicodeDecodeError)
        self.count += error.end - error.start
        return error.object[error.start : error.end].decode("cp1252", "replace"), error.end


@contextmanager
def open_zstd(raw: IO[bytes]) -> Iterator[IO[bytes]]:
    """Decompress zstd, for which Python has no module."""
    require("zstandard", purpose=f"{raw.name} cannot be read: ")
    import zstandard

    try:
        yield io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True))
    except zstandard.ZstdError as error:
        raise DataError(f"{raw.name} cannot be read: {one_line(error)}") from None


OPENERS: dict[str, Callable[[IO[bytes]], AbstractContextManager[Any]]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": open_zstd,
}

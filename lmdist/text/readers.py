"""Readers of file formats: CSV, TSV, JSON Lines, Parquet and plain text.

    for row in read(source):        # a Source of sources.py
        row                         # Document(text="...", group="...") or Skipped(reason="malformed", ...)

A format is a function from a `Source` to its rows, and a line in FORMATS. Readers hold one row at a time. This module does not
know how files are packed, which documents were read before, nor what a word is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from pathlib import PurePath
from typing import Any, NamedTuple

from lmdist.errors import DataError, UsageError, one_line
from lmdist.text.columns import cells_of, find_columns, find_separator, name_of, numbered_columns, text_columns
from lmdist.text.decoding import LONGEST_ROW, lines_of
from lmdist.text.sources import PACKED_EXTENSIONS, Source, errors_of
from lmdist.text.tables import Table

SEPARATORS = (",", ";", "\t", "|")

ROWS_CHECKED = 1000
"""Of each file before the first is read: columns that are not found in so many rows are missing."""
MANY_LINES = 20
"""So many lines without a blank one between them may be meant as so many documents."""

# Why a row has no document.
MISSING, MALFORMED = "missing", "malformed"
# What is malformed about it.
MORE_CELLS = "more cells than the first line has"
FEWER_CELLS = "the row ends before the column of the text"
OPEN_QUOTE = "a quote is opened and not closed"
NOT_JSON = "not an object in JSON"
NOT_TEXT = "the cell is not text"


class Document(NamedTuple):
    """A text, and its cell in the column that documents are grouped by."""

    text: str
    group: str | None


class Skipped(NamedTuple):
    """A row without a document."""

    reason: str
    why: str = ""
    """What is wrong with the row, if its text may be lost by it."""
    line: int = 0
    """Number of its first line."""
    num_lines: int = 1


Row = Document | Skipped


class Format(NamedTuple):
    """A file format: its name, the extensions of its files, and its reader."""

    name: str
    extensions: tuple[str, ...]
    read: Callable[[Source], Iterator[Row]]
    has_columns: bool = True
    is_table: bool = False
    """It has separators, and perhaps a first line with names."""
    keeps_duplicates: bool = False
    """A text that comes twice in one file is meant to; a row that comes twice is an accident."""


def read(source: Source, found: Format) -> Generator[Row]:
    """Yield the rows of a source in the format that `format_of` found; raise DataError, naming it, for what cannot be read."""
    options = source.options
    if not found.has_columns and (options.group_by or options.text_column):
        raise UsageError(f"{source.name} is {found.name}, which has no columns: leave out --text-column and --group-by")
    if not found.is_table and (options.separator or not options.header):
        raise UsageError(f"{source.name} is {found.name}, which is no table: leave out --separator and --no-header")
    with errors_of(source.name):
        try:
            yield from found.read(source)
        except UnicodeError as error:
            guessed = getattr(error, "encoding", "utf-16")[:6].upper()  # by the mark: utf-32-le
            raise DataError(f"{source.name} is not {options.encoding or guessed}: {error}") from None


def format_of(source: Source) -> Format:
    """Return the format of a source by its name; without an extension that is known, by what it holds."""
    return format_by_name(source.file_name) or format_by_content(source)


def format_by_name(name: PurePath) -> Format | None:
    """Return the format that an extension stands for, if it is known."""
    suffixes = [suffix.lower() for suffix in name.suffixes]
    if suffixes and suffixes[-1] in PACKED_EXTENSIONS:
        suffixes.pop()
    return next((row for row in (*FORMATS, PLAIN_TEXT) if suffixes and suffixes[-1] in row.extensions), None)


def format_by_content(source: Source) -> Format:
    """Return the format of a stream without a name: a table has a column that is wanted, and what else there is, is text."""
    head, options = source.head(), source.options
    first_line = next(iter(head.decode(options.encoding or "utf-8-sig", "replace").lstrip("\r\n").splitlines()), "")
    found = PLAIN_TEXT
    if head.startswith(b"PAR1"):
        found = PARQUET
    elif re.match(r'\{\s*"[^"]*"\s*:', first_line):  # it may be longer than what is known of it
        found = JSON_LINES
    elif options.separator or not options.header:
        found = CSV
    else:
        tables = (cells_of([first_line], separator) for separator in SEPARATORS)
        if any(len(names) > 1 and name_of(names, text_columns(source)) is not None for names in tables):
            found = CSV
    if found is not PLAIN_TEXT:
        source.notes.append(f"{source.name} was read as {found.name}")
    return found


def members_to_read(names: Sequence[str]) -> list[str]:
    """Return the files of an archive that are read: those with columns where there are some, and not the notes beside them."""
    tables = [name for name in names if (found := format_by_name(PurePath(name))) and found.has_columns]
    return tables or list(names)


# --- formats -------------------------------------------------------------------------------------------------------


def read_text(source: Source) -> Iterator[Row]:
    """Yield the paragraphs that blank lines separate, or each line where the options say so."""
    paragraph: list[str] = []
    length = num_documents = 0
    for line in lines_of(source, newline="\n"):
        text = line.rstrip("\r\n")
        length = length + len(line) if paragraph else 0
        if length > LONGEST_ROW:
            raise DataError(
                f"{source.name} has no blank line in {length:,} characters, and blank lines separate documents: "
                "insert some, or read each line as a document by --lines"
            )
        if source.options.lines:
            yield Document(text, None)
        elif text.strip():
            paragraph.append(text)
        elif paragraph:
            yield Document("\n".join(paragraph), None)
            paragraph = []
            num_documents += 1
    if len(paragraph) >= MANY_LINES and not num_documents:
        source.notes.append(
            f"{source.name} has {len(paragraph):,} lines and no blank line, so it is one document; "
            "--lines reads each line as a document"
        )
    if paragraph:
        yield Document("\n".join(paragraph), None)


def read_table(source: Source, separators: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of CSV or TSV. The first line names the columns, or is a row too where the options say so.

    Without a separator in the options it is the first of `separators` that fits the first lines.
    """
    options = source.options
    table = Table(lines_of(source, newline=""))
    first_lines = table.peek(MANY_LINES)
    table.separator = options.separator or find_separator(first_lines, source, separators)
    header = cells_of(first_lines, table.separator)
    if not header:
        raise DataError(f"{source.name} has no first line with the names of its columns")
    table.width = len(header)
    rows = iter(table)
    if options.header:
        header = next(rows)
        table.width = len(header)
        text_column, group_column = find_columns(header, source)
    else:
        text_column, group_column = numbered_columns(header, source)
    open_quotes = OpenQuotes(source)
    for row in rows:
        if table.has_open_quote:
            open_quotes.add(table.line)
        if table.is_truncated:
            yield Skipped(MALFORMED, OPEN_QUOTE, table.line, table.num_lines)
        elif any(row[table.width :]):
            yield Skipped(MALFORMED, OPEN_QUOTE if table.has_open_quote else MORE_CELLS, table.line, table.num_lines)
        elif len(row) > text_column:
            group = row[group_column] if group_column is not None and group_column < len(row) else None
            yield Document(row[text_column], group or None)
        elif row:
            yield Skipped(MISSING, FEWER_CELLS, table.line, table.num_lines)


class OpenQuotes:
    """A note of a source that counts the rows with an open quote that were read all the same."""

    def __init__(self, source: Source) -> None:
        self.name = source.name
        self.notes = source.notes
        self.count = self.line = 0

    def add(self, line: int) -> None:
        """Count the row that begins at a line."""
        if not self.count:
            self.line = line
            self.notes.append(self)
        self.count += 1

    def __str__(self) -> str:
        return (
            f"{self.name}: a quote is opened and not closed as it should be in {self.count:,} row(s), the first at line "
            f"{self.line:,}; what could be read of them was read as it stands"
        )


def read_jsonl(source: Source) -> Iterator[Row]:
    """Yield the rows of JSON Lines. A column is named by the first object that has it; objects before it lack their text.

    The column of the groups must be in one of the first ROWS_CHECKED objects: at the end of a large file it would be too late.
    """
    options = source.options
    text = group = None
    names: dict[str, None] = {}
    num_rows = 0
    for number, line in enumerate(lines_of(source, newline=""), 1):
        if not line.strip():
            continue
        num_rows += 1
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            if num_rows == 1:
                raise DataError(f"{source.name}, line {number}: JSON Lines are expected, one object of columns a line")
            yield Skipped(MALFORMED, NOT_JSON, number)
            continue
        if text is None or (options.group_by and group is None):
            names |= dict.fromkeys(row)
            text = text or name_of(row, text_columns(source))
            group = group or (name_of(row, [options.group_by]) if options.group_by else None)
            if num_rows >= ROWS_CHECKED and text is not None and options.group_by and group is None:
                find_columns(list(names), source)  # raises DataError
        yield document_of(row.get(text), group and row.get(group), number)
    if names and (text is None or (options.group_by and group is None)):
        find_columns(list(names), source)  # raises DataError


def read_parquet(source: Source) -> Iterator[Row]:
    """Yield the rows of Parquet, one row group at a time."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(source.stream)
        names = file.schema_arrow.names
        text, group = find_columns(names, source)
        wanted = [names[text]] if group is None else [names[text], names[group]]
        for number in range(file.num_row_groups):
            for batch in file.iter_batches(1000, row_groups=[number], columns=wanted):
                cells = batch.to_pydict()
                for index, value in enumerate(cells[wanted[0]]):
                    source.lines += 1
                    yield document_of(value, cells[wanted[-1]][index] if group is not None else None, source.lines)
            source.bytes_read = source.size * (number + 1) // file.num_row_groups
    except DataError:
        raise
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # the last two: values that Python has no type for
        raise DataError(f"{source.name} cannot be read: {one_line(error)}") from None


CSV = Format("CSV", (".csv",), partial(read_table, separators=SEPARATORS), is_table=True)
TSV = Format("TSV", (".tsv", ".tab"), partial(read_table, separators=("\t", *SEPARATORS)), is_table=True)
JSON_LINES = Format("JSON Lines", (".jsonl", ".ndjson", ".json"), read_jsonl)
PARQUET = Format("Parquet", (".parquet", ".pq"), read_parquet)
FORMATS = (CSV, TSV, JSON_LINES, PARQUET)
PLAIN_TEXT = Format("plain text", (".txt", ".text"), read_text, has_columns=False, keeps_duplicates=True)


def document_of(value: Any, group: Any, line: int) -> Row:
    """Return the document of a typed cell, or why there is none."""
    if value is None:
        return Skipped(MISSING)
    if not isinstance(value, str):
        return Skipped(MALFORMED, NOT_TEXT, line)
    return Document(value, None if group in (None, "") else str(group))

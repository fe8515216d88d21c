"""Readers of file formats: CSV, TSV, JSON Lines, Parquet, Feather, ORC, spreadsheets and plain text.

    for row in read(source, format_of(source)):     # a Source of sources.py
        row                                         # Document(text="...", group="...") or Skipped(reason="malformed", ...)

A format is a function from a `Source` to its rows, and a line in FORMATS. Readers of formats with columns yield cells, of
which chunks.py makes documents. This module does not know how files are packed, which documents were read before, nor what a
word is.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from pathlib import PurePath
from typing import Any, NamedTuple

from lmdist.counted import counted
from lmdist.errors import DataError, UsageError, one_line, require
from lmdist.text.arrow_files import feather, orc, parquet, read_batches
from lmdist.text.chunks import documents_in, sheets_of
from lmdist.text.columns import (
    cells_of,
    find_columns,
    find_separator,
    has_text,
    name_of,
    numbered_columns,
    places,
    wanted_columns,
)
from lmdist.text.decoding import LONGEST_ROW, lines_of
from lmdist.text.rows import FEWER_CELLS, MALFORMED, MISSING, MORE_CELLS, NOT_JSON, OPEN_QUOTE, Cells, Document, Row, Skipped
from lmdist.text.sources import PACKED_EXTENSIONS, ZIP, ReadOptions, Source, errors_of, shortened, spreadsheet_engine
from lmdist.text.tables import Table

SEPARATORS = (",", ";", "\t", "|")

ROWS_CHECKED = 1000
"""Of each file before the first is read: columns that are not found in so many rows are missing."""
ARRAY_TO_LINES = "jq -c '.[]' news.json > news.jsonl makes lines of it"
MANY_LINES = 20
"""So many lines without a blank one between them may be meant as so many documents."""


class Format(NamedTuple):
    """A file format: its name, the extensions of its files, and its reader."""

    name: str
    extensions: tuple[str, ...]
    read: Callable[[Source], Iterator[Any]]
    """Yields Cells and Skipped where there are columns, else Document and Skipped."""
    has_columns: bool = True
    has_separators: bool = False
    """Between its cells."""
    has_header: bool = False
    """Its first row has the names of the columns, or is a row like the others."""
    keeps_duplicates: bool = False
    """A text that comes twice in one file is meant to; a row that comes twice is an accident."""


def read(source: Source, found: Format) -> Generator[Row]:
    """Yield the rows of a source in the format that `format_of` found; raise DataError, naming it, for what cannot be read."""
    options = source.options
    if not found.has_columns and (options.group_by or options.text_column or options.where):
        raise UsageError(
            f"{source.name} is {found.name}, which has no columns: leave out --text-column, --group-by and --where, "
            "or give a table the name of one, such as news.csv"
        )
    for given, fits, flag in (
        (options.separator, found.has_separators, "--separator"),
        (not options.header, found.has_header, "--no-header"),
    ):
        if given and not fits:
            raise UsageError(f"{source.name} is {found.name}, which is no table of text: leave out {flag}")
    with errors_of(source):
        try:
            yield from documents_in(found.read(source), source) if found.has_columns else found.read(source)
        except UnicodeError as error:
            guessed = getattr(error, "encoding", "utf-16")[:6].upper()  # by the mark: utf-32-le
            raise DataError(f"{source.name} is not {options.encoding or guessed}: {error}") from None


def format_of(source: Source) -> Format:
    """Return the format of a source by its name; by what it holds without an extension that is known, or with a wrong one."""
    head = source.head()
    if head.startswith(ZIP):  # other archives are unpacked
        return SPREADSHEET
    named = format_by_name(source.file_name)
    if named is None or (head.startswith(tuple(MAGIC)) and named not in MAGIC.values()):
        return format_by_content(source)
    return named


def format_by_name(name: PurePath) -> Format | None:
    """Return the format that an extension stands for, if it is known."""
    extension, _ = extensions_of(name)
    return next((row for row in (*FORMATS, PLAIN_TEXT) if extension.lower() in row.extensions), None)


def extensions_of(name: PurePath) -> tuple[str, str]:
    """Return the last extension that says nothing of packing, and the one behind it that does, or "" for each."""
    *before, last = ["", "", *name.suffixes]
    return (before[-1], last) if last.lower() in PACKED_EXTENSIONS else (last, "")


def extension_of(name: PurePath) -> str:
    """Return the extension by which a name says that its file is read: .csv, .csv.gz, .zip; else ""."""
    extension, packed = extensions_of(name)
    known = (row.extensions for row in (*FORMATS, SPREADSHEET, PLAIN_TEXT))
    return (extension if any(extension.lower() in extensions for extensions in known) else "") + packed


def format_by_content(source: Source) -> Format:
    """Return the format of a stream without a name: a table has a column that is wanted, and what else there is, is text."""
    head, options = source.head(), source.options
    line = first_line(source)
    found = PLAIN_TEXT
    if magic := [magic for magic in MAGIC if head.startswith(magic)]:
        found = MAGIC[magic[0]]
    elif re.match(r'\{\s*"[^"]*"\s*:', line):  # it may be longer than what is known of it
        found = JSON_LINES
    elif options.separator or not options.header or names_columns(line, options):
        found = CSV
    if found is not PLAIN_TEXT:
        source.notes.append(f"{source.name} was read as {found.name}")
    return found


def first_line(source: Source) -> str:
    """Return the first line that is not empty, or what of it is in the head."""
    head = source.head().decode(source.options.encoding or "utf-8-sig", "replace")
    return next(iter(head.lstrip("\r\n").splitlines()), "")


def names_columns(line: str, options: ReadOptions) -> bool:
    """Return whether a line is the first one of a table with the text's columns."""
    tables = (cells_of([line], separator) for separator in SEPARATORS)
    return any(len(names) > 1 and has_text(names, options) for names in tables)


def members_to_read(names: Sequence[str]) -> list[str]:
    """Return the files of an archive that are read: those with columns where there are some, and not the notes beside them."""
    tables = [name for name in names if (found := format_by_name(PurePath(name))) and found.has_columns]
    return tables or list(names)


# --- formats -------------------------------------------------------------------------------------------------------


def read_text(source: Source) -> Iterator[Row]:
    """Yield the paragraphs that blank lines separate, or each line where the options say so."""
    is_table = names_columns(first_line(source), source.options)
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
    if is_table:
        source.notes.append(
            f"{source.name} was read as plain text, and its first line names columns; if it is a table, "
            "give it the name of one, such as news.csv"
        )
    if len(paragraph) >= MANY_LINES and not num_documents:
        source.notes.append(
            f"{source.name} has {len(paragraph):,} lines and no blank line, so it is one document; "
            "--lines reads each line as a document"
        )
    if paragraph:
        yield Document("\n".join(paragraph), None)


def read_table(source: Source, separators: Sequence[str]) -> Iterator[Cells | Skipped]:
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
    columns = (find_columns if options.header else numbered_columns)(header, source)
    last_text = max(columns[places(options).texts])
    open_quotes = OpenQuotes(source)
    for row in rows:
        if table.has_open_quote:
            open_quotes.add(table.line)
        if table.is_truncated:
            yield Skipped(MALFORMED, OPEN_QUOTE, table.line, table.num_lines)
        elif any(row[table.width :]):
            yield Skipped(MALFORMED, OPEN_QUOTE if table.has_open_quote else MORE_CELLS, table.line, table.num_lines)
        elif len(row) > last_text:
            yield Cells(table.line, [row[column] if column < len(row) else None for column in columns])
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
            f"{self.name}: a quote is opened and not closed as it should be in {counted(self.count, 'row')}, the first at line "
            f"{self.line:,}; what could be read of them was read as it stands"
        )


def read_jsonl(source: Source) -> Iterator[Cells | Skipped]:
    """Yield the rows of JSON Lines. A column is named by the first object that has it; objects before it lack its cell.

    The columns beside those of the text must be in one of the first ROWS_CHECKED objects: at the end of a large file it would
    be too late.
    """
    wanted = wanted_columns(source.options)
    found: list[str | None] = [None] * len(wanted)
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
                expected = f"{source.name}, line {number}: JSON Lines are expected, one object of columns a line"
                is_first = isinstance(row, list) and len(row) > 0 and isinstance(row[0], dict)
                is_array = line.lstrip().startswith("[") and (row is None or is_first)
                raise DataError(f"{expected}, and it is one array: {ARRAY_TO_LINES}" if is_array else expected)
            yield Skipped(MALFORMED, NOT_JSON, number)
            continue
        if None in found:
            names |= dict.fromkeys(row)
            found = [name or name_of(row, column.names) for name, column in zip(found, wanted, strict=True)]
            if num_rows >= ROWS_CHECKED and None in found and None not in found[places(source.options).texts]:
                find_columns(list(names), source)  # raises DataError
        yield Cells(number, [None if name is None else row.get(name) for name in found])
    if names and None in found:
        find_columns(list(names), source)  # raises DataError


def read_spreadsheet(source: Source) -> Iterator[Cells]:
    """Yield the rows of the sheets that have the wanted columns; a note names the others."""
    with zipfile.ZipFile(source.stream) as archive:
        engine = spreadsheet_engine(archive)
    require(engine, purpose=f"{source.name} is a spreadsheet: ")
    source.stream.seek(0)
    try:
        sheets = {name: rows for name, rows in sheets_of(source.stream, engine).items() if rows}
    except Exception as error:  # of the engine's, which has no class for them
        raise DataError(f"{source.name} is a spreadsheet that cannot be read: {one_line(error)}") from None
    options, unread, error = source.options, [], None
    for name, rows in sheets.items():
        try:
            columns = (find_columns if options.header else numbered_columns)(rows[0], source)
        except DataError as not_found:
            error = error or not_found
            unread.append(name)
            continue
        for line, row in enumerate(rows[options.header :], 1 + options.header):
            source.lines += 1
            if any(row):
                yield Cells(line, [row[column] for column in columns])
    if error and len(unread) == len(sheets):
        raise error
    if unread:
        source.notes.append(f"{source.name}: not read were the sheets {shortened(unread)}, which lack a column")
    source.bytes_read = source.size


CSV = Format("CSV", (".csv",), partial(read_table, separators=SEPARATORS), has_separators=True, has_header=True)
TSV = Format("TSV", (".tsv", ".tab"), partial(read_table, separators=("\t", *SEPARATORS)), has_separators=True, has_header=True)
JSON_LINES = Format("JSON Lines", (".jsonl", ".ndjson", ".json"), read_jsonl)
PARQUET = Format("Parquet", (".parquet", ".pq"), partial(read_batches, open_file=parquet))
FEATHER = Format("Feather", (".feather", ".arrow"), partial(read_batches, open_file=feather))
ORC = Format("ORC", (".orc",), partial(read_batches, open_file=orc))
FORMATS = (CSV, TSV, JSON_LINES, PARQUET, FEATHER, ORC)
SPREADSHEET = Format("a spreadsheet", (".xlsx", ".ods"), read_spreadsheet, has_header=True)
PLAIN_TEXT = Format("plain text", (".txt", ".text"), read_text, has_columns=False, keeps_duplicates=True)
MAGIC = {b"PAR1": PARQUET, b"ARROW1\x00\x00": FEATHER}
"""The first bytes of formats that are known by them."""

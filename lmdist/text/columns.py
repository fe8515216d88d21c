"""Which cells of a row are wanted: the columns of a table, by their names or numbers, and the separator between them.

This module does not know how rows are read.
"""

from __future__ import annotations

import csv
import re
import shlex
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lmdist.counted import counted
from lmdist.errors import DataError
from lmdist.text.sources import ReadOptions, Source

TEXT_COLUMNS = ("content", "text", "article", "body")
LONGEST_NAME = 60
"""Characters; what is longer is hardly the name of a column."""
MOST_DIGITS = 9
"""Of the number of a column; Python refuses to read one of thousands."""
OTHER_SEPARATOR = re.compile(r"([^\w\s\"'.!?()/-])\w[^,;|\t]*\1")
"""A sign that comes twice in what should be several cells."""


class Wanted(NamedTuple):
    """A column that is looked for."""

    names: Sequence[str]
    """The names that it may have; the first that exists counts."""
    flag: str
    """Of the command line."""


class Places(NamedTuple):
    """Where those of a kind are among the columns that are wanted, and so in `Cells.values`."""

    texts: slice
    groups: slice
    """One at most."""
    conditions: slice


def places(options: ReadOptions) -> Places:
    """Return where the columns of each kind are."""
    texts = len(options.text_columns) or 1
    groups = texts + bool(options.group_by)
    return Places(slice(texts), slice(texts, groups), slice(groups, None))


def wanted_columns(options: ReadOptions) -> list[Wanted]:
    """Return the columns to look for, in the order of `Places`."""
    texts = [Wanted([name], "--text-column") for name in options.text_columns] or [Wanted(TEXT_COLUMNS, "--text-column")]
    groups = [Wanted([options.group_by], "--group-by")] if options.group_by else []
    conditions = [Wanted([name], "--where") for name in options.condition.kinds] if options.condition else []
    return texts + groups + conditions


def name_of(names: Iterable[str], wanted: Iterable[str]) -> str | None:
    """Return the first wanted name that exists, as it is written there; else one that differs in case or spaces."""
    folded = {name.strip().casefold(): name for name in reversed([*names])}
    for name in wanted:
        if name in names:
            return name
        if name.casefold() in folded:
            return folded[name.casefold()]
    return None


def has_text(names: Iterable[str], options: ReadOptions) -> bool:
    """Return whether all columns of the text are among these names."""
    return all(name_of(names, column.names) is not None for column in wanted_columns(options)[places(options).texts])


def find_columns(names: Sequence[str], source: Source) -> list[int]:
    """Return the index of each wanted column; raise DataError naming the columns that exist."""

    def find(column: Wanted) -> int:
        name = name_of(names, column.names)
        if name is not None:
            return names.index(name)
        printable = [name if name.isprintable() else repr(name) for name in names[:20]]
        existing = ", ".join(name if len(name) < 40 else f"{name[:40]}..." for name in printable)
        what_to_do = advice(column, names, source.options)
        raise DataError(f"{source.name} has no column {' or '.join(column.names)}; it has: {existing}. {what_to_do}")

    return [find(column) for column in wanted_columns(source.options)]


def advice(column: Wanted, names: Sequence[str], options: ReadOptions) -> str:
    """Return what can be done where a column is not among the names of a table."""
    setting = f"prepare.{column.flag.removeprefix('--').replace('-', '_')}"
    found = f"Name one {'in' if column.flag == '--where' else 'with'} {column.flag} (in a recipe {setting})"
    if column.flag != "--text-column":
        found += ", or leave it out"
    name = column.names[0]
    parts = [part.strip() for part in name.split(",")]
    if column.flag == "--text-column" and len(parts) > 1 and all(name_of(names, [part]) for part in parts):
        found += f"; several are named one by one: {' '.join(f'--text-column {shlex.quote(part)}' for part in parts)}"
    if column.flag == "--where" and options.condition and len(options.condition.kinds) > 1:
        found += f"; if {name} is not a column but a text, it stands in quotes: '{name}'"
    if any(len(name) > LONGEST_NAME or name.strip().isdecimal() for name in names):
        longest = max(range(len(names)), key=lambda index: len(names[index])) + 1
        found += f"; if these are no names but a first row, give --no-header --text-column {longest}"
    return found + advice_on_separator(names)


def advice_on_separator(cells: Sequence[str]) -> str:
    """Return the flag for a first row that was not separated, if another sign seems to separate it."""
    match = OTHER_SEPARATOR.search(cells[0]) if len(cells) == 1 else None
    return f"; if its cells are separated by {match[1]}, give --separator '{match[1]}'" if match else ""


def numbered_columns(first_row: Sequence[str], source: Source) -> list[int]:
    """Return the index of each wanted column of a table without names."""
    width = len(first_row)

    def find(column: Wanted) -> int:
        number = "1" if column.names == TEXT_COLUMNS and width == 1 else column.names[0]
        if number.isdecimal() and len(number) <= MOST_DIGITS and 1 <= int(number) <= width:
            return int(number) - 1
        longest = max(range(width), key=lambda index: len(first_row[index])) + 1
        example = " (`2` == 'sport')" if column.flag == "--where" else ""
        raise DataError(
            f"{source.name} has {counted(width, 'column')} and no header: {column.flag} is expected to be a number "
            f"from 1 to {width}{example}; the longest cell of the first row is number {longest}{advice_on_separator(first_row)}"
        )

    return [find(column) for column in wanted_columns(source.options)]


def find_separator(first_lines: Sequence[str], source: Source, separators: Sequence[str]) -> str:
    """Return the first separator that finds the text's columns, or without a header as many cells in all lines."""
    for separator in separators:
        if source.options.header:
            if has_text(cells_of(first_lines, separator), source.options):
                return separator
        else:
            widths = [len(row) for row in csv.reader(first_lines, delimiter=separator)]
            if widths and widths[0] > 1 and len(set(widths[:-1] or widths)) == 1:  # the last row may go on after these lines
                return separator
    return max(separators, key=lambda separator: len(cells_of(first_lines, separator)))


def cells_of(first_lines: Sequence[str], separator: str) -> list[str]:
    """Return the cells of the first row."""
    return next(csv.reader(first_lines, delimiter=separator), [])

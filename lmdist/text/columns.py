"""Which cell of a row has the text: the columns of a table, by their names or numbers, and the separator between them.

This module does not know how rows are read.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence

from lmdist.errors import DataError
from lmdist.text.sources import Source

TEXT_COLUMNS = ("content", "text", "article", "body")
LONGEST_NAME = 60
"""Characters; what is longer is hardly the name of a column."""


def text_columns(source: Source) -> Sequence[str]:
    """Return the names that the column of the text may have."""
    return [source.options.text_column] if source.options.text_column else TEXT_COLUMNS


def name_of(names: Iterable[str], wanted: Iterable[str]) -> str | None:
    """Return the first wanted name that exists, as it is written there; else one that differs in case or spaces."""
    folded = {name.strip().casefold(): name for name in reversed([*names])}
    for name in wanted:
        if name in names:
            return name
        if name.casefold() in folded:
            return folded[name.casefold()]
    return None


def find_columns(names: Sequence[str], source: Source) -> tuple[int, int | None]:
    """Return the index of the text column and of the group column, if any; raise DataError naming the columns that exist."""

    def find(wanted: Sequence[str], flag: str) -> int:
        name = name_of(names, wanted)
        if name is not None:
            return names.index(name)
        printable = [name if name.isprintable() else repr(name) for name in names[:20]]
        existing = ", ".join(name if len(name) < 40 else f"{name[:40]}..." for name in printable)
        advice = f"Name one with {flag} (in a recipe prepare.{flag.removeprefix('--').replace('-', '_')})"
        if flag == "--group-by":
            advice += ", or leave it out"
        if any(len(name) > LONGEST_NAME or name.strip().isdecimal() for name in names):
            longest = max(range(len(names)), key=lambda index: len(names[index])) + 1
            advice += f"; if these are no names but a first row, give --no-header --text-column {longest}"
        raise DataError(f"{source.name} has no column {' or '.join(wanted)}; it has: {existing}. {advice}")

    options = source.options
    return find(text_columns(source), "--text-column"), find([options.group_by], "--group-by") if options.group_by else None


def numbered_columns(first_row: Sequence[str], source: Source) -> tuple[int, int | None]:
    """Return the index of the text column and of the group column, if any, of a table without names."""
    width = len(first_row)

    def find(number: str, flag: str) -> int:
        if number.isdecimal() and 1 <= int(number) <= width:
            return int(number) - 1
        longest = max(range(width), key=lambda index: len(first_row[index])) + 1
        raise DataError(
            f"{source.name} has {width} column(s) and no header: {flag} is expected to be a number from 1 to {width}; "
            f"the longest cell of the first row is number {longest}"
        )

    text = find(source.options.text_column or ("1" if width == 1 else ""), "--text-column")
    return text, find(source.options.group_by, "--group-by") if source.options.group_by else None


def find_separator(first_lines: Sequence[str], source: Source, separators: Sequence[str]) -> str:
    """Return the first separator that finds the text's column, or without a header as many cells in all lines."""
    for separator in separators:
        if source.options.header:
            if name_of(cells_of(first_lines, separator), text_columns(source)) is not None:
                return separator
        else:
            widths = [len(row) for row in csv.reader(first_lines, delimiter=separator)]
            if widths and widths[0] > 1 and len(set(widths[:-1] or widths)) == 1:  # the last row may go on after these lines
                return separator
    return max(separators, key=lambda separator: len(cells_of(first_lines, separator)))


def cells_of(first_lines: Sequence[str], separator: str) -> list[str]:
    """Return the cells of the first row."""
    return next(csv.reader(first_lines, delimiter=separator), [])

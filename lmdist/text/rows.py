"""What a reader of a file format yields: the cells of a row, a document, or why there is none.

This module does not know formats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

# Why a row has no document.
MISSING, MALFORMED, FILTERED = "missing", "malformed", "filtered"
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


class Cells(NamedTuple):
    """The cells of a row in the columns that are wanted, in the order of `columns.Places`; None is a cell that is missing."""

    line: int
    """Number of the row's first line."""
    values: Sequence[Any]

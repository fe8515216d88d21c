"""The rows of CSV and TSV, also where a quote is missing.

    table = Table(lines, separator=",")
    for cells in table:
        cells, table.line, table.num_lines         # ["1", "The text"], 2, 1

Rows are parsed by Python's csv module, strictly: a file that is written as it should be is read as the module reads it. But
where a quote is opened and not closed, the module takes all rows up to the next quote for one cell. Such a row is recognized
by its lines, which are rows of their own: its first line is read as it stands, and the others are put back. They hold no other
open quote, so no line is searched twice. It is nearly as fast as the module, ten times faster than text is tokenized.

`pandas.read_csv` does not find the rows, for it loses some of them without a word, whatever its options are (3.1, with
engine="python", dtype=str, keep_default_na=False, index_col=False and a function for on_bad_lines):

* a quote that is never closed costs all rows after it, and a letter after a closing quote its row: on_bad_lines is not called;
* a quote that another closes, ten rows below, is one long cell;
* a first row that is too long makes the table wider: its last cell, and those of later rows, are dropped;
* in a table of one column a cell that is empty, or a space, is no row;
* on_bad_lines is given cells, and neither the number of their line nor how many lines they were.

Its engine "c" pads a short row with empty texts, and gives up the file at an open quote. So pandas gets the rows from here
(chunks.py). This module does not know what the cells mean.
"""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Iterator

from lmdist.text.decoding import LONGEST_ROW

FEWEST_ROWS_IN_A_CELL = 10
"""A cell of so many lines, each with as many cells as the table, is no accident: the lines are rows."""
MOST_COMPARED = 1000
"""Lines of a cell that are compared with rows."""

csv.field_size_limit(1 << 30)  # of the csv module; the limit of a row is LONGEST_ROW


class Table:
    """The rows of a table, each a list of cells; it is iterated once."""

    def __init__(self, lines: Iterator[str], separator: str = ",", width: int = 0) -> None:
        self.separator = separator
        self.width = width
        """Cells of a row; 0: not known."""
        self.line = 1
        """Number of the first line of the current row."""
        self.has_open_quote = False
        """The current row has a quote that is not closed, and its first line was read without regard to it."""
        self.is_truncated = False
        """The current row has a quote that is not closed, and its lines are no rows: it has no cells."""
        self._lines = lines
        self._put_back: deque[str] = deque()
        self._taken: list[str] = []
        self._length = 0
        self._at_end = False

    @property
    def num_lines(self) -> int:
        """Return the number of lines of the current row."""
        return len(self._taken)

    def peek(self, number: int) -> list[str]:
        """Return the next lines, which stay where they are."""
        while len(self._put_back) < number and (line := next(self._lines, None)) is not None:
            self._put_back.append(line)
        return list(self._put_back)[:number]

    def __iter__(self) -> Iterator[list[str]]:
        reader = self._reader()
        while True:
            self.line += len(self._taken)
            self._taken.clear()
            self._length = 0
            self.has_open_quote = self.is_truncated = False
            try:
                cells = next(reader, None)
                if cells is None:
                    return
                if len(self._taken) > 1 and self._holds_rows():
                    cells = self._first_line()
            except csv.Error:
                cells = self._mended()
                reader = self._reader()
            yield cells

    def _reader(self) -> Iterator[list[str]]:
        self._at_end = False
        return csv.reader(self._take(), delimiter=self.separator, strict=True)

    def _take(self) -> Iterator[str]:
        """Yield the lines that the parser asks for, until a row is longer than it can be."""
        while self._length <= LONGEST_ROW:
            line = self._put_back.popleft() if self._put_back else next(self._lines, None)
            if line is None:
                break
            self._taken.append(line)
            self._length += len(line)
            yield line
        self._at_end = True

    # --- quotes that are not closed ---

    def _holds_rows(self) -> bool:
        """Return whether the lines of a well-formed row are rows: its quote was left open, and one of a later row closed it.

        Such lines can be meant, so they must be many, or numbered in a column, as is the row after them. In TSV hardly any cell
        has tabs in it.
        """
        lines = self._taken[:MOST_COMPARED]
        if self.width < 2 or any(line.count(self.separator) != self.width - 1 for line in lines):
            return False
        if self.separator == "\t" or len(lines) >= FEWEST_ROWS_IN_A_CELL:
            return True
        rows = [line.split(self.separator) for line in lines] + [self._cells_of(line) for line in self.peek(1)]
        columns = zip(*rows, strict=False)  # a row of several lines may begin in the last
        numbers = ([*map(int, column)] for column in columns if all(cell.isdecimal() and len(cell) < 20 for cell in column))
        return len(lines) > 2 and any(column == sorted(set(column)) for column in numbers)

    def _mended(self) -> list[str]:
        """Return the cells of a row with a quote that is not closed, or not followed by a separator."""
        others = self._taken[1 : 1 + MOST_COMPARED]
        if 2 * sum(len(self._cells_of(line)) == self.width for line in others) >= len(others):
            return self._first_line()
        self.is_truncated = self._at_end
        self.has_open_quote = not self.is_truncated
        return [] if self.is_truncated else next(csv.reader(self._taken, delimiter=self.separator))

    def _first_line(self) -> list[str]:
        """Return the cells of the row's first line; the other lines are rows again."""
        self._put_back.extendleft(reversed(self._taken[1:]))
        del self._taken[1:]
        line = self._taken[0].rstrip("\r\n")
        separator = re.escape(self.separator)
        try:  # there may be spaces between a quote and the separator
            return next(csv.reader([re.sub(f'" +(?={separator}|$)', '"', line)], delimiter=self.separator, strict=True))
        except csv.Error:
            self.has_open_quote = True
            cells = line.split(self.separator)
            return self._cells_of(line) if len(cells) != self.width and self._closes(line) else cells

    def _cells_of(self, line: str) -> list[str]:
        """Return the cells of a line by itself, with quotes wherever they may be."""
        return next(csv.reader([line], delimiter=self.separator), [])

    def _closes(self, line: str) -> bool:
        """Return whether all quotes in a line are closed in it, if not as they should be."""
        reader = csv.reader([line, ""], delimiter=self.separator)
        next(reader, None)
        return reader.line_num == 1

"""The rows of a table as pandas' DataFrames, a chunk at a time: which ones --where wants, and the document of each.

    for row in documents_in(rows, source):      # from Cells(2, ["Title", "The text"]) and Skipped("malformed", ...)
        row                                     # to Document("Title\\nThe text", None) and Skipped, in the same order

All formats with columns come to this. A chunk has only the columns that are wanted, with its cells as Python's objects: a
type that pandas finds for a column depends on the rows that share the chunk, and 2016 and 2016.0 would be two groups.
pandas is imported here only, when the first chunk is there; it reads spreadsheets as well. This module does not know
formats, nor where a table's columns are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any

from lmdist.errors import UsageError, one_line
from lmdist.text.columns import places
from lmdist.text.rows import FILTERED, MALFORMED, MISSING, NOT_TEXT, Cells, Document, Row, Skipped
from lmdist.text.sources import ReadOptions, Source
from lmdist.text.where import Condition

if TYPE_CHECKING:
    from pandas import DataFrame

CHUNK_CHARACTERS = 1 << 17
"""Of a DataFrame: more hardly make it faster, and the progress is that of chunks."""


def documents_in(rows: Iterable[Cells | Row], source: Source) -> Iterator[Row]:
    """Yield the document of each row of a source, or why there is none; rows are read a chunk ahead."""
    chunk: list[Cells | Row] = []
    characters = 0
    for num_rows, row in enumerate(rows, 1):
        chunk.append(row)
        characters += 1
        if isinstance(row, Cells):
            characters += sum(len(value) for value in row.values if isinstance(value, str))
        if characters >= CHUNK_CHARACTERS or num_rows == source.rows_left:
            yield from documents_of(chunk, source.options)
            chunk, characters = [], 0
    yield from documents_of(chunk, source.options)


def documents_of(chunk: Sequence[Cells | Row], options: ReadOptions) -> Iterator[Row]:
    """Yield the document of each row of a chunk, or why there is none."""
    cells = [row for row in chunk if isinstance(row, Cells)]
    documents: Iterator[Row] = iter(())
    if cells:
        from pandas import DataFrame

        frame = DataFrame([row.values for row in cells], index=[row.line for row in cells], dtype=object)
        documents = document_rows(frame, options)
    for row in chunk:
        yield next(documents) if isinstance(row, Cells) else row


def document_rows(frame: DataFrame, options: ReadOptions) -> Iterator[Row]:
    """Yield the document of each row of a DataFrame, whose columns are those of `wanted_columns` and whose index are lines."""
    texts, groups, conditions = places(options)
    wanted = holds(options.condition, frame.iloc[:, conditions]) if options.condition else None
    for number, (line, *cells) in enumerate(frame.itertuples(name=None)):
        if wanted is not None and not wanted[number]:
            yield Skipped(FILTERED)
        else:
            yield document_of(cells[texts], next(iter(cells[groups]), None), line)


def document_of(cells: Sequence[Any], group: Any, line: int) -> Row:
    """Return the document of a row's cells with text, which a line break joins, or why there is none."""
    values = [value for value in cells if value is not None]
    if not values:
        return Skipped(MISSING)
    if not all(isinstance(value, str) for value in values):
        return Skipped(MALFORMED, NOT_TEXT, line)
    text = values[0] if len(cells) == 1 else "\n".join(value for value in values if value and not value.isspace())
    return Document(text, None if group is None or group == "" else str(group))


# --- conditions ----------------------------------------------------------------------------------------------------


def holds(condition: Condition, cells: DataFrame) -> Sequence[bool]:
    """Return for each row whether a condition holds, whose columns `cells` has in the order of `condition.kinds`.

    A cell that is missing is an empty text; as a number it is, as one that is none, equal to nothing and in no order.
    """
    from pandas import DataFrame, Series, to_numeric

    columns: dict[str, Any] = {}
    for number, kind in enumerate(condition.kinds.values()):
        values = cells.iloc[:, number].to_list()
        texts = ["" if value is None else str(value) for value in values]
        series = Series(texts, dtype=object)
        columns[f"column_{number}"] = series if kind == "text" else Series(to_numeric(series, errors="coerce"), dtype=float)
    try:
        frame = DataFrame(columns)
        # What the engine "python" computes does not depend on other packages, and the names can be nothing but these.
        found = frame.query(condition.expression, engine="python", resolvers=[condition.constants])
    except (ArithmeticError, TypeError, ValueError, NotImplementedError, RecursionError) as error:
        raise UsageError(f"{condition} cannot be computed: {one_line(error)}") from None
    return frame.index.isin(found.index).tolist()


# --- spreadsheets --------------------------------------------------------------------------------------------------


def sheets_of(stream: IO[bytes], engine: str) -> dict[str, list[list[str]]]:
    """Return the rows of each sheet of a spreadsheet by its name, as CSV would have them; raises what the engine raises."""
    from pandas import read_excel

    sheets = read_excel(stream, sheet_name=None, header=None, dtype=object, na_filter=False, engine=engine)  # pyright: ignore
    return {
        str(name): [[cell if isinstance(cell, str) else "" if cell != cell else str(cell) for cell in row] for row in rows]
        for name, frame in sheets.items()
        for rows in [frame.itertuples(index=False, name=None)]
    }

"""The rows of Parquet, Feather and ORC, by pyarrow, a row group, a record batch or a stripe at a time.

pandas calls pyarrow for these formats, and reads a file whole; a file may be larger than memory. `to_pydict` is taken and not
`to_pandas`, by which a column of numbers with a null in it has floats: 2016 in one batch and 2016.0 in the next would be two
groups. This module does not know which columns there should be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, TYPE_CHECKING, NamedTuple

from lmdist.errors import DataError, one_line
from lmdist.text.columns import find_columns
from lmdist.text.rows import Cells
from lmdist.text.sources import Source

if TYPE_CHECKING:
    from pyarrow import RecordBatch

ROWS = 1000
"""Of a row group, at a time."""


class Batches(NamedTuple):
    """A file of pyarrow's."""

    names: Sequence[str]
    """Of its columns."""
    parts: int
    """Row groups, record batches or stripes."""
    read: Callable[[int, list[str]], Iterable[RecordBatch]]
    """Returns the batches of a part, with some of the columns."""


def parquet(stream: IO[bytes]) -> Batches:
    """Open a Parquet file."""
    from pyarrow.parquet import ParquetFile

    file = ParquetFile(stream)
    return Batches(
        file.schema_arrow.names,
        file.num_row_groups,
        lambda part, columns: file.iter_batches(ROWS, row_groups=[part], columns=columns),
    )


def feather(stream: IO[bytes]) -> Batches:
    """Open a Feather file, which is a file of Arrow's IPC format."""
    from pyarrow import ipc

    file = ipc.open_file(stream)
    return Batches(file.schema.names, file.num_record_batches, lambda part, columns: [file.get_batch(part).select(columns)])


def orc(stream: IO[bytes]) -> Batches:
    """Open an ORC file."""
    from pyarrow.orc import ORCFile

    file = ORCFile(stream)
    return Batches(file.schema.names, file.nstripes, lambda part, columns: [file.read_stripe(part, columns)])


def read_batches(source: Source, open_file: Callable[[IO[bytes]], Batches]) -> Iterator[Cells]:
    """Yield the rows of a file, without the columns that nobody wants."""
    import pyarrow

    try:
        file = open_file(source.stream)
        columns = [file.names[index] for index in find_columns(file.names, source)]
        for part in range(file.parts):
            for batch in file.read(part, list(dict.fromkeys(columns))):
                cells = batch.to_pydict()
                for values in zip(*(cells[name] for name in columns), strict=True):
                    source.lines += 1
                    yield Cells(source.lines, values)
            source.bytes_read = source.size * (part + 1) // file.parts
    except DataError:
        raise
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # the last two: values that Python has no type for
        raise DataError(f"{source.name} cannot be read: {one_line(error)}") from None

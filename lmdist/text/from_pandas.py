"""From pandas' DataFrames to a data folder, in Python: `lmdist.prepare(frame, "data/news", text_column="content")`.

The frames are written to a temporary CSV, one after the other, which is read as any CSV is: the same text gives the same ids,
worker processes can read it, and what an iterator yields need not fit in memory. This module does not know how text is read.
"""

from __future__ import annotations

import csv
import dataclasses
import multiprocessing
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, get_type_hints

from lmdist.command_line import did_you_mean
from lmdist.console import log
from lmdist.errors import DataError, UsageError
from lmdist.settings import SPLITS, PrepareSettings
from lmdist.storage.schema import find_mismatch
from lmdist.text.documents import Documents
from lmdist.text.prepare import check_output, write
from lmdist.text.sources import ReadOptions

if TYPE_CHECKING:
    from pandas import DataFrame

OF_FILES = ("inputs", *SPLITS, "separator", "header", "lines", "encoding")
"""Settings that a DataFrame has no use for."""
SEPARATOR = "\x1f"
"""Of the temporary CSV: no text has it, so no text looks like rows of a table."""


def prepare(
    frames: DataFrame | Iterable[DataFrame], folder: str | os.PathLike[str], *, overwrite: bool = False, **settings: Any
) -> dict[str, Any]:
    """Write a data folder of the rows of a DataFrame, or of several one after the other, as lmdist-prepare does of a CSV.

    >>> import lmdist, pandas
    >>> sentences = [f"The council met {number} times." for number in range(40)]
    >>> frame = pandas.DataFrame({"year": range(1990, 2030), "content": sentences})
    >>> meta = lmdist.prepare(frame, "data/news", where="year < 2020", tokenizer="wordpunct")
    >>> meta["splits"]["train"]["documents"], meta["skipped"]
    (26, {'filtered': 10})

    `settings` are those of the command, with underscores: text_column, where, group_by, tokenizer, min_count and so on. Only
    `workers` is 1 unless it is given: worker processes import the script that calls this, which must then be guarded by
    `if __name__ == "__main__":`. Returns the content of the folder's meta.json. Raises UsageError (a ValueError)
    for wrong settings, DataError for wrong data.
    """
    known = [field.name for field in dataclasses.fields(PrepareSettings)]
    for name in settings:
        if name in OF_FILES:
            raise UsageError(f"{name} says how files are read, and a DataFrame is none: leave it out")
        if name not in known:
            raise UsageError(f"prepare has no {name}{did_you_mean(name, known)}")
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    hints = get_type_hints(PrepareSettings)
    if problem := find_mismatch(settings, {name: hints[name] for name in settings}):
        raise UsageError(problem.removeprefix("."))
    values = PrepareSettings(**{"workers": 1, **settings})
    values.check_min_count(settings)
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UsageError(
            'worker processes import the script that calls prepare: put the call under `if __name__ == "__main__":`, '
            "or leave workers out"
        )
    check_output(Path(folder), "folder", overwrite=overwrite)
    with tempfile.TemporaryDirectory() as scratch:
        file = FrameFile(Path(scratch) / "frames.csv")
        log(f"copying the rows to {file.path}")
        try:
            write_csv(several(frames), file.path)
        except OSError as error:
            raise DataError(
                f"{file.path} cannot be written: {error.strerror}; the variable TMPDIR names another folder"
            ) from None
        options = ReadOptions.of(dataclasses.replace(values, separator=SEPARATOR), values.text, values.group_by)
        sources = {"": Documents([file], options)}
        return write(values, Path(folder), sources, overwrite=overwrite, given=settings, is_own=False)


def several(frames: DataFrame | Iterable[DataFrame]) -> Iterator[DataFrame]:
    """Yield the frames, one or several; raise UsageError for anything else."""
    many = isinstance(frames, Iterable) and not hasattr(frames, "to_csv")
    given: Iterable[Any] = frames if many else [frames]
    for frame in given:
        if not hasattr(frame, "to_csv") or getattr(frame, "ndim", 0) != 2:
            raise UsageError(f"a DataFrame or an iterator of DataFrames is expected, and this is of {type(frame).__name__}")
        yield frame


def write_csv(frames: Iterator[DataFrame], path: Path) -> None:
    """Write the rows of frames with the same columns to a CSV; raise UsageError for other columns, DataError for none."""
    columns: list[object] | None = None
    with path.open("w", encoding="utf-8", errors="replace", newline="") as file:
        for frame in frames:
            if columns is not None and list(frame.columns) != columns:
                raise UsageError(f"the DataFrames have different columns: {columns}, and then {list(frame.columns)}")
            # All cells in quotes: a carriage return by itself would end the row.
            frame.to_csv(file, sep=SEPARATOR, header=columns is None, index=False, quoting=csv.QUOTE_ALL, lineterminator="\n")
            columns = list(frame.columns)
    if not columns:
        raise DataError("there is no DataFrame in the iterator" if columns is None else "the DataFrame has no columns")


@dataclass(frozen=True)
class FrameFile:
    """The temporary CSV under the name that messages have for it."""

    path: Path
    name: str = "frames.csv"
    can_seek: bool = True
    version: str = ""

    def __str__(self) -> str:
        return "the DataFrame"

    def open(self, mode: Literal["rb"]) -> IO[bytes]:
        """Open the CSV."""
        return self.path.open(mode)

    def size(self) -> int:
        """Return its size in bytes."""
        return self.path.stat().st_size

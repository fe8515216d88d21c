"""The data folder that lmdist-prepare writes: whether it may be written, what writing it meets with, and its last file.

This module does not know what lies in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdist.errors import FULL_DISK, DataError, MissingInputError, UsageError
from lmdist.settings import PrepareSettings
from lmdist.storage.atomic import TakenError, check_output_folder, refuse_to_replace_link
from lmdist.text.data_folder import META, write_meta

if TYPE_CHECKING:
    from lmdist.text.counting import Sources
    from lmdist.text.merging import Merged


def check_output(output: Path, flag: str, *, overwrite: bool) -> None:
    """Raise UsageError where `output` must not be written, or cannot be; `flag` names it in messages."""
    refuse_to_replace_link(output)
    check_output_folder(flag, output.absolute().parent)  # where it is written under another name first
    if not output.exists():
        return
    if not overwrite:
        replace = "--overwrite" if flag.startswith("-") else "overwrite=True"
        raise TakenError(f"{output} exists: give {replace} to replace it, or another {flag}")
    if not output.is_dir() or (any(output.iterdir()) and not (output / META).is_file()):
        raise UsageError(f"{output} is not a data folder, and only one is replaced: give another {flag}")


@contextmanager
def errors_of_writing(output: Path) -> Iterator[None]:
    """Turn the errors of writing a folder into DataError, naming it."""
    try:
        yield
    except MissingInputError:
        raise
    except OSError as error:
        if error.errno in FULL_DISK:
            raise DataError(f"the disk that holds {output} is full: {error.strerror}; nothing was kept") from None
        raise DataError(f"{output} cannot be written: {error}") from None


def finish(folder: Path, merged: Merged, settings: PrepareSettings, sources: Sources) -> dict[str, Any]:
    """Write meta.json beside the other files of a data folder; return its content."""
    from lmdist.text.sources import size_of

    files = [(file, size_of(file)) for documents in sources.values() for file in documents.files]
    return write_meta(folder, merged.vocabulary_size, merged.splits, settings, merged.skipped, files, merged.more)

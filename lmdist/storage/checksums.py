"""The sha256 of each file of a folder: computed when it is written, verified when it is read.

This module does not know where the checksums are stored.
"""

from __future__ import annotations

import hashlib
import os
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict

from lmdist.errors import DataError, MissingInputError
from lmdist.storage.reading import file_size


class FileFacts(TypedDict):
    """What a manifest has of a file."""

    bytes: int
    sha256: str


def checksums(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the size in bytes and the sha256 of each file in `folder`, by name."""
    return {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in sorted(folder.iterdir())}


def verify_checksums(folder: Path, expected: Mapping[str, Any], needed: Iterable[str] = ()) -> None:
    """Raise DataError unless each file named in `expected` exists, with its size and its sha256.

    `needed` are the files that the caller reads. `expected` must name them, or they would go unchecked.
    """
    for name, facts in expected.items():
        path = folder / name
        if path.parent != folder or not name.isprintable():
            raise DataError(f"{folder} names a file outside itself: {reprlib.repr(name)}")
        if os.path.islink(path):
            raise DataError(f"{path} is a link, which may lead anywhere: put the file itself in its place")
        try:
            is_intact = file_size(path) == facts["bytes"] and sha256(path) == facts["sha256"]
        except MissingInputError:
            raise DataError(f"{path} is missing: the folder is damaged") from None
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from None
        if not is_intact:
            raise DataError(f"{path} is damaged: its sha256 is not the one recorded when it was written")
    for name in needed:
        if name not in expected:
            raise DataError(f"{folder} names no sha256 for its {name}, which could hold anything")


def sha256(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""The sha256 of each file of a folder, and the CRC-32 of each block of a large one: computed when written, verified when read.

This module does not know where the checksums are stored.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
import zlib
from collections.abc import Iterable, Mapping, Set
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

from lmdist.errors import DataError, MissingInputError
from lmdist.storage.held import HeldFolder
from lmdist.storage.reading import open_file

BLOCK_BYTES = 1 << 20
"""A MiB is read and summed in a thousandth of a second, and its sum is one of ten thousand of a 10 GB file."""


class FileFacts(TypedDict):
    """What a manifest has of a file."""

    bytes: int
    sha256: str


OWN_CHECKSUM = "sha256"
"""The key of a manifest's own checksum."""


def own_checksum(manifest: dict[str, Any]) -> str:
    """Return the sha256 of a manifest, of all of its values but this one."""
    values = {name: value for name, value in manifest.items() if name != OWN_CHECKSUM}
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def check_own_checksum(manifest: dict[str, Any], path: Path, first_keys: Set[str]) -> None:
    """Raise DataError unless a manifest has the checksum that it holds; the first ones, of `first_keys`, hold none."""
    if OWN_CHECKSUM not in manifest and manifest.keys() <= first_keys:
        return
    with suppress(RecursionError):  # nested more deeply than anything that was written
        if manifest.get(OWN_CHECKSUM) == own_checksum(manifest):
            return
    raise DataError(f"{path} is damaged: its sha256 is not the one recorded when it was written")


def checksums(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the size in bytes and the sha256 of each file in `folder`, by name."""
    return {file.name: facts_of(file) for file in sorted(folder.iterdir())}


def facts_of(file: Path) -> dict[str, Any]:
    """Return the size in bytes and the sha256 of a file."""
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}


def verify_sizes(folder: HeldFolder, expected: Mapping[str, Any], needed: Iterable[str] = ()) -> None:
    """Raise DataError unless each file named in `expected` exists with its size, which takes no time for a large one.

    `needed` are the files that the caller reads. `expected` must name them, or they would go unchecked.
    """
    check_names(folder.path, expected)
    for name, facts in expected.items():
        path = folder.path / name
        try:
            size = folder.size(name)
        except MissingInputError:
            raise DataError(f"{path} is missing: the folder is damaged") from None
        if size != facts["bytes"]:
            raise DataError(f"{path} is damaged: it has {size:,} bytes, and {facts['bytes']:,} were written")
    for name in needed:
        if name not in expected:
            raise DataError(f"{folder.path} names no sha256 for its {name}, which could hold anything")


def verify_checksums(folder: HeldFolder, expected: Mapping[str, Any]) -> None:
    """Raise DataError unless each file named in `expected` has its sha256; `verify_sizes` has checked the names before."""
    for name, facts in expected.items():
        if folder.sha256(name) != facts["sha256"]:
            raise DataError(f"{folder.path / name} is damaged: its sha256 is not the one recorded when it was written")


def check_names(folder: Path, names: Iterable[str]) -> None:
    """Raise DataError for a name that a manifest has and that is not the name of a file in its folder."""
    for name in names:
        if (folder / name).parent != folder or not name.isprintable():
            raise DataError(f"{folder} names a file outside itself: {reprlib.repr(name)}")


def sha256(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def block_checksums(path: Path) -> str:
    """Return the CRC-32 of each block of a file, eight hexadecimal digits each, one after the other.

    They find damage at the place where it is read. Who alters a file on purpose can compute them, as any checksum.
    """
    with open_file(path) as file:
        return "".join(f"{zlib.crc32(block):08x}" for block in iter(partial(file.read, BLOCK_BYTES), b""))

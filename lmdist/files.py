"""Files that are whole or absent, and the sums that prove it.

A folder is written under a hidden name beside its place, synced, and renamed into it. Nobody ever sees half of one,
however the writer ends. Data folders, checkpoints and bundles are all written through here.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lmdist.errors import DataError, MissingInputError


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Give an empty folder to fill: on success it replaces `target`, on any error it vanishes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.parent / f".{target.name}.writing-{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        for file in aside.iterdir():
            sync(file)
        sync(aside)
        if target.exists():
            old = target.parent / f".{target.name}.old-{os.getpid()}"
            target.rename(old)
            aside.rename(target)
            shutil.rmtree(old)
        else:
            aside.rename(target)
        sync(target.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file that is whole or as it was before."""
    aside = path.with_name(f".{path.name}.writing-{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8", newline="\n")
        sync(aside)
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write JSON as people read it."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises MissingInputError or DataError, each naming the file."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise MissingInputError(f"{path} is not there") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path} holds a {type(value).__name__}; a JSON object is expected")
    return value


def sums(folder: Path) -> dict[str, dict[str, Any]]:
    """Name, size in bytes and sha256 of each file in `folder`."""
    return {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in sorted(folder.iterdir())}


def check_sums(folder: Path, expected: dict[str, dict[str, Any]]) -> None:
    """Raise DataError unless each file named in `expected` is there, with its size and its sha256."""
    for name, facts in expected.items():
        path = folder / name
        if path.parent != folder:
            raise DataError(f"{folder} names a file outside itself: {name}")
        if not path.is_file():
            raise DataError(f"{path} is missing: the folder is damaged")
        if path.stat().st_size != facts["bytes"] or sha256(path) != facts["sha256"]:
            raise DataError(f"{path} is damaged: its sha256 is not the one noted when it was written")


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

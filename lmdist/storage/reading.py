"""Read files that a stranger may have written: missing, too large, a link, not a file, not JSON. Each error names the path.

A file of a folder that lmdist writes is opened here, or its size is asked for here first: a link in such a folder may lead
anywhere, so none is followed. (The folder itself may be reached through one.) This module does not know what the files mean;
schema.py checks what JSON holds.
"""

from __future__ import annotations

import json
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

from lmdist.errors import DataError, MissingInputError

MAX_JSON_BYTES = 64 << 20
"""Ten times the text.json of a large corpus. In memory, JSON may take twenty times its size."""


def as_json(value: Any) -> str:
    """Return indented JSON, as the project's files have it."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON."""
    path.write_text(as_json(value), encoding="utf-8", newline="\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raise MissingInputError or DataError, each naming the file."""
    return parse_json(read_bytes(path, MAX_JSON_BYTES), path)


def parse_json(content: bytes, path: Path) -> dict[str, Any]:
    """Return the JSON object that was read from `path`; raise DataError where it is none."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path} holds a {type(value).__name__}; a JSON object is expected")
    return value


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """Read a file; raise MissingInputError, or DataError where it is unreadable or has more than `max_bytes`."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise DataError(f"{path} has {size:,} bytes; at most {max_bytes:,} are expected")
        try:
            return file.read()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from None


def open_file(path: Path) -> BufferedReader:
    """Open a file for reading; raise MissingInputError, or DataError for a link, a folder or a pipe."""
    return os.fdopen(open_descriptor(path), "rb")


def open_descriptor(path: Path, folder: int | None = None) -> int:
    """Open a file for reading, in the folder that is open as `folder`, whatever its path leads to now; raise as `open_file`."""
    file_size(path, folder)
    # Without O_NONBLOCK a pipe that was put into the file's place meanwhile would be waited for.
    flags = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))
    try:
        descriptor = os.open(path if folder is None else path.name, flags, dir_fd=folder)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DataError(f"{path} is not a file, and one is expected")
    return descriptor


def file_size(path: Path, folder: int | None = None) -> int:
    """Return the size of a file in bytes; raise as `open_file`. `folder` is as in `open_descriptor`."""
    try:
        status = os.stat(path if folder is None else path.name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        raise MissingInputError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:  # ValueError: not a possible name
        raise DataError(f"{path} cannot be read: {error}") from None
    if stat.S_ISLNK(status.st_mode):
        raise link_error(path)
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path} is not a file, and one is expected")
    return status.st_size


def refuse_link(path: Path) -> None:
    """Raise DataError for a link."""
    if os.path.islink(path):  # not Path.is_symlink(), which raises where it may not look
        raise link_error(path)


def link_error(path: Path) -> DataError:
    """Return the error for a link."""
    return DataError(f"{path} is a link, which may lead anywhere: put in its place what it leads to")


def check_folder(path: Path, expected: str) -> None:
    """Raise MissingInputError where `path` does not exist, DataError where it is no folder; `expected` ends the message."""
    if not os.path.isdir(path):  # not Path.is_dir(), which raises where it may not look
        if os.path.lexists(path):
            raise DataError(f"{path} is not a folder; {expected}")
        raise MissingInputError(f"{path} does not exist; {expected}")

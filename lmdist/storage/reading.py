"""Read files as if a stranger had made them: missing, too large, not a file, not JSON. Each error names the path."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from lmdist.errors import DataError, MissingInputError

# What text.json holds of a large corpus is a tenth of it. Read, JSON may take twenty times its size.
LARGEST_JSON = 64 << 20


def write_json(path: Path, value: Any) -> None:
    """Write JSON as people read it."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises MissingInputError or DataError, each naming the file."""
    try:
        value = json.loads(read_bytes_of(path, LARGEST_JSON))
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path} holds a {type(value).__name__}; a JSON object is expected")
    return value


def read_bytes_of(path: Path, largest: int) -> bytes:
    """The bytes of a file; raises MissingInputError, or DataError where it is unreadable or has more than `largest`."""
    size = file_size(path)
    if size > largest:
        raise DataError(f"{path} has {size:,} bytes; at most {largest:,} are expected")
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def file_size(path: Path) -> int:
    """The bytes of a file; raises MissingInputError, or DataError where it is a folder or a pipe, which would be waited for."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise MissingInputError(f"{path} is not there") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise DataError(f"{path} cannot be read: {error}") from None
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path} is not a file, and one is expected")
    return status.st_size


def check_folder(path: Path, expected: str) -> None:
    """Raise MissingInputError where nothing is at `path`, DataError where it is no folder; `expected` says what should be."""
    if not os.path.isdir(path):  # not Path.is_dir(), which raises where it may not look
        if os.path.lexists(path):
            raise DataError(f"{path} is not a folder; {expected}")
        raise MissingInputError(f"{path} is not there; {expected}")

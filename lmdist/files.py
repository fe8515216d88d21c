"""Files that are whole or absent, the sums that prove it, and JSON that is what it should be.

A folder is written under a hidden name beside its place, synced, and renamed into it. Nobody ever sees half of one,
however the writer ends. Data folders, checkpoints and bundles are all written through here.

They are read through here too, as if a stranger had made them: with right sums, for sums are easily made, and with wrong
names, types and sizes. `check_shape` is the one place that compares JSON with what is expected of it. This module does not
know what the files mean.
"""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
import shutil
import socket
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TextIO, TypedDict, TypeVar, Union, get_args, get_origin, get_type_hints

from lmdist.errors import DataError, MissingInputError, Stopped, UsageError

# What text.json holds of a large corpus is a tenth of it. Read, JSON may take twenty times its size.
LARGEST_JSON = 64 << 20

SIMPLE = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", NoneType: "null"}

Made = TypeVar("Made")


class FileFacts(TypedDict):
    """What a manifest says of a file."""

    bytes: int
    sha256: str


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Give an empty folder to fill: on success it replaces `target`, on any error it vanishes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    host = socket.gethostname()
    recover(target, host)
    aside = target.parent / f".{target.name}.writing-{host}-{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        for file in aside.iterdir():
            sync(file)
        sync(aside)
        if target.exists():
            old = target.parent / f".{target.name}.old-{host}-{os.getpid()}"
            target.rename(old)
            aside.rename(target)
            shutil.rmtree(old)
        else:
            aside.rename(target)
        sync(target.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def recover(target: Path, host: str) -> None:
    """Remove what writers of this machine left behind when they were killed; put back what one was about to replace."""
    for left in target.parent.iterdir():
        kind, _, process = left.name.removeprefix(f".{target.name}.").partition(f"-{host}-")
        if left.name.startswith(f".{target.name}.") and process.isdigit() and not is_running(int(process)):
            if kind == "old" and not target.exists():
                left.rename(target)
            else:
                shutil.rmtree(left, ignore_errors=True)


def is_running(process: int) -> bool:
    """Whether a process of this machine is there."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def only_one(path: Path, patience: float) -> Iterator[None]:
    """Hold the lock `path`; raises Stopped where another process still holds it after `patience` seconds.

    The kernel lets go of it when its holder ends, however it ends.
    """
    import fcntl  # not everywhere: a machine that only samples may be a Windows one

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        until = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise Stopped(f"{path.parent} is in use by another job: let it end, or take another folder") from None
                time.sleep(0.2)
            except OSError:  # a file system without locks keeps nobody out
                break
        yield


@contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """Give a text file to write: on success it replaces `path`, on any error it vanishes."""
    aside = path.with_name(f".{path.name}.writing-{os.getpid()}")
    try:
        with aside.open("w", encoding="utf-8", newline="\n") as file:
            yield file
        sync(aside)
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file that is whole or as it was before."""
    with whole_file(path) as file:
        file.write(text)


def check_output_file(output: Path) -> None:
    """Raise UsageError where `whole_file` could not write what -o names."""
    if output.exists() and not output.is_file():
        # Not a device either: the file is written aside and renamed, which would replace it.
        raise UsageError(f"-o {output} is not a file; a file's name is expected")
    if not (output.parent.is_dir() and os.access(output.parent, os.W_OK)):
        raise UsageError(f"-o {output}: nothing can be written in {output.parent}; make it first, or give another name")


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
        value = json.loads(read_whole(path, LARGEST_JSON))
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path} holds a {type(value).__name__}; a JSON object is expected")
    return value


def read_whole(path: Path, largest: int) -> bytes:
    """The bytes of a file; raises MissingInputError, or DataError where it is unreadable or has more than `largest`."""
    size = size_of(path)
    if size > largest:
        raise DataError(f"{path} has {size:,} bytes; at most {largest:,} are expected")
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def size_of(path: Path) -> int:
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


def check_version(value: dict[str, Any], expected: tuple[str, int], path: Path) -> None:
    """Raise DataError unless a JSON object says that it has the expected format and version."""
    found = value.get("format"), value.get("version")
    if found != expected:
        raise DataError(
            f"{path} says it is {reprlib.repr(found[0])}, version {reprlib.repr(found[1])}; "
            f"this lmdist reads {expected[0]!r}, version {expected[1]}"
        )


def check_shape(value: Any, shape: Any, path: Path, place: str = "") -> None:
    """Raise DataError, naming the file and the place in it, unless a value of JSON has a shape.

    A shape is a type, as annotations have it: int, float, str, bool, Literal[...], list[...], tuple[..., ...], a tuple of
    certain length, dict[str, ...] or a union; or an object with at least certain keys: a dict of their shapes, a TypedDict or
    a dataclass. Numbers are finite and fit into 64 bits.
    """
    problem = misfit(value, shape)
    if problem:
        raise DataError(f"{path}: {(place + problem).lstrip('. ')}")


def misfit(value: Any, shape: Any) -> str:
    """Where a value does not have a shape, and why not; empty where it has."""
    if isinstance(shape, type) and shape in SIMPLE:
        fits = is_number(value, shape) if shape in (int, float) else isinstance(value, shape)
        return "" if fits else unlike(value, SIMPLE[shape])
    kind, choices = get_origin(shape), get_args(shape)
    if kind in (Union, UnionType):
        problems = [misfit(value, choice) for choice in choices]
        return problems[0] if all(problems) else ""
    if kind is Literal:
        return "" if value in choices else unlike(value, " or ".join(map(repr, choices)))
    if kind in (list, tuple):
        if not isinstance(value, list):
            return unlike(value, "a list")
        each = kind is tuple and choices[-1] is not Ellipsis  # a shape for each item
        if each and len(value) != len(choices):
            return unlike(value, f"a list of {len(choices)}")
        for number, (item, choice) in enumerate(zip(value, choices if each else repeat(choices[0]), strict=False)):
            if problem := misfit(item, choice):
                return f"[{number}]{problem}"
        return ""
    if not isinstance(value, dict):
        return unlike(value, "an object")
    if kind is dict:
        for key, item in value.items():
            if problem := misfit(item, choices[1]):
                return f".{reprlib.repr(key)}{problem}"
        return ""
    for key, expected in (shape if isinstance(shape, dict) else get_type_hints(shape)).items():
        if problem := misfit(value[key], expected) if key in value else " is missing":
            return f".{key}{problem}"
    return ""


def is_number(value: Any, kind: type) -> bool:
    """Whether a value is an int, or a float where that is asked for, and fits into 64 bits."""
    # In Python true is an int; in JSON it is none. And what is no number is not below anything.
    return type(value) in (int, kind) and abs(value) < 2**63


def unlike(value: Any, expected: str) -> str:
    """That a value is not what is expected."""
    return f" is {reprlib.repr(value)}; {expected} is expected"


def build(kind: type[Made], values: dict[str, Any], path: Path, place: str = "") -> Made:
    """Make a dataclass of a JSON object; raises DataError for a name it does not know and for a value it does not take.

    What the object does not name has its default: a field may be younger than the file. A list becomes a tuple.
    """
    hints = get_type_hints(kind)
    for name in values:
        if name not in hints:
            raise DataError(
                f"{path}: {reprlib.repr(name)} is not known {f'in {place}' if place else 'here'}; known are {', '.join(hints)}"
            )
    check_shape(values, {name: hints[name] for name in values}, path, place)
    try:
        return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
    except UsageError as error:
        raise DataError(f"{path}: {one_line(error)}") from None


def one_line(error: Exception) -> str:
    """The message of an error of others: without its line breaks, and cut off where it quotes too much of a file."""
    message = " ".join(str(error).split())
    return message if len(message) <= 300 else f"{message[:300]}..."


def sums(folder: Path) -> dict[str, dict[str, Any]]:
    """Name, size in bytes and sha256 of each file in `folder`."""
    return {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in sorted(folder.iterdir())}


def check_sums(folder: Path, expected: Mapping[str, Any], needed: Iterable[str] = ()) -> None:
    """Raise DataError unless each file named in `expected` is there, with its size and its sha256.

    `needed` are the files that the caller reads: `expected` must name them, or they could hold anything.
    """
    for name, facts in expected.items():
        path = folder / name
        if path.parent != folder or not name.isprintable():
            raise DataError(f"{folder} names a file outside itself: {reprlib.repr(name)}")
        if os.path.islink(path):
            raise DataError(f"{path} is a link, which may lead anywhere: put the file itself there")
        try:
            is_right = size_of(path) == facts["bytes"] and sha256(path) == facts["sha256"]
        except MissingInputError:
            raise DataError(f"{path} is missing: the folder is damaged") from None
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from None
        if not is_right:
            raise DataError(f"{path} is damaged: its sha256 is not the one noted when it was written")
    for name in needed:
        if name not in expected:
            raise DataError(f"{folder} names no sha256 for its {name}, so it may hold anything")


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Atomic files and folders: written under a temporary name, synced to the disk, then renamed into place.

A reader never sees half of one, however the writer ends. Data folders, checkpoints and bundles are all written here. This
module does not know what the files mean.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from lmdist.errors import UsageError


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
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
def atomic_file(path: Path) -> Iterator[TextIO]:
    """Give a text file to write: on success it replaces `path`, on any error it vanishes."""
    aside = path.with_name(f".{path.name}.writing-{os.getpid()}")
    try:
        with aside.open("w", encoding="utf-8", newline="\n") as file:
            yield file
        sync(aside)
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)


def write_atomic(path: Path, text: str) -> None:
    """Write a text file that is whole or as it was before."""
    with atomic_file(path) as file:
        file.write(text)


def check_output_file(output: Path) -> None:
    """Raise UsageError where `atomic_file` could not write what -o names."""
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

"""Atomic files and folders: written under a temporary name, synced to the disk, then renamed.

A reader never sees half of one, whenever the writer is killed. Data folders, checkpoints and bundles are written here. This
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
    """Yield an empty folder to fill: it replaces `target` on success, and is removed on any error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    host = socket.gethostname()
    recover(target, host)
    temporary = target.parent / f".{target.name}.writing-{host}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.iterdir():
            sync(file)
        sync(temporary)
        if target.exists():
            old = target.parent / f".{target.name}.old-{host}-{os.getpid()}"
            target.rename(old)
            temporary.rename(target)
            shutil.rmtree(old)
        else:
            temporary.rename(target)
        sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def recover(target: Path, host: str) -> None:
    """Remove the temporary folders of killed writers on this machine; restore `target` where one was about to replace it."""
    for folder in target.parent.iterdir():
        kind, _, pid = folder.name.removeprefix(f".{target.name}.").partition(f"-{host}-")
        if folder.name.startswith(f".{target.name}.") and pid.isdigit() and not is_running(int(pid)):
            if kind == "old" and not target.exists():
                folder.rename(target)
            else:
                shutil.rmtree(folder, ignore_errors=True)


def is_running(pid: int) -> bool:
    """Return whether a process of this machine exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def atomic_file(path: Path) -> Iterator[TextIO]:
    """Yield a text file to write: it replaces `path` on success, and is removed on any error."""
    temporary = path.with_name(f".{path.name}.writing-{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            yield file
        sync(temporary)
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_file(path) as file:
        file.write(text)


def check_output_file(output: Path) -> None:
    """Raise UsageError where `atomic_file` could not write the file that -o names."""
    if output.exists() and not output.is_file():
        # Devices are rejected as well: the rename would replace them.
        raise UsageError(f"-o {output} is not a file; a file's name is expected")
    if not (output.parent.is_dir() and os.access(output.parent, os.W_OK)):
        raise UsageError(f"-o {output}: nothing can be written in {output.parent}; create it first, or give another name")


def check_output_folder(flag: str, output: Path) -> None:
    """Raise UsageError where nothing could be written in the folder that a flag names, which need not exist yet."""
    place = next(place for place in (output, *output.absolute().parents) if os.path.lexists(place))
    if not os.path.isdir(place):
        raise UsageError(f"{flag}: {place} is not a folder, and is to be one; give another name")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UsageError(f"{flag}: nothing can be written in {place}; give another name")


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

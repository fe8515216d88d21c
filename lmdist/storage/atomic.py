"""Atomic files and folders: written under a temporary name, synced to the disk, then renamed.

A reader never sees half of one, whenever the writer is killed. Data folders, checkpoints and bundles are written here. This
module does not know what the files mean.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from lmdist.errors import UsageError

KINDS = WRITING, OLD, REMOVED = "writing", "old", "removed"
"""The kinds of temporary folders: what is being written, what it is about to replace, what is being removed."""
OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
"""Why a folder cannot be renamed to a name: something else has it."""


class TakenError(UsageError):
    """The name of a new folder is taken: when it was to be written, or since, by another process."""


@contextmanager
def atomic_folder(target: Path, *, replace: bool) -> Iterator[Path]:
    """Yield an empty folder to fill: on success it gets the name `target`, on any error it is removed.

    A folder `target` is replaced if `replace`. Otherwise the name must be free, at the end as well: of two processes that
    write the same new folder the second one gets TakenError.
    """
    refuse_to_replace_link(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    recover(target.parent, re.escape(target.name))
    temporary = target.with_name(temporary_name(target, WRITING))
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.rglob("*"):
            sync(path)
        sync(temporary)
        if replace:
            rename_over(temporary, target)
        else:
            rename_to_free(temporary, target)
        sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_to_replace_link(target: Path) -> None:
    """Raise UsageError for a link, which a rename would replace, and not what it leads to; and for `.` and `..`."""
    if target.name in ("", ".."):
        raise UsageError(f"{target} is a folder without its name; give the name, as in {target / 'news'}")
    if os.path.islink(target):  # not Path.is_symlink(), which raises where it may not look
        raise UsageError(f"{target} is a link, which would itself be replaced: name what it leads to, or take another name")


def rename_to_free(folder: Path, target: Path) -> None:
    """Rename a folder to a name that is still free."""
    try:
        folder.rename(target)
    except OSError as error:
        if error.errno not in OCCUPIED:
            raise
        raise TakenError(
            f"{target} exists: another process has written it meanwhile, so this one's is removed; take another name"
        ) from None


def rename_over(folder: Path, target: Path) -> None:
    """Rename a folder to a name, and remove the folder that had it; another process may be doing the same."""
    old = target.with_name(temporary_name(target, OLD))
    while True:
        with suppress(FileNotFoundError):
            target.rename(old)
        try:
            folder.rename(target)
            break
        except OSError as error:
            if error.errno not in OCCUPIED:
                raise
            shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder; a kill leaves no half of it under its name."""
    removed = folder.rename(folder.with_name(temporary_name(folder, REMOVED)))
    shutil.rmtree(removed)


def recover(parent: Path, name: str, *, everyone: bool = False) -> None:
    """Remove what killed processes left in `parent` of folders whose names match `name`; restore one that was to be replaced.

    The processes are those of this machine; of all machines, whether they run or not, if `everyone`. No other name is
    touched, and no link is followed: whatever else lies there is somebody's own.
    """
    pattern = re.compile(rf"\.(?P<target>{name})\.(?P<kind>{'|'.join(KINDS)})-(?P<host>.+)-(?P<pid>[0-9]{{1,9}})")
    for folder in list(parent.iterdir()):
        match = pattern.fullmatch(folder.name)
        if not match or folder.is_symlink() or not (everyone or is_left_over(match["host"], int(match["pid"]))):
            continue
        if match["kind"] == OLD and not os.path.lexists(parent / match["target"]):
            folder.rename(parent / match["target"])
        else:
            shutil.rmtree(folder, ignore_errors=True)


def temporary_name(target: Path, kind: str) -> str:
    """Return the name of this process's temporary folder, or file, of a kind.

    Two pods that share a volume have the same process ids, but not the same host name.
    """
    return f".{target.name}.{kind}-{socket.gethostname()}-{os.getpid()}"


def is_left_over(host: str, pid: int) -> bool:
    """Return whether a process ran on this machine and is gone; this one has written nothing yet, but may have its number."""
    return host == socket.gethostname() and (pid == os.getpid() or not is_running(pid))


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
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield the name of an empty file to fill: it replaces `path`, also a link, on success, and is removed on any error."""
    temporary = path.with_name(temporary_name(path, WRITING))
    temporary.unlink(missing_ok=True)
    try:
        temporary.touch(exist_ok=False)
        yield temporary
        sync(temporary)
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[TextIO]:
    """Yield a text file to write: it replaces `path` on success, and is removed on any error."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        yield file


def write_atomic(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_file(path) as file:
        file.write(text)


def check_output_file(output: Path, flag: str = "-o") -> None:
    """Raise UsageError where `atomic_file` could not write the file that a flag names."""
    refuse_to_replace_link(output)
    if output.exists() and not output.is_file():
        # Devices are rejected as well: the rename would replace them.
        raise UsageError(f"{flag} {output} is not a file; a file's name is expected")
    if not (output.parent.is_dir() and os.access(output.parent, os.W_OK)):
        raise UsageError(f"{flag} {output}: nothing can be written in {output.parent}; create it first, or give another name")


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

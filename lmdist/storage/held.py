"""A folder that is held open: each of its files is opened once, and the bytes that are checked are the bytes that are used.

    def load(folder: HeldFolder):
        manifest = folder.read_json("manifest.json")
        verify_sizes(folder, manifest["files"], ["vocab.txt"])
        words = folder.read("vocab.txt", MAX_BYTES)
        verify_checksums(folder, manifest["files"])     # of the bytes that were read, and of what is open

    read_held(Path("bundles/demo"), load)

Whatever its name leads to later, a folder stays what it was to who holds it. A file that is opened only after the folder was
replaced is missing, and `read_held` begins anew. Where there are no descriptors of folders (Windows) files are opened by their
paths; a mixture of two folders is then found by its checksums. This module does not know what the files mean.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import os
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from lmdist.errors import DataError, MissingInputError
from lmdist.storage.reading import MAX_JSON_BYTES, check_folder, open_descriptor, parse_json

Result = TypeVar("Result")

TRIES = 50
"""Of `read_held`, where a folder has been replaced: fifty replacements during one reading are none that ends."""
PRIVATE: dict[str, Any] = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
"""How memory is asked for that no other process shares; on Windows it never is."""
DESCRIPTORS = Path("/proc/self/fd")
"""Where Linux has a link to each file that is open, also to one that was removed."""


class HeldFolder:
    """A folder, those of its files that were asked for, and what was read of them.

    Files are closed by `close`, else when the folder is garbage.
    """

    def __init__(self, path: Path, expected: str = "a folder is expected") -> None:
        """Raise MissingInputError where `path` does not exist, DataError where it is no folder; `expected` ends the message."""
        check_folder(path, expected)
        self.path = path
        self.folder = None
        self.descriptors: dict[str, int] = {}
        self.contents: dict[str, bytes | mmap.mmap] = {}
        """What was read, by name."""
        self.when_opened: dict[str, os.stat_result] = {}
        self.is_closed = False
        weakref.finalize(self, close_all, self.descriptors)
        if os.open in os.supports_dir_fd:
            try:
                self.folder = self.descriptors["."] = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            except OSError as error:
                raise DataError(f"{path} cannot be read: {error.strerror}") from None

    def descriptor(self, name: str) -> int:
        """Return the descriptor of a file; raise MissingInputError, or DataError for a link, a folder or a pipe."""
        assert not self.is_closed, f"{self.path / name}: only what was read before the folder was closed is left of it"
        if name not in self.descriptors:
            self.descriptors[name] = open_descriptor(self.path / name, self.folder)
            self.when_opened[name] = os.fstat(self.descriptors[name])
        return self.descriptors[name]

    def close(self) -> None:
        """Close all files: what was read of them stays, and nothing else can be. A removed file that is open keeps its disk."""
        close_all(self.descriptors)
        self.folder, self.is_closed = None, True

    def size(self, name: str) -> int:
        """Return the size of a file in bytes; raise as `descriptor`."""
        self.descriptor(name)
        return self.when_opened[name].st_size

    def file(self, name: str) -> io.FileIO:
        """Return a file at its beginning; it is not to be closed."""
        file = io.FileIO(self.descriptor(name), closefd=False)
        file.seek(0)
        return file

    def read(self, name: str, max_bytes: int) -> bytes:
        """Return what a file holds, read once; raise as `descriptor`, or DataError where it has more than `max_bytes`."""
        if name not in self.contents:
            path, size = self.path / name, self.size(name)
            if size > max_bytes:
                raise DataError(f"{path} has {size:,} bytes; at most {max_bytes:,} are expected")
            try:
                content = self.file(name).readall()
            except OSError as error:
                raise DataError(f"{path} cannot be read: {error.strerror}") from None
            if len(content) != size:
                raise self.was_overwritten(name)
            self.contents[name] = content
        return bytes(self.contents[name])

    def read_json(self, name: str) -> dict[str, Any]:
        """Return the JSON object that a file holds; raise as `read`."""
        return parse_json(self.read(name, MAX_JSON_BYTES), self.path / name)

    def copy(self, name: str) -> mmap.mmap:
        """Return what a large file holds, copied into memory that begins at a page; raise as `descriptor`.

        A file mapped into memory would be changed, or end the process (SIGBUS), by whoever writes into it or truncates it.
        """
        if isinstance(found := self.contents.get(name), mmap.mmap):
            return found
        copy, length = mmap.mmap(-1, max(1, self.size(name)), **PRIVATE), 0
        file = self.file(name)
        try:
            while count := file.readinto(memoryview(copy)[length:]):
                length += count
        except OSError as error:
            raise DataError(f"{self.path / name} cannot be read: {error.strerror}") from None
        if length != self.size(name):
            raise self.was_overwritten(name)
        self.contents[name] = copy
        return copy

    def sha256(self, name: str) -> str:
        """Return the sha256 of a file, in hexadecimal: of what was read, or of what is open."""
        if name in self.contents:
            return hashlib.sha256(self.contents[name]).hexdigest()
        try:
            return hashlib.file_digest(self.file(name), "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{self.path / name} cannot be read: {error.strerror}") from None

    def path_of(self, name: str) -> Path:
        """Return a path to a file that is open, for a library that takes nothing else; `check_unchanged` looks at it."""
        opened = DESCRIPTORS / str(self.descriptor(name))
        return opened if opened.exists() else self.path / name

    def check_unchanged(self, name: str) -> None:
        """Raise DataError if a file was written to since it was opened, or if `path_of` does not lead to it any more."""
        before = self.when_opened[name]
        try:
            found = (os.fstat(self.descriptors[name]), os.stat(self.path_of(name)))
        except OSError:
            raise self.was_overwritten(name) from None
        if any(identity(status) != identity(before) for status in found):
            raise self.was_overwritten(name)

    def was_overwritten(self, name: str) -> DataError:
        """Return the error for a file that was written to while it was read."""
        return DataError(f"{self.path / name} was overwritten while it was read: try again when it is complete")

    def is_replaced(self) -> bool:
        """Return whether the folder's name leads to another folder now, or to none."""
        try:
            return self.folder is not None and not os.path.samestat(os.fstat(self.folder), os.stat(self.path))
        except OSError:
            return True


def read_held(path: Path, read: Callable[[HeldFolder], Result], expected: str = "a folder is expected") -> Result:
    """Return what `read` makes of a folder; of the next one, where it was replaced before all of its files were open.

    Raise as HeldFolder and `read`.
    """
    for number in range(TRIES):
        folder = HeldFolder(path, expected)
        try:
            return read(folder)
        except (DataError, MissingInputError):
            if not folder.is_replaced() or number == TRIES - 1:
                raise
            wait_for(path)
    raise AssertionError(TRIES)


def wait_for(path: Path) -> None:
    """Wait until a folder that is being replaced has its name again, or for a second."""
    for _ in range(100):
        if path.exists():
            return
        time.sleep(0.01)


def identity(status: os.stat_result) -> tuple[int, ...]:
    """Return what tells a file from another one, and from itself after a change."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def close_all(descriptors: dict[str, int]) -> None:
    """Close all files, once."""
    while descriptors:
        os.close(descriptors.popitem()[1])

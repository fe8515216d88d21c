"""Lines of text: read from files and from stdin one after the other, never all at once; written to a file or to stdout.

This module does not know what a command does with a line.
"""

from __future__ import annotations

import os
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from lmdist.console import log
from lmdist.errors import DataError, MissingInputError, UsageError

STDIN = "-"
PROGRESS_SECONDS = 10


class Lines:
    """The lines of files, one after the other, without their line breaks; progress is logged every PROGRESS_SECONDS."""

    def __init__(self, files: Sequence[str], command: str) -> None:
        """Raises MissingInputError or UsageError for a name that is not a file's; `command` is named in the log."""
        self.files = files
        self.command = command
        self.count = 0
        self.place = ""
        """The file and number of the line that was read last."""
        self.began = time.perf_counter()
        for name in files:
            if name != STDIN and not os.path.exists(name):
                raise MissingInputError(f"{name} does not exist; a text file is expected, or {STDIN} for stdin")
            if os.path.isdir(name):
                raise UsageError(f"{name} is a folder; a text file is expected, or {STDIN} for stdin")

    def __iter__(self) -> Iterator[str]:
        self.began = logged = time.perf_counter()
        for name in self.files:
            with opened(name) as file:
                for number, line in enumerate(file, start=1):
                    self.count += 1
                    self.place = f"{'stdin' if name == STDIN else name}, line {number:,}"
                    if time.perf_counter() - logged > PROGRESS_SECONDS:
                        logged = time.perf_counter()
                        log(f"{self.count:,} lines, {self.count / (logged - self.began):,.0f} lines/s", self.command)
                    try:
                        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                    except UnicodeDecodeError as error:
                        raise DataError(
                            f"{self.place}: byte {error.start + 1} is not UTF-8, which is expected; iconv -t UTF-8 converts it"
                        ) from None
                    yield text.rstrip("\r\n")


@contextmanager
def opened(name: str) -> Iterator[IO[bytes]]:
    """Open a file, or stdin; raises DataError where it cannot be read."""
    if name == STDIN:
        yield sys.stdin.buffer
        return
    try:
        with open(name, "rb") as file:
            yield file
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror}") from None


def has_input(stdin: IO[str]) -> bool:
    """Return whether somebody has given text on stdin: a pipe or a file, and no terminal nor /dev/null."""
    try:
        mode = os.fstat(stdin.fileno()).st_mode
    except (OSError, ValueError):  # it is no file
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


@contextmanager
def output_file(path: Path | None, command: str) -> Iterator[IO[str]]:
    """Yield the file to write, which is atomic, or stdout.

    Where the command is interrupted, or its next line cannot be used, the file has what was written before.
    """
    if path is None:
        if sys.__stdout__ is None:
            raise UsageError("stdout is closed: give a file by -o FILE")
        yield sys.stdout
        return
    from lmdist.storage.atomic import atomic_file  # a command that writes to stdout has no need of it

    end: KeyboardInterrupt | DataError | None = None
    with atomic_file(path) as file:
        try:
            yield file
        except (KeyboardInterrupt, DataError) as error:
            if not file.tell():
                raise
            end = error
    if end:
        log(f"{path} has what was done before", command)
        raise end

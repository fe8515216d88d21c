"""stdout and stderr that end no command by a traceback: closed, full, without a reader, or not in UTF-8.

What they do not take is dropped, and the work goes on: a training job needs no console, and a folder is written whether or not
its table is. At the end the command knows whether its stdout was complete. A command that writes until its reader has read
enough, as lmdist-generate does, ends at once. Where they are no terminal, both are in UTF-8, as all files that lmdist writes.
"""

from __future__ import annotations

import atexit
import io
import os
import select
import sys
from contextlib import suppress
from typing import Any


class ResultsError(OSError):
    """stdout has not taken all results: its reader has read enough (EPIPE), or its disk is full."""


class StandardStream(io.FileIO):
    """The bytes of stdout or stderr; the first failure is kept, and raised as ResultsError if `raises`."""

    def __init__(self, descriptor: int, *, raises: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.raises = raises
        self.failure: ResultsError | None = None

    def write(self, content: Any, /) -> int:
        """Write some of the content; return how many bytes were written, or dropped."""
        try:
            while (written := super().write(content)) is None:  # another process has made it non-blocking, and it is full
                select.select([], [self], [])
            return written
        except OSError as error:
            is_first = self.failure is None
            self.failure = self.failure or ResultsError(error.errno, error.strerror)
            if is_first and self.raises:
                raise self.failure from None
            return len(content)


def guard(*, ends_with_reader: bool = False) -> None:
    """Make stdout and stderr as this module says, but not those that a program has replaced already, as tests do.

    `ends_with_reader` has the first write of results that fails raise ResultsError.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # closed: a file opened next would be taken for the console
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream: io.TextIOWrapper | None = getattr(sys, name)
        is_terminal = os.isatty(number)
        if stream is not getattr(sys, f"__{name}__") or (is_terminal and os.name == "nt"):  # Windows' own is no file
            continue
        output = io.TextIOWrapper(
            io.BufferedWriter(StandardStream(number, raises=ends_with_reader and name == "stdout")),
            encoding=stream.encoding if stream and is_terminal else "utf-8",
            errors="backslashreplace",
            newline="\n",
            line_buffering=is_terminal or name == "stderr" or (stream is not None and stream.write_through),
        )
        setattr(sys, name, output)
        atexit.register(drain, output)


def finish() -> None:
    """Write what is left of the results; raise ResultsError unless stdout has taken all of them."""
    sys.stdout.flush()
    output = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if isinstance(output, StandardStream) and output.failure:
        raise output.failure


def drain(output: io.TextIOWrapper) -> None:
    """Write what is left: Python would do so later, and print a traceback of a failure."""
    with suppress(OSError, ValueError):  # ValueError: it was closed
        output.flush()

"""The errors a user can cause, and the exit code of each.

Every command runs inside `exit_on_error`, so that such an error becomes one line on stderr and the exit code of the table
below. Any other exception is a defect in lmdist and keeps its traceback. This module does not know what the commands do.
"""

from __future__ import annotations

import argparse
import errno
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from lmdist.standard_streams import ResultsError, finish, guard

EXIT_DEFECT = 1  # what is not the user's mistake: it has a traceback
EXIT_USAGE = 64  # a wrong flag, key or combination of settings
EXIT_DATA = 65  # the input exists and cannot be used
EXIT_MISSING_INPUT = 66  # the input does not exist
EXIT_AGAIN = 75  # stopped on request: run the same command again

STOP_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)  # not on Windows
]
"""Requests to stop, beside Ctrl-C: of Kubernetes, of a terminal that is closed, of Slurm before a time limit."""
LASTING = {
    getattr(errno, name)
    for name in "ENOENT ENOTDIR EISDIR EEXIST EACCES EPERM EROFS ENAMETOOLONG ELOOP ENXIO ENOSPC EDQUOT EFBIG".split()
    if hasattr(errno, name)
}
"""Reasons why a path cannot be read or written that another try would only repeat."""


class UsageError(ValueError):
    """A wrong flag, key or combination of settings."""

    exit_code = EXIT_USAGE


class DataError(ValueError):
    """An input that exists and cannot be used."""

    exit_code = EXIT_DATA


class MissingInputError(FileNotFoundError):
    """An input that does not exist."""

    exit_code = EXIT_MISSING_INPUT


class Stopped(Exception):
    """Not an error: the job stops early, on request or because a peer is lost, and can be run again."""

    exit_code = EXIT_AGAIN


class CommandParser(argparse.ArgumentParser):
    """argparse, with the project's exit code for wrong usage and one line instead of the usage text."""

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with code 64."""
        self.exit(EXIT_USAGE, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


@contextmanager
def exit_on_error(command: str, *, ends_with_reader: bool = False) -> Iterator[None]:
    """Turn a user's mistake, or what the machine refuses, into one line on stderr and its exit code; a stop into code 75.

    `ends_with_reader` is for a command whose work ends where nobody reads its results any more.
    """
    guard(ends_with_reader=ends_with_reader)
    with interrupted_by(STOP_SIGNALS):
        try:
            yield
            finish()
        except (UsageError, DataError, MissingInputError) as error:
            leave(f"{command}: error: {error}", exit_code_of(error))
        except Stopped as stop:
            leave(f"{command}: {stop}", stop.exit_code)
        except KeyboardInterrupt:
            leave(f"{command}: interrupted", EXIT_AGAIN)
        except ResultsError as error:
            if error.errno == errno.EPIPE:  # `lmdist-generate ... | head` has read enough
                sys.exit(0)
            leave(f"{command}: error: stdout cannot be written: {error.strerror}", EXIT_DATA)
        except OSError as error:
            if exit_code_of(error) == EXIT_DEFECT:
                raise
            leave(f"{command}: error: {f'{error.filename}: ' if error.filename else ''}{error.strerror}", exit_code_of(error))


def exit_code_of(error: Exception) -> int:
    """Return the exit code of a command that ends with an error."""
    if isinstance(error, OSError) and error.errno in LASTING:
        return EXIT_DATA
    return getattr(error, "exit_code", EXIT_DEFECT)


def leave(line: str, code: int) -> NoReturn:
    """Print a line and exit."""
    sys.stderr.write(f"{line}\n")
    sys.exit(code)


@contextmanager
def interrupted_by(signals: list[signal.Signals]) -> Iterator[None]:
    """Have signals raise KeyboardInterrupt, as Ctrl-C does, where they would end the process at once."""
    in_main = threading.current_thread() is threading.main_thread()  # no other thread may set a handler
    changed = [number for number in signals if in_main and signal.getsignal(number) == signal.SIG_DFL]
    for number in changed:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in changed:
            if signal.getsignal(number) is signal.default_int_handler:
                signal.signal(number, signal.SIG_DFL)


def one_line(error: Exception) -> str:
    """Return the message of a library's error without line breaks, cut off where it quotes too much of a file."""
    message = " ".join(str(error).split())
    return message if len(message) <= 300 else f"{message[:300]}..."

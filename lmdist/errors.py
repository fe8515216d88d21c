"""The errors a user can cause, and the exit code of each.

Every command runs inside `exit_on_error`, so that such an error becomes one line on stderr and the exit code of the table
below. Any other exception is a defect in lmdist and keeps its traceback. This module does not know what the commands do.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from lmdist.standard_streams import ResultsError, finish, guard
from lmdist.users import ensure_user

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
FULL_DISK = {getattr(errno, name) for name in "ENOSPC EDQUOT EFBIG".split() if hasattr(errno, name)}
"""Reasons why nothing more can be written until somebody makes room."""
LASTING = FULL_DISK | {
    getattr(errno, name)
    for name in "ENOENT ENOTDIR EISDIR EEXIST EACCES EPERM EROFS ENAMETOOLONG ELOOP ENXIO".split()
    if hasattr(errno, name)
}
"""Reasons why a path cannot be read or written that another try would only repeat."""
CONTROLS = re.compile("[\\x00-\\x1f\\x7f-\\x9f]")
"""Control characters, C0 and C1; a terminal acts on them."""
MESSAGE_CONTROLS = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f]")
"""The same but for those of layout: a tab, a line break."""


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

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Parse, with --max_new_tokens for --max-new-tokens."""
        return super().parse_known_args(self.dashed(sys.argv[1:] if args is None else args), namespace)

    def parse_known_intermixed_args(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Any = None, namespace: Any = None
    ) -> Any:
        """Do the same where options stand between positional arguments."""
        return super().parse_known_intermixed_args(self.dashed(sys.argv[1:] if args is None else args), namespace)

    def dashed(self, words: Sequence[str]) -> list[str]:
        """Return the words of a command line, its own options with dashes for underscores."""
        return respelled(words, "_", "-", self.options)

    @property
    def options(self) -> Collection[str]:
        """Return the options, as they are spelled in --help."""
        return self._option_string_actions

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with code 64."""
        unknown = message.startswith("unrecognized arguments") and re.search(r"--[^\s=]+", message)
        hint = did_you_mean(unknown[0], self.options) if unknown else ""
        self.exit(EXIT_USAGE, f"{self.prog}: error: {escaped(message)}{hint} (see {self.prog} --help)\n")


def respelled(words: Sequence[str], old: str, new: str, options: Collection[str] | None = None) -> list[str]:
    """Return the words of a command line with `new` for `old` in the names of its long options, or of those of `options`."""
    end = words.index("--") if "--" in words else len(words)
    result = list(words)
    for place, word in enumerate(words[:end]):
        name, equals, value = word.partition("=")
        spelled = "--" + name[2:].replace(old, new)
        if name.startswith("--") and (options is None or spelled in options):
            result[place] = spelled + equals + value
    return result


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Return a question for the known name that `given` is most like, or that ends in it (epochs: training.epochs), or ""."""
    from difflib import get_close_matches

    names: dict[str, set[str]] = {}
    for name in known:
        plain = name.lstrip("-").replace("-", "_")
        for part in {plain, plain.rpartition(".")[2]}:
            names.setdefault(part, set()).add(name)
    plain = given.lstrip("-").replace("-", "_")
    close = get_close_matches(plain, names, n=1) or get_close_matches(plain.rpartition(".")[2], names, n=1)
    close = close or [name for name in names if name.startswith(plain)]
    return f"; did you mean {' or '.join(sorted(names[close[0]]))}?" if close else ""


def require(*packages: str, purpose: str = "") -> None:
    """Raise UsageError for a package that is not installed, before hours of work that end in its import."""
    from lmdist.extras import is_installed, not_installed

    for package in packages:
        if not is_installed(package):
            raise UsageError(purpose + not_installed(package))


@contextmanager
def exit_on_error(command: str, *, ends_with_reader: bool = False) -> Iterator[None]:
    """Turn a user's mistake, or what the machine refuses, into one line on stderr and its exit code; a stop into code 75.

    `ends_with_reader` is for a command whose work ends where nobody reads its results any more.
    """
    ensure_user()
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
        except (ImportError, OSError) as error:
            if exit_code_of(error) == EXIT_DEFECT:
                raise
            leave(f"{command}: error: {reason(error)}", exit_code_of(error))


def exit_code_of(error: Exception) -> int:
    """Return the exit code of a command that ends with an error."""
    if isinstance(error, OSError) and error.errno in LASTING:
        return EXIT_DATA
    if isinstance(error, ImportError):
        from lmdist.extras import missing_package

        return EXIT_USAGE if missing_package(error) else EXIT_DEFECT
    return getattr(error, "exit_code", EXIT_DEFECT)


def reason(error: ImportError | OSError) -> str:
    """Return which package is missing, or which path cannot be used and why."""
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    from lmdist.extras import missing_package, not_installed

    return not_installed(missing_package(error) or "")


def run_as_process(main: Callable[[], None]) -> NoReturn:
    """Run the `main` of a process that has imported torch, and end the process at once.

    At Python's own exit a thread of a library that still runs could abort it, and a job that is done, or that is not to be run
    again, would be taken for one that was killed.
    """
    code: object = 0
    try:
        main()
    except SystemExit as leaving:
        code = leaving.code or 0
    except BaseException:
        traceback.print_exc()
        code = EXIT_DEFECT
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else EXIT_DEFECT)


def leave(line: str, code: int) -> NoReturn:
    """Print a line and exit."""
    sys.stderr.write(f"{escaped(line)}\n")
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


def escaped(message: object) -> str:
    """Return a message with its control characters written as \\x1b: it may quote a foreign text, and terminals act on them."""
    return MESSAGE_CONTROLS.sub(lambda match: repr(match[0])[1:-1], str(message))


def one_line(error: Exception) -> str:
    """Return the message of a library's error without line breaks, cut off where it quotes too much of a file."""
    message = " ".join(str(error).split())
    return message if len(message) <= 300 else f"{message[:300]}..."

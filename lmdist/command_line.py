"""What all commands have in common: how their options are spelled, and how they end.

Every command runs inside `exit_on_error`, so that an error of its user becomes one line on stderr and the exit code of
errors.py. Any other exception is a defect in lmdist and keeps its traceback. This module does not know what the commands do.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from lmdist.errors import (
    EXIT_AGAIN,
    EXIT_DATA,
    EXIT_DEFECT,
    EXIT_USAGE,
    DataError,
    MissingInputError,
    Stopped,
    UsageError,
    escaped,
    exit_code_of,
    reason_of,
)
from lmdist.signals import interrupted_by
from lmdist.standard_streams import ResultsError, finish, guard
from lmdist.stop_signals import STOP_SIGNALS
from lmdist.users import ensure_user


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
            leave(f"{command}: error: {reason_of(error)}", exit_code_of(error))


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

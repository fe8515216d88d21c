"""The errors a user can cause, and the exit code of each.

Every command runs inside `exit_on_error`, so that such an error becomes one line on stderr and the exit code of the table
below. Any other exception is a defect in lmdist and keeps its traceback. This module does not know what the commands do.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from lmdist.users import ensure_user

EXIT_USAGE = 64  # a wrong flag, key or combination of settings
EXIT_DATA = 65  # the input exists and cannot be used
EXIT_MISSING_INPUT = 66  # the input does not exist
EXIT_AGAIN = 75  # stopped on request: run the same command again

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

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, with --max_new_tokens for --max-new-tokens."""
        return super().parse_known_args(self.dashed(sys.argv[1:] if args is None else args), namespace)

    def parse_known_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:
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
def exit_on_error(command: str, *, quiet: bool = False) -> Iterator[None]:
    """Turn a user's mistake into one line on stderr and its exit code; `quiet` (ranks other than 0) omits the line."""
    ensure_user()
    try:
        yield
    except (UsageError, DataError, MissingInputError) as error:
        if not quiet:
            sys.stderr.write(f"{command}: error: {escaped(error)}\n")
        sys.exit(error.exit_code)
    except Stopped as stop:
        if not quiet:
            sys.stderr.write(f"{command}: {escaped(stop)}\n")
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        if not quiet:
            sys.stderr.write(f"{command}: interrupted\n")
        sys.exit(EXIT_AGAIN)
    except BrokenPipeError:
        # `lmdist-generate ... | head` has read enough. Python would print the error again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except ImportError as error:
        from lmdist.extras import missing_package, not_installed

        if not (package := missing_package(error)):
            raise
        if not quiet:
            sys.stderr.write(f"{command}: error: {not_installed(package)}\n")
        sys.exit(EXIT_USAGE)


def escaped(message: object) -> str:
    """Return a message with its control characters written as \\x1b: it may quote a foreign text, and terminals act on them."""
    return MESSAGE_CONTROLS.sub(lambda match: repr(match[0])[1:-1], str(message))


def one_line(error: Exception) -> str:
    """Return the message of a library's error without line breaks, cut off where it quotes too much of a file."""
    message = " ".join(str(error).split())
    return message if len(message) <= 300 else f"{message[:300]}..."

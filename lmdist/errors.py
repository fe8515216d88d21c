"""The errors a user can cause, and the exit code of each.

An error of these classes becomes one line on stderr and the exit code of the table below (command_line.py); any other exception
is a defect in lmdist. This module does not know what the commands do.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

EXIT_DEFECT = 1  # what is not the user's mistake: it has a traceback
EXIT_USAGE = 64  # a wrong flag, key or combination of settings
EXIT_DATA = 65  # the input exists and cannot be used
EXIT_MISSING_INPUT = 66  # the input does not exist
EXIT_AGAIN = 75  # stopped on request: to be run again, a training with --resume auto

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


class OwnDataError(DataError):
    """Bad data that one rank of a job may have seen alone, so that it must report them whichever rank it is."""


class MissingInputError(FileNotFoundError):
    """An input that does not exist."""

    exit_code = EXIT_MISSING_INPUT


class Stopped(Exception):
    """Not an error: the job stops early, on request or because a peer is lost, and can be run again."""

    exit_code = EXIT_AGAIN


def require(*packages: str, purpose: str = "") -> None:
    """Raise UsageError for a package that is not installed, before hours of work that end in its import."""
    from lmdist.extras import is_installed, not_installed

    for package in packages:
        if not is_installed(package):
            raise UsageError(purpose + not_installed(package))


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, what it was raised for, and so on."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def missing_package(error: BaseException) -> str | None:
    """Return the package whose absence an error is about, or is caused by, if an extra brings it; else None."""
    from lmdist.extras import EXTRAS, is_installed

    for cause in causes(error):
        package = (cause.name or "").partition(".")[0] if isinstance(cause, ModuleNotFoundError) else ""
        if package in EXTRAS and not is_installed(package):
            return package
    return None


def exit_code_of(error: Exception) -> int:
    """Return the exit code of a command that ends with an error."""
    if isinstance(error, OSError) and error.errno in LASTING:
        return EXIT_DATA
    if isinstance(error, ImportError):
        return EXIT_USAGE if missing_package(error) else EXIT_DEFECT
    return getattr(error, "exit_code", EXIT_DEFECT)


def reason_of(error: ImportError | OSError) -> str:
    """Return which package is missing, or which path cannot be used and why."""
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    from lmdist.extras import not_installed

    return not_installed(missing_package(error) or "")


def escaped(message: object) -> str:
    """Return a message with its control characters written as \\x1b: it may quote a foreign text, and terminals act on them."""
    return MESSAGE_CONTROLS.sub(lambda match: repr(match[0])[1:-1], str(message))


def one_line(error: Exception) -> str:
    """Return the message of a library's error without line breaks, cut off where it quotes too much of a file."""
    message = " ".join(str(error).split())
    return message if len(message) <= 300 else f"{message[:300]}..."

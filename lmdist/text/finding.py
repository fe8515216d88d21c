"""The files that names, addresses and globs mean, and what else there is where they mean none.

    find_files(["news/*.csv.gz", "s3://bucket/articles1.csv"])      # [Path("news/a.csv.gz"), ..., RemoteFile(...)]

This module does not know how files are read.
"""

from __future__ import annotations

import difflib
import glob
import os
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path, PurePath

from lmdist.errors import MissingInputError, UsageError
from lmdist.text.readers import extension_of
from lmdist.text.remote import find_remote, is_remote
from lmdist.text.sources import File, is_pipe, shortened

MOST_NAMES = 1000
"""Of a folder, to see what it has."""


def find_files(patterns: Iterable[str]) -> list[File]:
    """Return the files that names, addresses and globs match, each once; raise MissingInputError naming what does not exist."""
    files: dict[File, None] = {}
    for pattern in patterns:
        if is_remote(pattern):
            for file in find_remote(pattern, files_to_name):
                files[file] = None
            continue
        path = Path(pattern)
        if os.path.isfile(path) or is_pipe(path):  # not Path.is_file(), which raises where it may not look
            files[path] = None
        elif os.path.isdir(path):
            raise UsageError(f"{pattern} is a folder; {files_to_name(glob.escape(str(path)), names_in(path))}")
        elif is_glob(pattern):
            found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if Path(name).is_file()]
            if not found:
                raise MissingInputError(f"no file matches {pattern}{'' if is_glob(str(path.parent)) else near(path)}")
            files |= dict.fromkeys(found)
        else:
            raise MissingInputError(f"{pattern} does not exist{near(path)}")
    return list(files)


def is_glob(name: str) -> bool:
    """Return whether a name has a mark that stands for others."""
    return any(mark in name for mark in "*?[")


def near(path: Path) -> str:
    """Return what else lies in the folder of a missing file, as the rest of a sentence."""
    if not os.path.isdir(path.parent):
        return f"; there is no folder {path.parent}"
    if not os.access(path.parent, os.R_OK | os.X_OK):
        return f"; {path.parent} cannot be listed"
    names = [entry.name for entry in path.parent.iterdir() if entry.is_file()]
    close = difflib.get_close_matches(path.name, names, 5, 0.5) or sorted(names)[:5]
    return f"; {path.parent} has: {', '.join(close)}" if close else f"; {path.parent} has no files"


def names_in(folder: Path) -> Iterator[str]:
    """Yield the names of the files in a folder, and then those of the folders in it, without hidden ones."""
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (os.path.relpath(os.path.join(place, name), folder) for name in names if not name.startswith("."))


def files_to_name(folder: str, files: Iterable[str]) -> str:
    """Return which files to name in a folder that has these, as the rest of a sentence: those of the most frequent format."""
    names = [*islice(files, MOST_NAMES)]
    extensions = Counter(extension for name in names if (extension := extension_of(PurePath(name))))
    if extensions:
        most = min(extensions, key=lambda extension: (-extensions[extension], extension))
        below = "**/" if any("/" in name for name in names if extension_of(PurePath(name)) == most) else ""
        return f"name files in it, like {shlex.quote(f'{folder}/{below}*{most}')}"
    return f"name files in it; it has: {shortened(sorted(names))}" if names else "it has no files"

"""The kinds of damage of fuzz.py: what happens to a file on a disk, and what a stranger may write.

A kind changes the file `path`, or puts something else in its place, and returns what was done, or "" where it means nothing.
A `forged` kind changes what a text says; fuzz.py then writes the checksums of the result, as a stranger could.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lmdist.storage.checksums import OWN_CHECKSUM

HUGE = 40 << 30


def flip(path: Path, draw: random.Random) -> str:
    """Flip a bit."""
    content = bytearray(path.read_bytes())
    if not content:
        return ""
    place = draw.randrange(len(content))
    content[place] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return f"byte {place} of {len(content)}"


def truncate(path: Path, draw: random.Random) -> str:
    """Cut the end off."""
    size = path.stat().st_size
    left = draw.randrange(size) if size else 0
    os.truncate(path, left)
    return f"{left} of {size} bytes" if size else ""


def extend(path: Path, draw: random.Random) -> str:
    """Append zeros, noise, or the beginning of the file."""
    content = path.read_bytes()
    more = draw.choice([bytes(9), draw.randbytes(1000), content[:50] or b"x", b"\n"])
    path.write_bytes(content + more)
    return f"{len(more)} bytes more"


def overwrite(path: Path, draw: random.Random) -> str:
    """Overwrite a piece, with zeros or with what lies elsewhere in the file."""
    content = path.read_bytes()
    start, source = (draw.randrange(len(content) + 1) for _ in range(2))
    piece = draw.choice([bytes(40), content[source : source + 40]])[: len(content) - start]
    path.write_bytes(content[:start] + piece + content[start + len(piece) :])
    return f"{len(piece)} bytes at {start}"


def replace(make: Callable[[Path], object], what: str) -> Callable[[Path, random.Random], str]:
    """Return a kind that puts something else in the file's place."""

    def damage(path: Path, draw: random.Random) -> str:
        path.unlink()
        make(path)
        return what

    return damage


def link(path: Path, draw: random.Random) -> str:
    """Move the file elsewhere, and put a link to it in its place; or a link to another file."""
    outside = next(parent / "outside" for parent in path.parents if (parent / "outside").is_dir())
    target = draw.choice([path.rename(outside / path.name), outside / "secret", outside, Path("/dev/zero")])
    path.unlink(missing_ok=True)
    path.symlink_to(target)
    return f"to {target.name}"


def huge(path: Path, draw: random.Random) -> str:
    """Extend the file to 40 GB, a hole in the disk."""
    os.truncate(path, HUGE)
    return "40 GB"


def foreign(path: Path, draw: random.Random) -> str:
    """Put something of another's beside the file."""
    name = draw.choice([".git", "step-999999999", ".step-000000002.writing-x", "a\x1b[31mb", "é" * 100, "-rf", "core", "a\nb"])
    beside = path.with_name(name)
    if draw.random() < 0.5:
        beside.mkdir()
        (beside / "file").write_text("theirs")
    else:
        beside.write_text("theirs")
    return ascii(name)


NUMBERS = ["-1", "0", "1e400", "NaN", "-Infinity", "1e27", "1e-320", "0.5", str(2**63), str(10**20), "9" * 5000]
CONTROLS = ['"\\u001b[31m"', '"\\u0000"', '"\\u009b"', '"a\\nb"', '"' + "x" * 5000 + '"', '"../x"', "[" * 3000 + "]" * 3000]


LINES = ["\x1b[31mred", "a\x07", "\x9b", "", "x" * 5000, "the", "seed = 1e400", "[" * 5000, "\ud7ff\x00"]


def other_value(values: list[str], kinds: tuple[type, ...]) -> Callable[[Path, random.Random], str]:
    """Return a kind that replaces a value of these types in JSON, and has the checksums of the result: it is forged."""

    def damage(path: Path, draw: random.Random) -> str:
        if path.suffix != ".json":
            return ""
        content = json.loads(path.read_text())
        places = [place for place in places_of(content) if type(place[0][place[1]]) in kinds and place[1] != OWN_CHECKSUM]
        if not places:
            return ""
        holder, key = draw.choice(places)
        before, value = holder[key], draw.choice(values)
        holder[key] = "@"
        path.write_text(json.dumps(content).replace('"@"', value))
        return f"{key} {before!r:.40} -> {value[:40]}"

    return damage


def places_of(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each container below a value of JSON, and each key in it."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield value, key
        yield from places_of(inner)


def other_line(path: Path, draw: random.Random) -> str:
    """Replace a line of a text by one with control characters, and have the checksums of the result."""
    if path.suffix not in (".txt", ".toml", ".jsonl"):
        return ""
    lines = path.read_text().split("\n")
    place = draw.randrange(len(lines))
    lines[place] = draw.choice(LINES)
    path.write_text("\n".join(lines))
    return f"line {place} is {lines[place][:20]!r}"


KINDS: dict[str, Callable[[Path, random.Random], str]] = {
    "flip": flip,
    "truncate": truncate,
    "extend": extend,
    "overwrite": overwrite,
    "empty": replace(Path.touch, "emptied"),
    "removed": replace(lambda path: None, "removed"),
    "folder": replace(Path.mkdir, "a folder"),
    "pipe": replace(os.mkfifo, "a pipe"),
    "link": link,
    "huge": huge,
    "foreign": foreign,
    "forged number": other_value(NUMBERS, (int, float)),
    "forged text": other_value(CONTROLS, (str,)),
    "forged line": other_line,
}

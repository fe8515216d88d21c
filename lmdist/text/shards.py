"""Shards that several machines count: the folder `data/news.shards`, which they share, beside the data folder to be.

    data/news.shards/00003-of-00016/     a shard (shard_files.py), and shard.json: of what it is
    data/news.shards/text-SHA256.json    what all of them learned from the beginning of the text

A shard is atomic. It knows its inputs (names, order, sizes, times of their last change) and the settings that it depends on:
one that is done is not done again, and one of other inputs is neither taken nor kept. What is decided after the counting is no
part of that: the same shards can be merged with another vocabulary and other fractions. This module does not know who counts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lmdist.errors import DataError, MissingInputError, Stopped
from lmdist.settings import PrepareSettings
from lmdist.storage.atomic import atomic_folder, atomic_path
from lmdist.storage.reading import read_json, write_json
from lmdist.text.counting import Report, Sources, count
from lmdist.text.given_vocabulary import GivenVocabulary
from lmdist.text.sources import File, errors_of, size_of
from lmdist.text.tokenizer import WordTokenizer, installed_nltk

SHARD = "shard.json"
NAME = re.compile(r"(\d{5,})-of-(\d{5,})")


def shards_folder(output: Path) -> Path:
    """Return the folder of the shards of a data folder."""
    return output.with_name(f"{output.name}.shards")


def shard_folder(folder: Path, index: int, number: int) -> Path:
    """Return the folder of a shard."""
    return folder / f"{index:05}-of-{number:05}"


def description(sources: Sources, settings: PrepareSettings, base: GivenVocabulary | None) -> dict[str, Any]:
    """Return what the shards of these inputs depend on, as JSON has it; of a base, which tokenizer it brings."""
    tokenizer = base.tokenizer.as_json() if base and base.tokenizer else ""
    value = {
        "format": "lmdist shard",
        "version": 5,  # also where a row is found at another position, by which it belongs to a shard
        "seed": settings.seed,
        "text settings": settings.text.stored(),
        "tokenizer": hashlib.sha256(tokenizer.encode()).hexdigest() if tokenizer else "learned from the text",
        "read settings": {
            split: dataclasses.asdict(documents.options) | {"allow_losses": False}  # that is merge's affair
            for split, documents in sources.items()
        },
        # In their order, on which it depends what a shard reads.
        "files": {split: [[str(file), *stamp(file)] for file in documents.files] for split, documents in sources.items()},
    }
    return json.loads(json.dumps(value))


def stamp(file: File) -> list[int | str]:
    """Return the size of a file, and when it was changed last; of a file elsewhere, what its server says of its content."""
    with errors_of(str(file)):
        return [size_of(file), file.stat().st_mtime_ns if isinstance(file, Path) else file.version]


def learned_once(folder: Path, of: Mapping[str, Any], learn: Callable[[], WordTokenizer]) -> WordTokenizer:
    """Return the tokenizer that another shard of what `of` describes has learned by the same NLTK, or learn it and leave it.

    Until one is done with it all learn, and the same.
    """
    name = hashlib.sha256(json.dumps([of, installed_nltk()]).encode()).hexdigest()[:16]
    path = folder / f"text-{name}.json"
    if not path.exists():
        tokenizer = learn()
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            tokenizer.save(temporary)
    return WordTokenizer.load(path)


def write_shard(
    shard: Path,
    sources: Sources,
    tokenizer: WordTokenizer,
    seed: int,
    of: Mapping[str, Any],
    report: Report = lambda *done: None,
) -> tuple[int, int]:
    """Count a shard of what `of` describes, atomically; return the number of its documents and of its tokens."""
    with atomic_folder(shard, replace=True) as folder:
        found = count(folder, sources, seed, lambda: tokenizer, report)
        write_json(folder / SHARD, of)
    return found


one_at_a_time = threading.Lock()
"""For a Dask worker of several threads: Python runs one of them at a time, and decoding.py has one error handler a process."""


def write_missing_shard(shard: Path, sources: Sources, tokenizer: WordTokenizer, seed: int, of: Mapping[str, Any]) -> None:
    """Do the same where it is not done yet."""
    with one_at_a_time:
        if not is_of(shard, of):
            write_shard(shard, sources, tokenizer, seed, of)


def is_of(shard: Path, of: Mapping[str, Any]) -> bool:
    """Return whether a shard is there, and is one of what `of` describes."""
    try:
        return read_json(shard / SHARD) == of
    except (DataError, MissingInputError):
        return False


def begun(folder: Path, of: Mapping[str, Any]) -> int | None:
    """Return the number that was chosen for the shards of what `of` describes, if one of them is done."""
    names = ((path, match) for path in folder.glob("*-of-*") if (match := NAME.fullmatch(path.name)))
    return next((int(match[2]) for path, match in names if is_of(path, of)), None)


def find_shards(folder: Path, of: Mapping[str, Any]) -> list[Path]:
    """Return all shards of what `of` describes, in order.

    Raises Stopped where some are missing, or are of something else: others may be counting them at this moment.
    """
    names = [match for path in sorted(folder.glob("*-of-*")) if (match := NAME.fullmatch(path.name))]
    others: list[Path] = []
    missing: dict[int, list[int]] = {}
    for number in sorted({int(name[2]) for name in names}):
        shards = [shard_folder(folder, index, number) for index in range(number)]
        wrong = [shard for shard in shards if shard.exists() and not is_of(shard, of)]
        others += wrong
        missing[number] = [index for index, shard in enumerate(shards) if not shard.exists() or shard in wrong]
        if not missing[number]:
            return shards
    if not missing:
        raise Stopped(f"there is no shard in {folder} yet: count them by --shard I/N, and merge then")
    number = min(missing, key=lambda number: len(missing[number]))
    first = ", ".join(map(str, missing[number][:5])) + (" and others" if len(missing[number]) > 5 else "")
    of_others = f"; {others[0]} {difference(others[0], of)}" if others else ""
    raise Stopped(
        f"{len(missing[number])} of {number} shards are not there yet: {first} in {folder}{of_others}: "
        f"count them by --shard {missing[number][0]}/{number}, and merge then"
    )


def difference(shard: Path, of: Mapping[str, Any]) -> str:
    """Return what is wrong with a shard that is not of what `of` describes, as the rest of a sentence."""
    try:
        found = read_json(shard / SHARD)
    except (DataError, MissingInputError) as error:
        return f"is no shard ({error})"
    names = ", ".join(name for name in of if found.get(name) != of[name])
    return f"was counted with something else than is given here ({names})"

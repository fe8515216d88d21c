"""The format of a data folder, for lmdist-prepare, which writes it, and for training, which reads it.

data/news/
    train.bin  valid.bin  test.bin   token ids, little-endian uint16 or uint32, <eos> after each document
    vocab.txt                        the words of the train split by falling frequency: the id is the line number
    text.json                        how text was tokenized, so that prompts are tokenized the same way
    meta.json                        counts, rates of unknown words, settings, sources, sha256 sums
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict

from lmdist import __version__
from lmdist.errors import DataError
from lmdist.settings import SPLITS, PrepareSettings
from lmdist.storage.checksums import FileFacts, check_names, checksums
from lmdist.storage.reading import read_json, write_json
from lmdist.storage.schema import check_schema, check_version
from lmdist.text.remote import without_credentials

FORMAT = "lmdist data"
VERSION = 1

META, VOCABULARY, TEXT = "meta.json", "vocab.txt", "text.json"

Dtype = Literal["uint16", "uint32"]
"""The type of the ids in a token file, little-endian."""


class TokenCount(TypedDict):
    """What a reader relies on in the facts of a split."""

    tokens: int


class SplitFacts(TokenCount):
    """What meta.json has of a split."""

    documents: int
    unknown_tokens: int
    unknown_rate: float


class Meta(TypedDict):
    """What a reader relies on in meta.json."""

    dtype: Dtype
    vocabulary_size: int
    splits: dict[str, TokenCount]
    files: dict[str, FileFacts]


def token_file(split: str) -> str:
    """Return the name of a split's token file."""
    return f"{split}.bin"


def dtype_of(vocabulary_size: int) -> Dtype:
    """Return the smallest type that holds all ids of a vocabulary."""
    return "uint16" if vocabulary_size <= 1 << 16 else "uint32"


def write_meta(
    folder: Path,
    vocabulary_size: int,
    splits: Mapping[str, SplitFacts],
    settings: PrepareSettings,
    skipped: Mapping[str, int],
    sources: Iterable[tuple[object, int]],
) -> dict[str, Any]:
    """Write meta.json beside the other files of a data folder, which must all be there; return its content.

    `sources` are the files that were read, and their sizes in bytes.
    """
    prepare = dataclasses.asdict(settings)
    for name in ("inputs", *SPLITS):
        given = prepare[name]
        prepare[name] = [*map(without_credentials, given)] if isinstance(given, list) else without_credentials(given)
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "lmdist": __version__,
        "dtype": dtype_of(vocabulary_size),
        "vocabulary_size": vocabulary_size,
        "splits": dict(splits),
        "skipped": dict(sorted(skipped.items())),
        "text": dataclasses.asdict(settings.text),
        "prepare": prepare,
        "sources": [{"name": str(file), "bytes": size} for file, size in sources],
        "files": checksums(folder),
    }
    write_json(folder / META, meta)
    return meta


def read_meta(folder: Path) -> dict[str, Any]:
    """Read meta.json, which has at least the keys of `Meta`; raise MissingInputError or DataError, each naming the file."""
    path = folder / META
    meta = read_json(path)
    check_version(meta, (FORMAT, VERSION), path)
    check_schema(meta, Meta, path)
    check_names(folder, meta["files"])
    if not all(split in SPLITS and token_file(split) in meta["files"] for split in meta["splits"]):
        raise DataError(f"{path} is damaged: its splits are not its files")
    return meta

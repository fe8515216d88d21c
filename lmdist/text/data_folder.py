"""The format of a data folder, for lmdist-prepare, which writes it, and for training, which reads it.

data/news/
    train.bin  valid.bin  test.bin   token ids, little-endian uint16 or uint32, <eos> after each document
    train-1.bin  train-2.bin  ...    what of a split is more than FILE_BYTES; all of it is one sequence
    vocab.txt                        the words of the train split by falling frequency: the id is the line number
    text.json                        how text was tokenized, so that prompts are tokenized the same way
    blocks.json                      a checksum of each MiB of the token files, which token_files.py looks at
    meta.json                        counts, rates of unknown words, settings, sources, sha256 sums
"""

from __future__ import annotations

import struct
from collections.abc import Container, Iterable, Mapping
from fnmatch import fnmatch
from itertools import count, takewhile
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from lmdist import __version__
from lmdist.errors import DataError
from lmdist.perplexity import BYTES, WORDS
from lmdist.settings import SPLITS, PrepareSettings
from lmdist.storage.checksums import (
    FileFacts,
    block_checksums,
    check_names,
    checksums,
    facts_of,
    verify_checksums,
    verify_sizes,
)
from lmdist.storage.held import HeldFolder
from lmdist.storage.reading import MAX_JSON_BYTES, read_json, write_json
from lmdist.storage.schema import check_schema, check_version

FORMAT = "lmdist data"
VERSION = 1

META, VOCABULARY, TEXT, BLOCKS = "meta.json", "vocab.txt", "text.json", "blocks.json"
TOKEN_FILES = "*.bin"
FILE_BYTES = 1 << 34
"""Of a token file at most: a larger one takes hours to copy, and from the beginning where that breaks off. A multiple of 4."""
BLOCK_SUMS = "crc32_of_each_mebibyte"
"""The key of blocks.json: by token file, eight hexadecimal digits a block."""

Dtype = Literal["uint16", "uint32"]
"""The type of the ids in a token file, little-endian."""


class TokenCount(TypedDict):
    """What a reader relies on in the facts of a split."""

    tokens: int


class SplitFacts(TokenCount):
    """What meta.json has of a split."""

    documents: int
    original_words: NotRequired[int]
    bytes: NotRequired[int]
    """The `TextSize` of the documents (perplexity.py); folders of before have none."""
    unknown_tokens: int
    unknown_rate: float


class Meta(TypedDict):
    """What a reader relies on in meta.json."""

    dtype: Dtype
    vocabulary_size: int
    splits: dict[str, TokenCount]
    files: dict[str, FileFacts]


def token_file(split: str, number: int = 0) -> str:
    """Return the name of a split's first token file, or of that of another number."""
    return f"{split}-{number}.bin" if number else f"{split}.bin"


def token_files(split: str, files: Container[str]) -> list[str]:
    """Return which of a folder's files are the token files of a split, in the order of its tokens."""
    return [*takewhile(files.__contains__, (token_file(split, number) for number in count()))]


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
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write blocks.json and meta.json beside the other files of a data folder, which must all be there; return meta.json.

    `sources` are the files that were read, and their sizes in bytes; `more` are further entries.
    """
    files = checksums(folder)
    # A file of its own, because each checkpoint has a copy of meta.json; and not among the files there, which say whether two
    # data folders hold the same.
    sums = {file.name: block_checksums(file) for file in sorted(folder.glob(TOKEN_FILES))}
    write_json(folder / BLOCKS, {BLOCK_SUMS: sums})
    prepare = settings.stored()
    del prepare["workers"]  # the data folder is the same whoever writes it
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "lmdist": __version__,
        "dtype": dtype_of(vocabulary_size),
        "vocabulary_size": vocabulary_size,
        "splits": dict(splits),
        "skipped": dict(sorted(skipped.items())),
        "text": settings.text.stored(),
        "prepare": prepare,
        "sources": [{"name": str(file), "bytes": size} for file, size in sources],
        **(more or {}),
        "files": files,
        "blocks": facts_of(folder / BLOCKS),
    }
    write_json(folder / META, meta)
    return meta


def read_meta(folder: Path) -> dict[str, Any]:
    """Read meta.json, which has at least the keys of `Meta`; raise MissingInputError or DataError, each naming the file."""
    return check_meta(read_json(folder / META), folder / META)


def check_meta(meta: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return what was read from a meta.json, which has at least the keys of `Meta`; raise DataError, naming the file."""
    check_version(meta, (FORMAT, VERSION), path)
    check_schema(meta, Meta, path)
    check_names(path.parent, meta["files"])
    if not all(split in SPLITS and token_files(split, meta["files"]) for split in meta["splits"]):
        raise DataError(f"{path} is damaged: its splits are not its files")
    for split, facts in meta["splits"].items():
        if WORDS in facts or BYTES in facts:
            check_schema(facts, {WORDS: int, BYTES: int}, path, f"splits.{split}")
            if min(facts[WORDS], facts[BYTES]) < 1:
                raise DataError(f"{path} is damaged: its split {split} has {facts[WORDS]} words in {facts[BYTES]} bytes")
    return meta


def read_block_sums(folder: HeldFolder, meta: dict[str, Any]) -> dict[str, list[int]]:
    """Return the CRC-32 of each block of each token file, by name; none for a folder of before there were any.

    Raise DataError where they are damaged.
    """
    if "blocks" not in meta:
        return {}
    path = folder.path / BLOCKS
    check_schema(meta, {"blocks": FileFacts}, folder.path / META)
    verify_sizes(folder, {BLOCKS: meta["blocks"]})
    folder.read(BLOCKS, MAX_JSON_BYTES)
    verify_checksums(folder, {BLOCKS: meta["blocks"]})
    value = folder.read_json(BLOCKS)
    check_schema(value, {BLOCK_SUMS: dict[str, str]}, path)
    try:
        sums = {
            name: [number for (number,) in struct.iter_unpack(">I", bytes.fromhex(digits))]
            for name, digits in value[BLOCK_SUMS].items()
        }
    except (ValueError, struct.error) as error:
        raise DataError(f"{path} is damaged: {error}") from None
    for name in meta["files"]:
        if fnmatch(name, TOKEN_FILES) and name not in sums:
            raise DataError(f"{path} is damaged: it has no sums of {name}")
    return sums

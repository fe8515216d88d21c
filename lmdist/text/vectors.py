"""Word vectors in files: word2vec's text format, GloVe's, and fastText's .vec; packed by gzip or otherwise, or not.

    6923 128                      word2vec and fastText begin with the number of words and of numbers a word; GloVe does not
    the 0.0125 -0.2481 ...        then a word a line
    and 0.0731 0.1102 ...

Reading keeps the rows of a vocabulary's words only, so a file of millions of words takes the memory of these. This module
does not know what vectors are used for.

Shapes: V vocabulary, E numbers of a vector.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmdist.errors import DataError, MissingInputError, UsageError
from lmdist.storage.atomic import atomic_file
from lmdist.text.sources import ReadOptions, open_sources
from lmdist.text.vocabulary import Vocabulary

LONGEST_LINE = 1 << 20
"""In bytes: a row of 10,000 numbers has a fifth of it, and a file of word2vec's binary format has no lines."""
HEADER = re.compile(rb"(\d{1,12}) (\d{1,7})\s*")
BY_LOWERCASE, EXACT = 1, 2
"""How a word was found in a file: in another spelling, which is the same in lowercase, or as it is written."""


class Vectors(NamedTuple):
    """The vectors that a file has for the words of a vocabulary."""

    rows: NDArray[np.float32]
    """(V, E); zeros for the words without one."""
    matches: NDArray[np.uint8]
    """How each word was found, (V); 0 where it was not."""


def read_vectors(path: Path, vocabulary: Vocabulary, size: int) -> Vectors:
    """Return the vectors of a file for the words of `vocabulary`, each of `size` numbers.

    A word that the file does not have as it is written takes the first one that is the same in lowercase. Raise
    MissingInputError, DataError for a file that is truncated or has no vectors, UsageError for vectors of another size.
    """
    if not path.exists():
        raise MissingInputError(f"the file of word vectors {path} does not exist")
    found = Vectors(np.zeros((len(vocabulary), size), np.float32), np.zeros(len(vocabulary), np.uint8))
    for source in open_sources(path, ReadOptions(), only_one):
        read_rows(source.stream, source.name, vocabulary, found)
    return found


def only_one(names: Sequence[str]) -> Sequence[str]:
    """Return the name of an archive's only file; raise DataError where there are several."""
    if len(names) > 1:
        raise DataError(f"the archive of word vectors holds {len(names)} files: unpack it, and name one of them")
    return names


def read_rows(stream: io.BufferedReader, name: str, vocabulary: Vocabulary, found: Vectors) -> None:
    """Read a file called `name` from `stream` into `found`."""
    size = found.rows.shape[1]
    spellings: dict[bytes, list[tuple[int, bytes]]] = {}  # of a word in lowercase
    for index, spelling in enumerate(vocabulary.words):
        spellings.setdefault(spelling.lower().encode(), []).append((index, spelling.encode()))
    first = stream.readline(LONGEST_LINE)
    header = HEADER.fullmatch(first)
    check_size(int(header[2]) if header else len(first.split()) - 1, size, name)
    lines = chain([] if header else [first], iter(lambda: stream.readline(LONGEST_LINE), b""))
    place, line, count = name, b"", 0
    for count, line in enumerate(filter(bytes.strip, lines), start=1):
        place = f"{name}: row {count:,}"
        if count == 1:
            row_of(line, size, place)  # a binary file ends here, and not after gigabytes
        word = line.partition(b" ")[0]
        # Most words are in no vocabulary of a corpus, and decoding each would take longer than all else.
        lower = word.lower() if word.isascii() else word.decode(errors="replace").lower().encode()
        for index, spelling in spellings.get(lower, ()):
            match = EXACT if spelling == word else BY_LOWERCASE
            if match > found.matches[index] and (row := row_of(line, size, place)) is not None:
                found.rows[index], found.matches[index] = row, match
    row_of(line, size, place)
    if header and count < int(header[1]):
        raise DataError(f"{name} is truncated: its first line says {int(header[1]):,} words, and it has {count:,}")


def check_size(found: int, size: int, name: str) -> None:
    """Raise UsageError for vectors of another size than the model's, DataError where the first line is none of vectors."""
    if found < 1:
        raise DataError(f"{name} has no word vectors: each line is expected to be a word and its numbers, with spaces between")
    if found != size:
        raise UsageError(
            f"{name} has vectors of {found} numbers, and the model's have {size}: give --model.embedding_size {found}, "
            "or name other vectors"
        )


def row_of(line: bytes, size: int, place: str) -> NDArray[np.float32] | None:
    """Return the vector of a line; None for a word with spaces in it, which no tokenizer finds.

    Raise DataError, naming the `place`, for a line that is none of vectors, as the last one of a truncated file is.
    """
    word, *numbers = line.rstrip().rsplit(b" ", size)
    try:
        with np.errstate(over="ignore"):  # what fp32 cannot hold is infinite, and refused
            row = np.array(numbers, dtype=np.float32)
    except ValueError:
        row = np.zeros(0, np.float32)
    if len(row) != size or not np.isfinite(row).all():
        raise DataError(
            f"{place} is not a word and {size} numbers: the file is truncated or damaged, or it is not in word2vec's text "
            "format, GloVe's or fastText's .vec"
        )
    return None if b" " in word else row


def write_vectors(path: Path, vocabulary: Vocabulary, rows: NDArray[np.float32]) -> None:
    """Write the vectors (V, E) of a vocabulary in word2vec's text format, atomically; reading returns the same numbers."""
    assert rows.dtype == np.float32, rows.dtype
    assert len(rows) == len(vocabulary), (rows.shape, len(vocabulary))
    form = " ".join(["%.9g"] * rows.shape[1])  # nine digits tell any two numbers of fp32 apart
    with atomic_file(path) as file:
        file.write(f"{len(rows)} {rows.shape[1]}\n")
        for word, row in zip(vocabulary.words, rows, strict=True):
            file.write(f"{word} {form % tuple(row.tolist())}\n")

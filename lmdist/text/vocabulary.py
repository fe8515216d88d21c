"""Words and their token ids: `vocab.txt`, one word a line, the line number is the id.

Id 0 is the unknown word, id 1 the end of a document, then the words of the train split by falling frequency. This module
does not know where words come from.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from lmdist.errors import CONTROLS, DataError
from lmdist.storage.reading import read_bytes

MAX_BYTES = 256 << 20
"""Some 25 million words, more than a model of this kind could have."""

UNKNOWN = "<unk>"
END = "<eos>"
UNKNOWN_ID = 0
END_ID = 1


def check_words(words: Iterable[str | bytes]) -> None:
    """Raise TypeError for a text in place of its words: its letters would be taken for them."""
    if isinstance(words, str):
        raise TypeError(f"a list of words is expected, not the text {reprlib.repr(words)}: tokenize(text) returns its words")


def well_formed(text: str) -> str:
    """Return a text without lone surrogates, which JSON and some encodings can write, and no file can hold."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Vocabulary:
    """The words of a model, in the order of their ids; raise DataError for words that cannot be a vocabulary."""

    def __init__(self, words: Iterable[str]) -> None:
        check_words(words)
        self.words = list(words)
        if self.words[:2] != [UNKNOWN, END]:
            raise DataError(
                f"a vocabulary begins with {UNKNOWN} and {END}; this one begins with {reprlib.repr(self.words[:2])}"
            )
        if len(self.ids) != len(self.words):
            raise DataError(f"a vocabulary holds each word once; {len(self.words) - len(self.ids)} of these are repeated")
        if "" in self.ids:
            raise DataError(f"a vocabulary holds words; line {self.ids[''] + 1} of this one is empty")
        if CONTROLS.search("".join(self.words)):  # a terminal would act on them
            line, word = next((line, word) for line, word in enumerate(self.words, 1) if CONTROLS.search(word))
            raise DataError(f"a word holds no control characters; line {line} of this vocabulary is {reprlib.repr(word)}")

    @cached_property
    def ids(self) -> dict[str, int]:
        """Return the id of each word."""
        return {word: index for index, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, words: Iterable[str]) -> list[int]:
        """Return the ids of `words`; a word that is not in the vocabulary has the id of `<unk>`. Raise TypeError for a text."""
        check_words(words)
        ids = self.ids
        return [ids.get(word, UNKNOWN_ID) for word in words]

    def decode(self, ids: Iterable[int]) -> list[str]:
        """Return the words of `ids`."""
        return [self.words[index] for index in ids]

    def save(self, path: Path) -> None:
        """Write one word a line."""
        path.write_text("".join(f"{word}\n" for word in self.words), encoding="utf-8", newline="\n")

    @classmethod
    def load(cls, path: Path, expected: int | None = None, owner: str = "") -> Vocabulary:
        """Read one word a line; raise MissingInputError or DataError, each naming the file.

        There must be as many words as `expected` by their `owner`: lines are counted before memory is allocated for words.
        """
        return cls.parse(read_bytes(path, MAX_BYTES), path, expected, owner)

    @classmethod
    def parse(cls, content: bytes, path: Path, expected: int | None = None, owner: str = "") -> Vocabulary:
        """Return the vocabulary that was read from `path`, as `load` does."""
        lines = content.count(b"\n") + (not content.endswith(b"\n"))
        if expected not in (None, lines):
            raise DataError(f"{path.parent}: {path.name} has {lines} words, {owner} {expected}")
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8: {error}") from None
        try:
            # Not splitlines(): a word may contain one of the rarer line breaks of Unicode.
            return cls(text.removesuffix("\n").split("\n"))
        except DataError as error:
            raise DataError(f"{path}: {error}") from None

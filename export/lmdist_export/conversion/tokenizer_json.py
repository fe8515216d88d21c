"""`tokenizer.json`: the words of `wordpunct` and `whitespace` in the format of Hugging Face's `tokenizers`, id for id the same.

    if not obstacle(settings, vocabulary):
        write_tokenizer(folder, settings, vocabulary)

    tokenizers.Tokenizer.from_file("bundle/tokenizer.json").encode("The president said").ids

A text goes through replacements first, then it is cut into words, then each word is looked up. What a letter, a blank or a
small letter is, differs between Python, Rust and their versions of Unicode. So the file leaves none of it to `tokenizers`: its
classes of characters are written out as Python has them, and capital letters become small by one replacement each, of those
only that could matter to a word of the vocabulary. Another word is `<unk>`, however it is written.

There are no added tokens: `tokenizers` would find `<unk>` inside of words too, where lmdist finds none.

`word_tokenize` follows the rules of NLTK and what Punkt has learnt, which the format cannot say: for it there is no file.
This module needs no `tokenizers`; tests/test_tokenizer_json.py compares the two.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from lmdist.settings import TextSettings
from lmdist.storage.reading import write_json
from lmdist.text.tokenizer import WORDPUNCT
from lmdist.text.vocabulary import END, UNKNOWN, Vocabulary

TOKENIZER = "tokenizer.json"

# All of Unicode; halves of surrogate pairs are no characters, and no UTF-8 file holds one.
CHARACTERS = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))

Replacement = dict[str, Any]


def write_tokenizer(folder: Path, settings: TextSettings, vocabulary: Vocabulary) -> None:
    """Write tokenizer.json into `folder`, for settings and a vocabulary that have no `obstacle`."""
    write_json(folder / TOKENIZER, tokenizer_json(settings, vocabulary))


def obstacle(settings: TextSettings, vocabulary: Vocabulary) -> str:
    """Why the format cannot say how these words are found; empty where it can."""
    if settings.tokenizer == "word_tokenize":
        return "its format has no rules like those of word_tokenize; wordpunct and whitespace it can say"
    if lowers_words(settings) and settings.tokenizer == "wordpunct":
        for capital in filter(breaks_words, capitals()):
            for word in vocabulary.words:
                if capital in word or capital.lower() in word:
                    return f"its format makes letters small before it finds words, and would cut {word!r} at its {capital!r}"
    return ""


def tokenizer_json(settings: TextSettings, vocabulary: Vocabulary) -> dict[str, Any]:
    """The contents of tokenizer.json for settings and a vocabulary that have no `obstacle`."""
    normalizers = [*cleaning(settings), *lowering(settings, vocabulary), *line_ends(settings)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
        "pre_tokenizer": splitting(settings),
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary.ids, "unk_token": UNKNOWN},
    }


def cleaning(settings: TextSettings) -> list[Replacement]:
    """`clean = tutorial`, without the small letters: hyphens become blanks, all other ASCII punctuation goes."""
    if settings.clean != "tutorial":
        return []
    punctuation = character_class(string.punctuation.replace("-", ""))
    return [replace_text("-", " "), replace_pattern(f"[{punctuation}]", "")]


def lowering(settings: TextSettings, vocabulary: Vocabulary) -> list[Replacement]:
    """Capital letters become small, those that decide which word of the vocabulary it is, or where a word ends."""
    if settings.clean != "tutorial" and not settings.lowercase:
        return []
    letters = set("".join(vocabulary.words))
    keeps_words = lowers_words(settings) and settings.tokenizer == "wordpunct"
    replacements = [replace_pattern(final_sigma(inside_words=keeps_words), "ς")] if letters & {"σ", "ς"} else []
    for capital in capitals():
        small = capital.lower()
        decides = capital in letters or letters.issuperset(small)
        if breaks_words(capital):
            # Made small before the text is cut, it would end a word. After the tutorial's cleaning it does; elsewhere lmdist
            # has cut already, and no word of the vocabulary holds it.
            decides = not keeps_words
        if decides:
            replacements.append(replace_text(capital, small))
    return replacements


@cache
def final_sigma(*, inside_words: bool) -> str:
    """The one letter that is made small by its neighbours: Σ is ς behind a letter and not before one, as Python sees it.

    Between it and those letters marks may stand that Unicode calls case-ignorable; `inside_words`, only such as a word holds.
    """
    characters = re.findall(r"\w", CHARACTERS) if inside_words else CHARACTERS
    cased = {character for character in characters if f"{character}Σ".lower().endswith("ς")}
    ignorable = character_class(
        character for character in characters if character not in cased and f"A{character}Σ".lower().endswith("ς")
    )
    letter = character_class(cased)
    return f"[{letter}][{ignorable}]*\\KΣ(?![{ignorable}]*[{letter}])"  # what stands before \K must be there and is kept


def line_ends(settings: TextSettings) -> list[Replacement]:
    """`whitespace` has an end mark between two lines; a line break at the very end begins no line."""
    if settings.tokenizer != "whitespace":
        return []
    return [replace_pattern(r"\n\z", ""), replace_text("\n", f" {END} ")]


def splitting(settings: TextSettings) -> dict[str, Any]:
    """The words of a text: what the blanks leave, or what the pattern of `wordpunct` finds."""
    letter, blank = every(r"\w"), every(r"\s")
    if settings.tokenizer == "whitespace":
        return {"type": "Split", "pattern": {"Regex": f"[{blank}]+"}, "behavior": "Removed", "invert": False}
    pattern = f"[{letter}]+|[^{letter}{blank}]+"
    # Inverted: what the pattern does not find is removed.
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Removed", "invert": True}


def lowers_words(settings: TextSettings) -> bool:
    """Whether letters become small in words that are found already, not in the text."""
    return settings.lowercase and settings.clean != "tutorial"


@cache
def capitals() -> tuple[str, ...]:
    """The characters that are others in small."""
    return tuple(character for character in CHARACTERS if character.lower() != character)


@cache
def every(pattern: str) -> str:
    """The class of all characters that Python finds by a pattern."""
    return character_class(re.findall(pattern, CHARACTERS))


def breaks_words(capital: str) -> bool:
    """Whether a capital letter stands inside a word of `wordpunct`, and in small does not: İ, which becomes i and a dot."""
    return len(WORDPUNCT.findall(f"x{capital}x")) != len(WORDPUNCT.findall(f"x{capital.lower()}x"))


def character_class(characters: Iterable[str]) -> str:
    """The inside of a regular expression's brackets, for these characters and no others."""
    ranges: list[list[int]] = []
    for code in sorted(map(ord, characters)):
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(f"\\x{{{first:X}}}-\\x{{{last:X}}}" for first, last in ranges)


def replace_text(old: str, new: str) -> Replacement:
    """A replacement of each `old` as it stands."""
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def replace_pattern(pattern: str, new: str) -> Replacement:
    """A replacement of each match of a regular expression."""
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": new}

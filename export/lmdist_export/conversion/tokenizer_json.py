"""`tokenizer.json`: the words of all tokenizers but `word_tokenize` in the format of Hugging Face's `tokenizers`, id for id.

    if not obstacle(tokenizer.settings, vocabulary):
        write_tokenizer(folder, tokenizer, vocabulary)

    tokenizers.Tokenizer.from_file("bundle/tokenizer.json").encode("The president said").ids

The file has replacements, then a split into words, then a lookup. Python, Rust and their versions of Unicode differ in what a
letter, whitespace or lowercase is, so the file leaves none of it to `tokenizers`: its character classes are spelled out as
Python has them, and uppercase letters are replaced one by one, those only that could matter to a word of the vocabulary. Any
other word is `<unk>`, however it is written. Only Unicode's normal form C is left to `tokenizers`, whose Unicode is older: it
keeps several marks on one letter in their order if one of them is younger than it.

There are no added tokens: `tokenizers` would find `<unk>` inside words too, where lmdist does not.

Pieces of words have a file of their own, which is written as it is. The format cannot express `word_tokenize`, which follows
NLTK's rules and what Punkt has learned, nor HTML. This module does not import `tokenizers`;
tests/conversion/test_tokenizer_json.py compares the two.
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
from lmdist.text.detokenizer import SPACE
from lmdist.text.tokenizer import FIRST_RULES, INVISIBLE, LETTER, MARK, WORDPUNCT, WordTokenizer, pattern
from lmdist.text.vocabulary import END, UNKNOWN, Vocabulary

TOKENIZER = "tokenizer.json"

# All of Unicode; halves of surrogate pairs are no characters, and no UTF-8 file holds one.
CHARACTERS = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))

Replacement = dict[str, Any]


def write_tokenizer(folder: Path, tokenizer: WordTokenizer, vocabulary: Vocabulary) -> None:
    """Write tokenizer.json into `folder`, for a tokenizer and a vocabulary that have no `obstacle`.

    That of pieces is what they were learned as, or read from: its ids are those of lmdist.
    """
    model = tokenizer.model
    write_json(folder / TOKENIZER, model.saved["model"] if model else tokenizer_json(tokenizer.settings, vocabulary))


def obstacle(settings: TextSettings, vocabulary: Vocabulary) -> str:
    """Return why the format cannot express this tokenizer, or "" if it can."""
    if settings.tokenizer == "sentencepiece":
        return "its format cannot express a model of SentencePiece exactly; text.json has the model"
    if settings.line_breaks:
        return "it has no tokens for line breaks"
    if settings.has_pieces and (settings.clean != "none" or settings.lowercase):
        return "it has pieces of text as it is, and this model's text is cleaned first"
    if settings.tokenizer == "word_tokenize":
        return "its format cannot express the rules of word_tokenize; it can those of the other tokenizers"
    if settings.clean == "html":
        return "its format cannot express the cleaning of HTML"
    if lowers_words(settings) and settings.tokenizer == "wordpunct":
        for capital in (capital for capital in capitals() if breaks_words(capital, settings)):
            for word in vocabulary.words:
                if capital in word or capital.lower() in word:
                    return f"its format lowercases before it splits, and would split {word!r} at its {capital!r}"
    return ""


def tokenizer_json(settings: TextSettings, vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the contents of tokenizer.json, for settings and a vocabulary that have no `obstacle`."""
    normalizers = [*spelling(settings), *cleaning(settings), *lowering(settings, vocabulary), *spaces(settings)]
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


def spelling(settings: TextSettings) -> list[Replacement]:
    """Return the steps by which two spellings of a word become one: no invisible characters, and normal form C."""
    if settings.rules == FIRST_RULES:
        return []
    form = {"type": "NFC"}
    return [form] if settings.tokenizer == "whitespace" else [*visible(), form]


def visible() -> list[Replacement]:
    """Return the replacements of characters that nobody sees."""
    return [replace_text("\u200b", " "), replace_pattern(f"[{every(INVISIBLE.pattern)}]", "")]


def cleaning(settings: TextSettings) -> list[Replacement]:
    """Return the replacements of `clean = tutorial`, lowercase aside: hyphens by spaces, other ASCII punctuation by nothing."""
    if settings.clean != "tutorial":
        return []
    punctuation = character_class(string.punctuation.replace("-", ""))
    return [replace_text("-", " "), replace_pattern(f"[{punctuation}]", "")]


def lowering(settings: TextSettings, vocabulary: Vocabulary) -> list[Replacement]:
    """Return the replacements of uppercase letters that decide which word of the vocabulary it is, or where a word ends."""
    if settings.clean != "tutorial" and not settings.lowercase:
        return []
    letters = set("".join(vocabulary.words))
    keeps_words = lowers_words(settings) and settings.tokenizer == "wordpunct"
    one_by_one = lowers_words(settings) and settings.tokenizer == "characters"  # no Σ stands at the end of a word
    replacements: list[Replacement] = []
    if letters & {"σ", "ς"} and not one_by_one:
        replacements.append(replace_pattern(final_sigma(word_character(settings) if keeps_words else r"[\s\S]"), "ς"))
    for capital in capitals():
        small = capital.lower()
        decides = capital in letters or letters.issuperset(small)
        if breaks_words(capital, settings):
            # Lowercased before the split, it would end a word. After the tutorial's cleaning it does; elsewhere lmdist has
            # split already, and no word of the vocabulary has it.
            decides = not keeps_words
        if decides:
            replacements.append(replace_text(capital, small))
    return replacements


@cache
def final_sigma(between: str) -> str:
    """Return the pattern of the Σ that is lowercased to ς: after a letter and not before one, as Python sees it.

    Characters that Unicode calls case-ignorable may lie between, those that match the expression `between`.
    """
    characters = matching(between)
    cased = {character for character in characters if f"{character}Σ".lower().endswith("ς")}
    ignorable = character_class(
        character for character in characters if character not in cased and f"A{character}Σ".lower().endswith("ς")
    )
    letter = character_class(cased)
    return f"[{letter}][{ignorable}]*\\KΣ(?![{ignorable}]*[{letter}])"  # what stands before \K must be there and is kept


def spaces(settings: TextSettings) -> list[Replacement]:
    """Return the replacements of whitespace that is a token.

    `whitespace` has `<eos>` between two lines, and none after the last; `characters` has a SPACE between two words.
    """
    if settings.tokenizer == "whitespace":
        return [replace_pattern(r"\n\z", ""), replace_text("\n", f" {END} ")]
    if settings.tokenizer == "characters":
        space = every(r"\s")
        return [replace_pattern(rf"\A[{space}]+|[{space}]+\z", ""), replace_pattern(f"[{space}]+", SPACE)]
    return []


def splitting(settings: TextSettings) -> dict[str, Any]:
    """Return the split into words: by whitespace, or by the pattern of `wordpunct` or `characters`."""
    space = every(r"\s")
    if settings.tokenizer == "whitespace":
        return {"type": "Split", "pattern": {"Regex": f"[{space}]+"}, "behavior": "Removed", "invert": False}
    letter, mark = (every(r"\w"), "") if settings.rules == FIRST_RULES else (every(f"[{LETTER}]"), every(f"[{MARK}]"))
    words = f"[^{space}][{mark}]*" if settings.tokenizer == "characters" else f"[{letter}][{letter}{mark}]*|[^{letter}{space}]+"
    # Inverted: what the pattern does not find is removed.
    return {"type": "Split", "pattern": {"Regex": words}, "behavior": "Removed", "invert": True}


def word_character(settings: TextSettings) -> str:
    """Return the expression of a character that a word of `wordpunct` may have."""
    return r"\w" if settings.rules == FIRST_RULES else f"[{LETTER}{MARK}]"


def lowers_words(settings: TextSettings) -> bool:
    """Return whether words are lowercased after the split, not the text before it."""
    return settings.lowercase and settings.clean != "tutorial"


@cache
def capitals() -> tuple[str, ...]:
    """Return the characters that lowercase changes."""
    return tuple(character for character in CHARACTERS if character.lower() != character)


@cache
def every(expression: str) -> str:
    """Return the class of all characters that match a regular expression."""
    return character_class(matching(expression))


def matching(expression: str) -> list[str]:
    """Return all characters that match a regular expression, as the tokenizer reads it."""
    compile_ = pattern if r"\p" in expression else re.compile
    return compile_(expression).findall(CHARACTERS)


def breaks_words(capital: str, settings: TextSettings) -> bool:
    """Return whether an uppercase letter is part of a word of `wordpunct`, and its lowercase is not: İ is i and a mark."""
    separates_marks = settings.rules == FIRST_RULES
    return separates_marks and len(WORDPUNCT.findall(f"x{capital}x")) != len(WORDPUNCT.findall(f"x{capital.lower()}x"))


def character_class(characters: Iterable[str]) -> str:
    """Return the inside of a regular expression's brackets for exactly these characters."""
    ranges: list[list[int]] = []
    for code in sorted(map(ord, characters)):
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(f"\\x{{{first:X}}}-\\x{{{last:X}}}" for first, last in ranges)


def replace_text(old: str, new: str) -> Replacement:
    """Return a replacement of each literal `old`."""
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def replace_pattern(pattern: str, new: str) -> Replacement:
    """Return a replacement of each match of a regular expression."""
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": new}

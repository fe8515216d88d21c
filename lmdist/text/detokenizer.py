"""From words back to readable text: where a space stands between two words, in the languages that write spaces.

A space depends on earlier words, never on later ones, so that text can be streamed. What a punctuation mark is follows from
its category in Unicode; quotes and apostrophes, which languages use in opposite ways, follow from what is open. This module
does not know how text was split, beside the name of the tokenizer.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache

from lmdist.text.vocabulary import END

SPACE = "\u2581"
"""The word of `characters` that is a space; SentencePiece's sign."""

LINE_BREAK = "<nl>"
"""The word that is a line break, where these are tokens; no tokenizer of words finds it in a text."""

OPENING = frozenset("([{<#@¿¡")
CLOSING = frozenset(")]}>.,:;?!%")
NEUTRAL = frozenset("§¶†‡•‣※⁂\"'*/\\&")
"""Punctuation with a space on both sides."""
INNER = frozenset("-/_‐‑\u05be\u05f3\u05f4՛՞՜\u0f0b")
"""Punctuation inside words, where wordpunct splits them: hyphens; maqaf and geresh; Armenian's stresses; Tibetan's tsheg."""

CLOSES = {"“": "”", "„": "“”", "‚": "‘’", "‘": "’", "”": "”", "«": "»", "»": "«»", "‹": "›", "›": "‹›"}
"""What closes each opening quote: “English”, „German“, „Polish”, ”Swedish”, «French», »Danish«, »Finnish»."""

CLITICS = frozenset({"'s", "'m", "'d", "'ll", "'re", "'ve", "n't"})
# NLTK splits these in two.
PAIRS = frozenset(
    {("can", "not"), ("d", "'ye"), ("gim", "me"), ("gon", "na"), ("got", "ta"), ("lem", "me"), ("more", "'n")}
    | {("wan", "na"), ("'t", "is"), ("'t", "was")}
)
SECONDS = frozenset(second for _, second in PAIRS)
# What follows the apostrophe of a word that was split at it: it's, don't, we'll.
AFTER_APOSTROPHE = frozenset({"s", "t", "m", "d", "ll", "re", "ve"})
# What precedes the apostrophe of a word that was split at it: l'homme, c'est, dell'anno, O'Brien.
BEFORE_APOSTROPHE = frozenset(
    """
    c d j l m n s t qu lorsqu puisqu jusqu quoiqu presqu quelqu aujourd un dell all nell sull dall coll quell quest gl dov com
    cos anch senz tutt mezz o
    """.split()
)


MAX_CACHED, MAX_CHARACTERS = 2**15, 40
"""How many words are remembered, and the longest of them: some megabytes."""


@dataclass
class Place:
    """Where a text is that is being written: all that the next word depends on."""

    quotes: list[str] = field(default_factory=list)
    """Those that are open."""
    before: str = ""
    """The word before."""
    glue: bool = True
    """Whether the next word follows without a space."""
    incomplete: bytes = b""
    """The first bytes of a character, where there are pieces of words."""

    def copy(self) -> Place:
        """Return the same place, from which another text goes on."""
        return replace(self, quotes=[*self.quotes])


def pieces(words: Iterable[str], tokenizer: str, place: Place | None = None) -> Iterator[str]:
    """Yield each word as it is written in text; the space before it depends on earlier words, never on later ones.

    A text goes on from its `place`, which is kept up to date.
    """
    place = place or Place()
    for word in words:
        if word == END:
            place.quotes.clear()
            place.before, place.glue = "", True
            yield "\n" if tokenizer == "whitespace" else "\n\n"
        elif word == LINE_BREAK and tokenizer != "whitespace":
            place.before, place.glue = "", True
            yield "\n"
        elif tokenizer == "characters":
            yield " " if word == SPACE else word
        else:
            text, left, right = spaced(word, place.before, place.quotes, wordpunct=tokenizer == "wordpunct")
            glue = left or place.glue
            place.before, place.glue = word, right
            yield text if glue else f" {text}"


def spaced(word: str, before: str, quotes: list[str], *, wordpunct: bool) -> tuple[str, bool, bool]:
    """Return a word as it is written, and whether it needs no space on its left and on its right; update the open quotes."""
    if len(word) <= MAX_CHARACTERS and is_plain(word):
        return word, False, False
    if not wordpunct:  # which has the text's own signs
        if word == "``":
            return '"', False, True
        if word == "''":
            return '"', True, False
        if len(word) == 3 and word[0] == word[2] == "@":  # WikiText's notation for a - , or . inside a word or number
            return word[1], True, True
    if any(map(str.isalnum, word)):
        lower = word.lower()
        left = (
            lower in CLITICS
            or (before.lower(), lower) in PAIRS
            or (lower == "'t" and before[-1:] in ("n", "N"))
            or (before in ("'", "’") and lower in AFTER_APOSTROPHE)
        )
        return word, left, False
    if wordpunct and (word in INNER or (word == "·" and before[-1:] in ("l", "L"))):  # Catalan's l·l
        return word, before != "", before != ""
    if word in ("'", "’") and (sides := apostrophe(word, before, quotes, wordpunct=wordpunct)):
        return word, *sides
    return word, *punctuation(word, before, quotes)


@lru_cache(MAX_CACHED)
def is_plain(word: str) -> bool:
    """Return whether a word has a space on both sides whatever is before it, by any tokenizer: most words."""
    lower = word.lower()
    joins = lower in CLITICS or lower in AFTER_APOSTROPHE or lower in SECONDS or lower == "'t"
    return any(map(str.isalnum, word)) and not joins and not (word[0] == word[-1] == "@")


def apostrophe(word: str, before: str, quotes: list[str], *, wordpunct: bool) -> tuple[bool, bool] | None:
    """Return the sides that need no space of an apostrophe that belongs to the word before, or None if it is a quote."""
    if before.lower() in BEFORE_APOSTROPHE or "\u0400" <= before[-1:] <= "\u052f":  # Ukrainian has it inside words
        return True, True
    # The boys' books, or, in wordpunct, it ' s.
    if word == "'" and before[-1:].isalnum() and (wordpunct or before[-1] in "sS"):
        if word in quotes:
            quotes.remove(word)
        return True, False
    return None


def punctuation(run: str, before: str, quotes: list[str]) -> tuple[bool, bool]:
    """Return whether a run of punctuation needs no space on its left and on its right."""
    sides: list[tuple[bool, bool]] = []
    for position, mark in enumerate(run):
        if mark in CLOSES or mark in "\"'’":
            # In a run the quote after a full stop closes, and so does that before a comma.
            beside = (position > 0 and sides[-1] == (True, False)) or closes(run[position + 1 : position + 2])
            sides.append(quote(mark, quotes, closing=beside))
        else:
            sides.append((closes(mark), opens(mark, before)))
    wide = any(map(is_wide, run))  # also the quotes beside such a mark
    return sides[0][0] or wide, sides[-1][1] or wide


def quote(mark: str, quotes: list[str], *, closing: bool) -> tuple[bool, bool]:
    """Return whether a quote needs no space on its left, since it closes, or on its right, since it opens."""
    for opening in reversed(quotes):
        if mark in CLOSES.get(opening, opening):
            quotes.remove(opening)
            return True, False
    if closing or mark == "’":
        return True, False
    if mark not in quotes:  # each paragraph of a long quotation begins with one
        quotes.append(mark)
    return False, True


@cache
def closes(mark: str) -> bool:
    """Return whether punctuation follows a word without a space: . and ) in any script; East Asian marks need no spaces."""
    if mark.isascii():  # "" too, which is none of them
        return mark in CLOSING
    category = unicodedata.category(mark)
    return category in ("Pe", "Pf") or (category == "Po" and mark not in (OPENING | NEUTRAL)) or is_wide(mark) or is_mark(mark)


def opens(mark: str, before: str) -> bool:
    """Return whether a word follows punctuation without a space: ( and $ in any script, but not the € of "5 €"."""
    category = unicodedata.category(mark)
    if category == "Sc":
        return not before[-1:].isdigit()
    return mark in OPENING or category in ("Ps", "Pi") or is_wide(mark)


@cache
def is_wide(mark: str) -> bool:
    """Return whether a mark is East Asian punctuation, which has its space inside."""
    return unicodedata.east_asian_width(mark) in ("W", "F") and unicodedata.category(mark)[0] == "P"


@cache
def is_mark(character: str) -> bool:
    """Return whether a character combines with the one before it: an accent, a vowel sign, a joiner."""
    return unicodedata.category(character)[0] == "M" or character in "\u200c\u200d"

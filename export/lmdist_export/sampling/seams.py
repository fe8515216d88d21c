"""Token healing: what a text begins with whose prompt ends where a piece of a word may go on.

    seam = seam_of(tokenizer, words, tokens, space=False)       # None where a prompt is continued as it is
    seam.removed, seam.given, seam.begin

"the quick bro" is read as the pieces of a text that ends there, with ▁bro, which the model has hardly seen before wn. So the
last piece of a prompt is taken back, and the first piece of its text is one of those that begin with what was taken: ▁bro,
▁brown, ▁broken. After a space at the end it is one that begins with the space. Where no other piece begins so, nothing is
taken back. Scott Lundberg describes it in "The Art of Prompt Design: Prompt Boundaries and Token Healing" (2023); the library
guidance does it. This module knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lmdist.text.tokenizer import WordTokenizer
from lmdist.text.vocabulary import END_ID, UNKNOWN_ID


class Begin(NamedTuple):
    """What a text begins with."""

    tokens: tuple[int, ...] = ()
    """Its first token is one of these; of none, it may be any."""
    overlap: int = 0
    """The bytes of it that the prompt has already."""
    again: int | None = None
    """The one that was taken back from the prompt. Where it comes again it is no part of the text."""


ANYTHING = Begin()


class Seam(NamedTuple):
    """Where a prompt ends and its text begins."""

    removed: int
    """The last tokens of the prompt that are taken back: none or one."""
    given: str
    """What the first token of the text writes that the prompt has already."""
    begin: Begin


def seam_of(tokenizer: WordTokenizer, words: Sequence[str], tokens: Sequence[int], *, space: bool) -> Seam | None:
    """Return the seam of a prompt of these words and ids, which ends with a `space` that none of them has, or without one.

    None of words, of a prompt without tokens, after an `<unk>`, an end mark or a part of a character, and where no other piece
    begins as the last one does.
    """
    model = tokenizer.model
    if model is None:
        return None
    if space:
        return Seam(0, " ", Begin(model.beginning_with(b" "), 1))
    if not tokens or tokens[-1] in (UNKNOWN_ID, END_ID):
        return None
    content = model.entries.contents[tokens[-1]]
    begins = model.beginning_with(content) if is_text(content) else ()
    if len(begins) < 2:
        return None
    *_, given = tokenizer.pieces(words)
    return Seam(1, given, Begin(begins, len(content), tokens[-1]))


def is_text(content: bytes) -> bool:
    """Return whether bytes are whole characters, at least one."""
    try:
        return bool(content.decode())
    except UnicodeDecodeError:
        return False

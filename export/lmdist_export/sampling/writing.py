"""Text as it is written: what a prompt has written already, and what each token of a text adds to it as soon as it is known.

    written = WrittenPrompt(bundle, prompt, has_space=False)        # once for all the texts that go on from there
    writer = Writer(written, taken_again(text, prompt))
    writer.write(tokens), writer.end(text)

The prompt and its text are one to the tokenizer: which space is between the two depends on both. This module does not know how
texts grow.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from lmdist.text.detokenizer import Place

if TYPE_CHECKING:  # they need numpy
    from lmdist_export.bundle import Bundle
    from lmdist_export.sampling.generation import Text
    from lmdist_export.sampling.prompt import Prompt

GOING_ON = r"(?V1)[ ]?[[\p{L}\p{M}\p{N}'’_-]--[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]]{1,60}\Z"
"""The end of a text that may be the beginning of a longer word."""


class WrittenPrompt:
    """A prompt as it is written, as far as its seam leaves it, and the place from which its texts go on."""

    def __init__(self, bundle: Bundle, prompt: Prompt, *, has_space: bool) -> None:
        """Write a prompt; with `has_space` words that follow it begin without the space that separates two of them.

        Pieces have one only if the text has: where the prompt ends with it, it stays there, also before a piece that has none.
        """
        self.bundle = bundle
        self.place = Place()
        glued = prompt.space or (has_space and not bundle.tokenizer.settings.has_pieces)
        tokens = prompt.open().tokens
        # Not to the end of the pieces, which would complete a character that the next token may complete.
        self.pieces = list(islice(bundle.tokenizer.pieces(tokens, self.place), len(tokens)))
        """Of its tokens."""
        self.given = prompt.seam.given if prompt.seam else " " if glued else ""
        """What it has of the first piece that follows."""

    @property
    def shown(self) -> list[str]:
        """Return all that it has, piece by piece."""
        return [*self.pieces, self.given] if self.given else self.pieces


class Writer:
    """Writes the tokens of a text behind its prompt as they come."""

    def __init__(self, written: WrittenPrompt, again: Sequence[int] = ()) -> None:
        """Go on from a prompt; `again` is what `taken_again` returns."""
        bundle = written.bundle
        self.vocabulary = bundle.vocabulary.words
        self.waiting: deque[str | bytes] = deque()
        self.pieces = after_text(bundle.tokenizer.pieces(self.coming(), written.place.copy()), written.given)
        self.write(again)

    def coming(self) -> Iterator[str | bytes]:
        """Yield the words that wait."""
        while self.waiting:
            yield self.waiting.popleft()

    def write(self, tokens: Sequence[int]) -> list[str]:
        """Return the pieces of the next tokens."""
        self.waiting.extend([self.vocabulary[token] for token in tokens])
        return list(islice(self.pieces, len(tokens)))  # no more, or they would end

    def end(self, text: Text) -> str:
        """Return the end of a text that is no token: what is left of a character, or of a piece before a stop."""
        if text.rest:
            self.waiting.append(text.rest)
        return "".join(self.pieces)


def after_text(pieces: Iterator[str], given: str) -> Iterator[str]:
    """Yield pieces that go on from a text; the first one without what the text was `given` of it already."""
    yield from (piece.removeprefix(given) for piece in islice(pieces, 1))
    yield from pieces


def taken_again(text: Text, prompt: Prompt) -> list[int]:
    """Return the token that the prompt's seam has taken back and that has come again, or none."""
    return text.prompt[prompt.num_kept :]


def whole_words(pieces: Iterable[str]) -> Iterator[str]:
    """Yield the same text with each word as a whole: its end is known from what comes after it.

    Scripts without spaces between words are not held back, nor is what is too long for a word.
    """
    from lmdist.text.tokenizer import pattern

    held = ""
    for piece in pieces:
        held += piece
        match = pattern(GOING_ON).search(held)
        known = match.start() if match else len(held)
        if known:
            yield held[:known]
        held = held[known:]
    if held:
        yield held

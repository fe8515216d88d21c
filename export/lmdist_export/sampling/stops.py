"""Stops: what ends a text beside its end mark, and is not part of it.

    found = ending([5, 7, 9], [7, 9])       # the last two tokens are the stop
    found.num_tokens, found.rest            # 2, ""

A stop of words is a sequence of their tokens. A text of pieces may be written by many sequences, and a stop may begin and end
inside of a piece, so it is looked for in the text. This module does not know how texts grow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(frozen=True)
class TextStop:
    """A text that ends another one."""

    text: bytes
    contents: Sequence[bytes] = field(repr=False)
    """The text of each token, by its id."""

    def last_bytes(self, tokens: Sequence[int]) -> tuple[bytes, list[int]]:
        """Return the end of a text, enough to see a stop that its last token completes, and the length of each token in it."""
        lengths: list[int] = []
        parts: list[bytes] = []
        needed = len(self.text) - 1
        for token in reversed(tokens):
            content = self.contents[token]
            parts.append(content)
            lengths.append(len(content))
            if len(lengths) > 1:
                needed -= len(content)
            if needed <= 0:
                break
        return b"".join(reversed(parts)), lengths[::-1]


Stop = Sequence[int] | TextStop


class Ending(NamedTuple):
    """How a text ends with a stop."""

    num_tokens: int
    """The last tokens, which are no part of it."""
    rest: str = ""
    """What the first of them has before the stop."""


def ending(tokens: Sequence[int], stop: Stop) -> Ending | None:
    """Return how a text ends with a stop that its last token completes, or None."""
    if not isinstance(stop, TextStop):
        return Ending(len(stop)) if ends_with(tokens, stop) else None
    text, lengths = stop.last_bytes(tokens)
    place = text.find(stop.text)
    if place < 0:
        return None
    begin, first = 0, 0
    while begin + lengths[first] <= place:
        begin, first = begin + lengths[first], first + 1
    return Ending(len(lengths) - first, text[begin:place].decode("utf-8", "replace"))


def num_held_back(tokens: Sequence[int], stops: Sequence[Stop]) -> int:
    """Return how many of the last tokens may turn out to be the beginning of a stop."""
    return max((held_back(tokens, stop) for stop in stops), default=0)


def held_back(tokens: Sequence[int], stop: Stop) -> int:
    """Return the same of a stop."""
    if not isinstance(stop, TextStop):
        return max((length for length in range(1, len(stop)) if ends_with(tokens, stop[:length])), default=0)
    text, lengths = stop.last_bytes(tokens)
    shared = max((length for length in range(1, len(stop.text)) if text.endswith(stop.text[:length])), default=0)
    count = 0
    while shared > 0:
        count += 1
        shared -= lengths[-count]
    return count


def ends_with(tokens: Sequence[int], last: Sequence[int]) -> bool:
    """Return whether the last of `tokens` are these."""
    return list(tokens[-len(last) :]) == list(last)

"""Stops: what ends a text beside its end mark. All of them are looked for at once, in a time that their number does not change.

    stops = Stops([[5], [7, 8, 9]])
    place = 0                           # of a text without tokens
    place = stops.next(place, 7)        # as each token comes
    stops.ending(place, [4, 7])         # how the text ends with a stop, or None
    stops.held_back(place, [4, 7])      # how many of the last tokens may become a stop

A stop of words is a sequence of their tokens. A text of pieces may be written by many sequences, and a stop may begin and end
inside of a piece, so there it is a sequence of bytes, and each token is spelled. This module does not know how texts grow.

It is the automaton of Aho and Corasick 1975 ("Efficient string matching: an aid to bibliographic search"): a trie of the stops,
and from each of its places a link to the place of the longest end of what led there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple


class Ending(NamedTuple):
    """How a text ends with a stop."""

    num_tokens: int
    """The last tokens, which are no part of it."""
    rest: bytes = b""
    """What the first of them has before the stop."""


class Stops:
    """An automaton over tokens, or over the bytes that they stand for. Place 0 is the root: the last one begins no stop."""

    def __init__(self, stops: Sequence[Sequence[int]] = (), spelling: Sequence[bytes] | None = None) -> None:
        """Build the automaton of stops of tokens; with `spelling`, the bytes of each token by its id, of stops of bytes.

        Where a text ends with several of them, the first one counts.
        """
        self.stops = stops
        self.spelling = spelling if stops else None
        self.children: list[dict[int, int]] = [{}]
        self.depths = [0]
        none = len(stops)
        self.first = first = [none]
        """The number of the first stop that what led to each place ends with."""
        for number, stop in enumerate(stops):
            place = 0
            for symbol in stop:
                if symbol not in self.children[place]:
                    self.children[place][symbol] = len(self.children)
                    self.children.append({})
                    self.depths.append(self.depths[place] + 1)
                    first.append(none)
                place = self.children[place][symbol]
            first[place] = min(first[place], number)
        self.links = [0] * len(self.children)
        waiting = deque(self.children[0].values())
        while waiting:  # the shallow ones first: a link leads to a place above
            place = waiting.popleft()
            first[place] = min(first[place], first[self.links[place]])
            for symbol, child in self.children[place].items():
                self.links[child] = self.after(self.links[place], symbol)
                waiting.append(child)
        lengths = [*map(len, stops), 0]
        self.lengths = [lengths[number] for number in first]
        """Of the stop that a text at each place ends with; 0 where it ends with none."""

    def __repr__(self) -> str:
        return f"Stops({[list(stop) for stop in self.stops]})"

    def __len__(self) -> int:
        return len(self.stops)

    @property
    def tokens(self) -> list[int]:
        """Return the stops of one token."""
        return [] if self.spelling else [stop[0] for stop in self.stops if len(stop) == 1]

    def after(self, place: int, symbol: int) -> int:
        """Return the place after one more token, or byte."""
        while place and symbol not in self.children[place]:
            place = self.links[place]
        return self.children[place].get(symbol, 0)

    def next(self, place: int, token: int, overlap: int = 0) -> int:
        """Return the place after one more token, or where the first stop ends inside of it.

        A stop is not looked for in the first `overlap` bytes of it.
        """
        if self.spelling is None:
            return self.after(place, token)
        for byte in self.spelling[token][overlap:]:
            place = self.after(place, byte)
            if self.lengths[place]:
                break
        return place

    def ending(self, place: int, tokens: Sequence[int], overlap: int = 0) -> Ending | None:
        """Return how a text of these tokens, which has led to a place, ends with a stop; None where it ends with none.

        A stop is not looked for in the first `overlap` bytes of the first token.
        """
        length, spelling = self.lengths[place], self.spelling
        if not length or spelling is None:
            return Ending(length) if length else None

        spelled = deque([spelling[tokens[-1]]])  # and the tokens before the last one in which the stop may have begun
        while len(spelled) < len(tokens) and sum(map(len, spelled)) - len(spelled[-1]) < length - 1:
            spelled.appendleft(spelling[tokens[-len(spelled) - 1]])
        begin = b"".join(spelled).index(bytes(self.stops[self.first[place]]), overlap if len(spelled) == len(tokens) else 0)
        while len(spelled[0]) <= begin:
            begin -= len(spelled.popleft())
        return Ending(len(spelled), spelled[0][:begin])

    def held_back(self, place: int, tokens: Sequence[int]) -> int:
        """Return how many of the last tokens are the beginning of a stop, where no stop has ended."""
        depth, number = self.depths[place], 0
        if self.spelling is None:
            return depth
        while depth > 0:
            number += 1
            depth -= len(self.spelling[tokens[-number]])
        return number


NO_STOPS = Stops()

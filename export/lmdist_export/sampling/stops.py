"""Stops: sequences of tokens that end a text. All of them are looked for at once, in a time that their number does not change.

    stops = Stops([[5], [7, 8, 9]])
    place = 0                           # of a text without tokens
    place = stops.next(place, 7)        # as each token comes
    stops.length_at(place)              # of the stop that the text ends with, or 0
    stops.held_back(place)              # how many of the last tokens may become a stop

It is the automaton of Aho and Corasick 1975 ("Efficient string matching: an aid to bibliographic search"): a trie of the stops,
and from each of its places a link to the place of the longest end of what led there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class Stops:
    """An automaton over tokens. Place 0 is the root: the last token begins no stop."""

    def __init__(self, stops: Sequence[Sequence[int]]) -> None:
        """Build the automaton of these sequences; where a text ends with several of them, the first one counts."""
        self.children: list[dict[int, int]] = [{}]
        self.depths = [0]
        none = len(stops)
        first = [none]
        """The number of the first stop that the tokens up to a place end with."""
        for number, stop in enumerate(stops):
            place = 0
            for token in stop:
                if token not in self.children[place]:
                    self.children[place][token] = len(self.children)
                    self.children.append({})
                    self.depths.append(self.depths[place] + 1)
                    first.append(none)
                place = self.children[place][token]
            first[place] = min(first[place], number)
        self.links = [0] * len(self.children)
        waiting = deque(self.children[0].values())
        while waiting:  # the shallow ones first: a link leads to a place above
            place = waiting.popleft()
            first[place] = min(first[place], first[self.links[place]])
            for token, child in self.children[place].items():
                self.links[child] = self.next(self.links[place], token)
                waiting.append(child)
        lengths = [*map(len, stops), 0]
        self.lengths = [lengths[number] for number in first]

    def next(self, place: int, token: int) -> int:
        """Return the place after one more token."""
        while place and token not in self.children[place]:
            place = self.links[place]
        return self.children[place].get(token, 0)

    def length_at(self, place: int) -> int:
        """Return the length of the stop that a text at this place ends with; 0 where it ends with none."""
        return self.lengths[place]

    def held_back(self, place: int) -> int:
        """Return how many of the last tokens are the beginning of a stop, where no stop has ended."""
        return self.depths[place]

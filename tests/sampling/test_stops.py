"""The automaton finds the stops that a look at all of them finds, in a time that does not grow with their number."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from lmdist_export.options import GenerationConfig
from lmdist_export.sampling.generation import Generation, Text, append
from lmdist_export.sampling.stops import Ending, Stops

TOKENS = st.integers(2, 4)


def ends_with(tokens: Sequence[int], last: Sequence[int]) -> bool:
    return list(tokens[len(tokens) - len(last) :]) == list(last) if len(last) <= len(tokens) else False


@given(
    tokens=st.lists(TOKENS, max_size=30),
    stops=st.lists(st.lists(TOKENS, min_size=1, max_size=6), max_size=5),
)
def test_the_automaton_finds_what_a_look_at_all_stops_finds(tokens: list[int], stops: list[list[int]]) -> None:
    automaton, place = Stops(stops), 0
    for count, token in enumerate(tokens, 1):
        place = automaton.next(place, token)
        read = tokens[:count]
        first = next((stop for stop in stops if ends_with(read, stop)), [])
        assert automaton.ending(place, read) == (Ending(len(first)) if first else None)
        if first:
            return
        begun = [length for stop in stops for length in range(len(stop)) if ends_with(read, stop[:length])]
        assert automaton.held_back(place, read) == max(begun, default=0)


SPELLING = [b"", b"", b"a", b"b\n", b"\nc", b"ab"]


@given(
    tokens=st.lists(st.integers(0, 5), max_size=20),
    stops=st.lists(st.text("abc\n", min_size=1, max_size=4).map(str.encode), min_size=1, max_size=4),
    of_prompt=st.integers(0, 2),
)
def test_stops_of_bytes_are_found_wherever_the_tokens_cut_the_text(
    tokens: list[int], stops: list[bytes], of_prompt: int
) -> None:
    automaton, place = Stops(stops, SPELLING), 0
    overlap = min(of_prompt, len(SPELLING[tokens[0]])) if tokens else 0
    text = b"".join(SPELLING[token] for token in tokens)[overlap:]
    ends = [(text.index(stop) + len(stop), number) for number, stop in enumerate(stops) if stop in text]
    for count, token in enumerate(tokens, 1):
        place, read = automaton.next(place, token, overlap if count == 1 else 0), tokens[:count]
        found = automaton.ending(place, read, overlap)
        if found:
            end, number = min(ends)
            before = b"".join(SPELLING[token] for token in tokens[: count - found.num_tokens])
            assert (before + found.rest)[overlap:] == text[: end - len(stops[number])]
            return
        written = b"".join(SPELLING[token] for token in read)[overlap:]
        begun = max((size for stop in stops for size in range(len(stop)) if written.endswith(stop[:size])), default=0)
        held_back = automaton.held_back(place, read)
        assert held_back == next(n for n in range(count + 1) if sum(len(SPELLING[t]) for t in read[count - n :]) >= begun)
    assert not ends


def test_a_token_is_looked_up_in_few_steps_whatever_the_stops_are() -> None:
    """As in 400 stops of 600 words that all begin alike: each token follows a link or goes one place down."""
    stops = Stops([[2] * 600 + [3, number] for number in range(4, 404)])
    assert len(stops.children) == 1 + 600 + 1 + 400
    place, num_links = 0, 0
    for token in [*[2] * 5_000, 4, 2, 3] * 2:
        before = place
        while before and token not in stops.children[before]:
            before, num_links = stops.links[before], num_links + 1
        place = stops.next(place, token)
    assert num_links <= 2 * 5_003


def test_a_text_of_many_tokens_ends_before_the_stop_that_came_first() -> None:
    generation = Generation(GenerationConfig(max_new_tokens=100), Stops([[5, 6, 7], [6, 7], [9]]))
    text = Text([], 0, 0)
    assert append(text, [4, 5], generation) == [4]
    assert append(text, [6], generation) == []
    assert append(text, [7, 8], generation) == []
    assert (text.tokens, text.finish_reason) == ([4], "stop")


@given(
    tokens=st.lists(st.lists(TOKENS, max_size=8), max_size=5),
    most=st.integers(1, 20),
    ignore_end=st.booleans(),
)
def test_a_text_without_stops_grows_as_one_whose_stop_never_comes(tokens: list[list[int]], most: int, ignore_end: bool) -> None:
    config = GenerationConfig(max_new_tokens=most, eos_token_id=3)
    texts = [Text([], 0, 0), Text([], 0, 0)]
    kinds = [Generation(config, stops, ignore_end) for stops in (Stops(), Stops([[9]]))]
    for call in tokens:
        grown = [append(text, [*call], generation) for text, generation in zip(texts, kinds, strict=True)]
        assert grown[0] == grown[1]
        assert texts[0] == texts[1]
        if texts[0].finish_reason:
            break

"""Beam search: the most likely text, instead of a sampled one.

Of all texts of a length the `num_beams` most likely are kept; each step reads one token of each and keeps the best
continuations. A text that ends is set aside with its score, its log-probability over its length to the power of
`length_penalty` (Hugging Face's convention; Wu et al. 2016, arXiv:1609.08144, have another). The search ends when no growing
text can beat those set aside. A text that no token may follow is returned only where fewer than `n` others are.

Shapes: K beams, V vocabulary, S the sum of the layers' sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmdist_export.options import GenerationConfig
from lmdist_export.sampling.generation import Generation, Text, row_bias
from lmdist_export.sampling.sampler import Sampler, all_masked, fixed_bias, log_softmax
from lmdist_export.sampling.state import State, select
from lmdist_export.sampling.steps import Pace, Steps, result_of
from lmdist_export.sampling.stops import NO_STOPS, Stops

SCORES_AT_ONCE = 2**19  # in a step of a search: some 10 ms


def beam_search(
    sampler: Sampler,
    prompt: Sequence[int],
    config: GenerationConfig,
    n: int = 1,
    stops: Stops = NO_STOPS,
    ignore_end: bool = False,
    state: State | None = None,
) -> list[Text]:
    """Return the `n` most likely texts found (`num_beams` at most), the best first.

    The `state` is that of the prompt, where it was read.
    """
    return result_of(beam_search_steps(sampler, prompt, Generation(config, stops, ignore_end), n, state))


def beam_search_steps(
    sampler: Sampler,
    prompt: Sequence[int],
    generation: Generation,
    n: int,
    state: State | None = None,
    pace: Pace | None = None,
) -> Steps[list[Text]]:
    """Do what `beam_search` does, a piece of the prompt a step and then a token of all beams."""
    config = generation.config
    assert n <= config.num_beams, (n, config.num_beams)
    bias = fixed_bias(config, sampler.sizes.vocabulary_size)
    start = state or sampler.start([[config.bos_token_id, *prompt]])
    logits, model = yield from sampler.next_logits_steps(start, pace)  # (1, V), (1, S)
    beams = [Text(list(prompt), 0, 0)]
    scores = np.zeros(1)  # (K)
    ended: list[tuple[float, Text]] = []
    exhausted: list[Text] = []
    for length in range(1, config.max_new_tokens + 1):
        next_scores = yield from next_scores_steps(logits, beams, generation, bias)  # (K, V)
        # The best first: the longest, and of these the most likely.
        exhausted = [*(text for text, row in zip(beams, next_scores, strict=True) if all_masked(row)), *exhausted][:n]
        kept, new_ended = best_continuations(scores[:, None] + next_scores, beams, generation)
        ended += [(score / length**config.length_penalty, text) for score, text in new_ended]
        ended = best_of(ended, config.num_beams)
        beams = [beams[row].extended(token, place) for row, token, place, _ in kept]
        scores = np.array([score for *_, score in kept])
        if not kept or cannot_improve(ended, scores[0], length, config, bias):
            break
        if length < config.max_new_tokens:
            yield
            step, model = sampler.step(np.array([[token] for _, token, *_ in kept]), select(model, [row for row, *_ in kept]))
            logits = step[:, -1]  # (K, V)
    else:
        for text, score in zip(beams, scores.tolist(), strict=True):
            text.finish_reason = "length"
            ended.append((score / config.max_new_tokens**config.length_penalty, text))
    for text in exhausted:
        text.finish_reason = "exhausted"
    found = [*(text for _, text in best_of(ended, len(ended))), *exhausted][:n]
    for number, text in enumerate(found):
        text.number = number
    return found


def next_scores_steps(
    logits: NDArray[np.float32], beams: Sequence[Text], generation: Generation, bias: NDArray[np.float32]
) -> Steps[NDArray[np.float64]]:
    """Return the log-probability of each token after each beam, with the bias of both, (K, V); some beams a step."""
    rows_at_once = max(1, SCORES_AT_ONCE // len(bias))
    scores = np.empty(logits.shape)
    for first in range(0, len(beams), rows_at_once):
        rows = slice(first, first + rows_at_once)
        of_texts = row_bias(beams[rows], generation.config, len(bias), generation.end)
        scores[rows] = log_softmax(logits[rows]) + of_texts + bias
        yield
    return scores


class Continuation(NamedTuple):
    """A beam, by its row, and the token that it goes on with."""

    row: int
    token: int
    stop_place: int
    """Where the text with it is in the stop sequences, of `Stops.next`."""
    score: float
    """The log-probability of the text with it."""


def best_continuations(
    total: NDArray[np.float64], beams: Sequence[Text], generation: Generation
) -> tuple[list[Continuation], list[tuple[float, Text]]]:
    """Return the best continuations that go on, `num_beams` at most, and the texts that end, as far as they are better.

    `total` (K, V) has the log-probability of each beam with each token; that of a text that ends is returned with it.
    """
    end, stops, num_beams = generation.end, generation.stops, generation.config.num_beams
    kept: list[Continuation] = []
    ended: list[tuple[float, Text]] = []
    # Each beam has one end and few stops, so among these are mostly num_beams texts that have not ended.
    for candidate in best_first(total, (2 + len(stops)) * num_beams):
        row, token = divmod(candidate, total.shape[1])
        score = float(total[row, token])
        if score == -np.inf or len(kept) == num_beams:
            break
        place = stops.next(beams[row].stop_place, token)
        tokens = [*beams[row].tokens, token]
        stop = stops.ending(place, tokens)
        if token in end or stop:
            before = tokens[: -(stop.num_tokens if stop else 1)]
            text = Text(beams[row].prompt, 0, 0, before, "stop", stop.rest if stop else b"")
            ended.append((score, text))
        else:
            kept.append(Continuation(row, token, place, score))
    return kept, ended


def best_of(ended: list[tuple[float, Text]], most: int) -> list[tuple[float, Text]]:
    """Return the texts with the highest scores, the best first."""
    return sorted(ended, key=lambda found: -found[0])[:most]


def cannot_improve(
    ended: Sequence[tuple[float, Text]], best: float, length: int, config: GenerationConfig, bias: NDArray[np.float32]
) -> bool:
    """Return whether `num_beams` texts have ended, the best first, and no growing one can beat the last of them.

    `best` is the highest log-probability of the growing texts, which have `length` tokens.
    """
    return len(ended) == config.num_beams and ended[-1][0] >= highest_score(best, length, config, bias)


def highest_score(best: float, length: int, config: GenerationConfig, bias: NDArray[np.float32]) -> float:
    """Return a bound of the scores of all texts that continue one of `length` tokens whose sum, of these and `bias`, is `best`.

    A log-probability only lowers the sum, and a token raises it by its bias at most. The quotient of the highest sum and a
    power of the length is highest at one of the two ends.
    """
    highest = best + max(0.0, float(bias.max())) * (config.max_new_tokens - length)
    return max(highest / end**config.length_penalty for end in (length, config.max_new_tokens))


def best_first(total: NDArray[np.float64], few: int) -> Iterator[int]:
    """Yield the places of scores (K, V) in the order of the scores, the best first; the first `few` take little time."""
    costs = -total.ravel()
    best = np.argpartition(costs, min(few, costs.size) - 1)[:few]
    yield from best[np.argsort(costs[best], kind="stable")].tolist()
    rest = np.delete(np.arange(costs.size), best)
    yield from rest[np.argsort(costs[rest], kind="stable")].tolist()

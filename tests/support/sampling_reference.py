"""Sampling in plain Python: each option in the documented order, one after the other, and nothing clever.

docs/sampling.md has the order: repetition penalty, presence and frequency penalty, temperature, top-k, top-p, min-p, typical-p.
What is suppressed has the logit -inf from the start. The tests of the graphs' nodes and of the sampler compare with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from lmdist_export.options import GenerationConfig

NEAR = 1e-5
"""Nothing is asserted of what is nearer to a boundary than this: there fp32 may decide otherwise."""


@dataclass
class Expected:
    """The tokens that may be sampled and their probabilities, in the order in which a uniform number finds them."""

    tokens: list[int]
    probabilities: list[float]
    margin: float
    """How near the nearest decision was, whether a token may be sampled."""

    def sampled(self, uniform: NDArray[np.floating]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return the tokens of uniform numbers, and of which of them that is certain."""
        cumulative = np.cumsum(self.probabilities)
        places = np.minimum(np.searchsorted(cumulative, uniform, side="right"), len(cumulative) - 1)
        return np.array(self.tokens)[places], np.abs(cumulative[:, None] - uniform).min(axis=0) > NEAR


@dataclass
class Nearest:
    """Remembers the nearest of many decisions."""

    margin: float = math.inf

    def below(self, value: float, bound: float) -> bool:
        """Whether a value is below a bound."""
        self.margin = min(self.margin, abs(value - bound))
        return value < bound


@dataclass(frozen=True)
class Past:
    """How often a text has each token, and what is added to the logits of its next one."""

    counts: Sequence[float]
    in_prompt: Sequence[bool]
    row_bias: Sequence[float] = field(default=())


def scores_of(logits: Sequence[float], config: GenerationConfig, past: Past | None = None) -> list[float]:
    """Return the logits after the penalties."""
    scores = []
    for token, logit in enumerate(logits):
        if past:
            times = past.counts[token]
            if times or past.in_prompt[token]:
                logit = logit / config.repetition_penalty if logit > 0 else logit * config.repetition_penalty
            if times:
                logit -= config.presence_penalty
            logit -= times * config.frequency_penalty
            logit += past.row_bias[token] if past.row_bias else 0
        scores.append(logit)
    return scores


def expected(logits: Sequence[float], config: GenerationConfig, past: Past | None = None) -> Expected:
    """Return the tokens that may follow, without greedy."""
    scores = {token: score / config.temperature for token, score in enumerate(scores_of(logits, config, past))}
    tokens = [token for token in scores if scores[token] > -math.inf]
    sorts = config.top_k > 0 or config.typical_p < 1
    tokens.sort(key=lambda token: (-scores[token], token))
    if config.top_k:
        tokens = tokens[: config.top_k]
    weights = {token: math.exp(scores[token] - scores[tokens[0]]) for token in tokens}
    nearest = Nearest()
    if config.top_p < 1:
        tokens = needed(tokens, weights, scores, config.top_p, nearest)
    if config.min_p:
        largest = weights[tokens[0]]
        tokens = [token for token in tokens if weights[token] == largest or not nearest.below(weights[token], config.min_p)]
    if config.typical_p < 1:
        total = math.fsum(weights[token] for token in tokens)
        surprisal = {token: math.log(total) - math.log(weights[token]) if weights[token] else math.inf for token in tokens}
        entropy = math.fsum(weights[token] / total * surprisal[token] for token in tokens if weights[token])
        distance = {token: abs(surprisal[token] - entropy) for token in tokens}
        tokens = sorted(tokens, key=lambda token: distance[token])
        for first, second in pairwise(tokens):
            if scores[first] != scores[second]:
                nearest.below(distance[first], distance[second])
        # Equally likely tokens have the same distance; others do not, or the margin tells.
        tokens = needed(tokens, weights, scores, config.typical_p, nearest)
    tokens = tokens if sorts else sorted(tokens)
    total = math.fsum(weights[token] for token in tokens)
    return Expected(tokens, [weights[token] / total for token in tokens], nearest.margin)


def needed(tokens: list[int], weights: dict[int, float], scores: dict[int, float], share: float, nearest: Nearest) -> list[int]:
    """Return the first of `tokens` that together have a share of the weight; of equally likely ones all or none."""
    total = math.fsum(weights[token] for token in tokens)
    kept: list[int] = []
    before, group = 0.0, 0.0
    for place, token in enumerate(tokens):
        if place and scores[token] != scores[tokens[place - 1]]:
            before, group = before + group, 0.0
        group += weights[token]
        if not nearest.below(before / total, share):
            break
        kept.append(token)
    return kept


def check_frequencies(tokens: NDArray[np.int64], probabilities: dict[int, float]) -> None:
    """Assert by a chi-square test that tokens have the expected frequencies; rare ones are one class."""
    counts = np.bincount(tokens, minlength=max(probabilities) + 1)[list(probabilities)]
    expected_counts = len(tokens) * np.array(list(probabilities.values()))
    rare = expected_counts < 10
    counts = np.append(counts[~rare], counts[rare].sum())
    expected_counts = np.append(expected_counts[~rare], expected_counts[rare].sum())
    mask = expected_counts > 5
    chi_square = ((counts - expected_counts)[mask] ** 2 / expected_counts[mask]).sum()
    degrees = mask.sum()
    assert chi_square < degrees + 8 * (2 * degrees) ** 0.5 + 20, (chi_square, degrees)  # one of a hundred million is above

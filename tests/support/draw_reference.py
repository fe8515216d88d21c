"""How a word is drawn, in plain Python: each option in the documented order, one after the other, and nothing clever.

docs/sampling.md has the order: repetition penalty, presence and frequency penalty, temperature, top-k, top-p, min-p, typical-p.
What is suppressed has the logit -inf from the start.
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
"""Nothing is said of what is nearer to a boundary than this: there fp32 may decide otherwise."""


@dataclass
class Expected:
    """The words that may be drawn and their probabilities, in the order in which a uniform number finds them."""

    words: list[int]
    probabilities: list[float]
    margin: float
    """How near the nearest decision was, whether a word may be drawn."""

    def drawn(self, uniform: NDArray[np.floating]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The words of uniform numbers, and of which of them that is certain."""
        up_to = np.cumsum(self.probabilities)
        places = np.minimum(np.searchsorted(up_to, uniform, side="right"), len(up_to) - 1)
        return np.array(self.words)[places], np.abs(up_to[:, None] - uniform).min(axis=0) > NEAR


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
    """What a text has of each word, and what is added to the logits of its next one."""

    counts: Sequence[float]
    in_prompt: Sequence[bool]
    row_bias: Sequence[float] = field(default=())


def scores_of(logits: Sequence[float], config: GenerationConfig, past: Past | None = None) -> list[float]:
    """The logits after the penalties."""
    scores = []
    for word, logit in enumerate(logits):
        if past:
            times = past.counts[word]
            if times or past.in_prompt[word]:
                logit = logit / config.repetition_penalty if logit > 0 else logit * config.repetition_penalty
            if times:
                logit -= config.presence_penalty
            logit -= times * config.frequency_penalty
            logit += past.row_bias[word] if past.row_bias else 0
        scores.append(logit)
    return scores


def expected(logits: Sequence[float], config: GenerationConfig, past: Past | None = None) -> Expected:
    """The words that may follow, where none is always taken."""
    scores = {word: score / config.temperature for word, score in enumerate(scores_of(logits, config, past))}
    words = [word for word in scores if scores[word] > -math.inf]
    sorts = config.top_k > 0 or config.typical_p < 1
    words.sort(key=lambda word: (-scores[word], word))
    if config.top_k:
        words = words[: config.top_k]
    weights = {word: math.exp(scores[word] - scores[words[0]]) for word in words}
    nearest = Nearest()
    if config.top_p < 1:
        words = needed(words, weights, scores, config.top_p, nearest)
    if config.min_p:
        likeliest = weights[words[0]]
        words = [word for word in words if weights[word] == likeliest or not nearest.below(weights[word], config.min_p)]
    if config.typical_p < 1:
        total = math.fsum(weights[word] for word in words)
        surprise = {word: math.log(total) - math.log(weights[word]) if weights[word] else math.inf for word in words}
        entropy = math.fsum(weights[word] / total * surprise[word] for word in words if weights[word])
        strange = {word: abs(surprise[word] - entropy) for word in words}
        words = sorted(words, key=lambda word: strange[word])
        for first, second in pairwise(words):
            if scores[first] != scores[second]:
                nearest.below(strange[first], strange[second])
        # Equally likely words are equally strange; others are not, or the margin says so.
        words = needed(words, weights, scores, config.typical_p, nearest)
    words = words if sorts else sorted(words)
    total = math.fsum(weights[word] for word in words)
    return Expected(words, [weights[word] / total for word in words], nearest.margin)


def needed(words: list[int], weights: dict[int, float], scores: dict[int, float], share: float, nearest: Nearest) -> list[int]:
    """The first of `words` that together have a share of the weight; of equally likely ones all or none."""
    total = math.fsum(weights[word] for word in words)
    kept: list[int] = []
    before, group = 0.0, 0.0
    for place, word in enumerate(words):
        if place and scores[word] != scores[words[place - 1]]:
            before, group = before + group, 0.0
        group += weights[word]
        if not nearest.below(before / total, share):
            break
        kept.append(word)
    return kept

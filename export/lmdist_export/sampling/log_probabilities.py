"""Log-probabilities of the tokens after a prompt, and the most likely tokens in their places, in short steps.

They are the model's own: no option of a generation changes them. scoring.py scores many sentences at a time, and only them.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lmdist_export.sampling.sampler import STEP_TOKENS, Sampler, log_softmax
from lmdist_export.sampling.state import ModelState
from lmdist_export.sampling.steps import Pace, Steps

TokenScores = tuple[list[float], list[list[tuple[int, float]]]]
"""The log-probability of each token, and the most likely tokens in its place, the best first, each with its own."""
Start = tuple[NDArray[np.float32], ModelState]
"""The logits of the token after a prompt, (1, V), and the state there."""


def log_probability_steps(
    sampler: Sampler,
    prompt: Sequence[int],
    tokens: Sequence[int],
    top: int,
    reading: Pace | None = None,
    scoring: Pace | None = None,
) -> Steps[TokenScores]:
    """Return the scores of `tokens` after a prompt, and of the `top` most likely in the place of each.

    The steps have STEP_TOKENS, or go at a pace of `reading` and one of `scoring`, which changes no bit of the scores.
    """
    if not tokens:
        return [], []
    start = yield from start_steps(sampler, prompt, reading)
    return (yield from steps_after(sampler, start, tokens, top, scoring))


def start_steps(sampler: Sampler, prompt: Sequence[int], reading: Pace | None = None) -> Steps[Start]:
    """Return where the texts that continue a prompt begin: it is read once for all of them."""
    return (yield from sampler.next_logits_steps(sampler.start([[sampler.bundle.generation.bos_token_id, *prompt]]), reading))


def steps_after(
    sampler: Sampler, start: Start, tokens: Sequence[int], top: int, scoring: Pace | None = None
) -> Steps[TokenScores]:
    """Return the scores of `tokens` after what was read, as `log_probability_steps`."""
    logits, state = start
    scoring = None if sampler.rows_change_logits else scoring
    scores: list[float] = []
    tops: list[list[tuple[int, float]]] = []
    while len(scores) < len(tokens):
        yield
        began = time.perf_counter()
        piece = np.array(tokens[len(scores) : len(scores) + (scoring.tokens if scoring else STEP_TOKENS)])
        after, state = sampler.step(piece[None], state)  # (1, T, V)
        values = log_softmax(np.concatenate([logits, after[0, :-1]]))  # (T, V)
        logits = after[:, -1]
        scores += values[np.arange(len(piece)), piece].tolist()
        tops += [best_tokens(row, top) for row in values]
        if scoring:
            scoring.learn(len(piece), time.perf_counter() - began)
    return scores, tops


def best_tokens(scores: NDArray[np.float64], count: int) -> list[tuple[int, float]]:
    """Return the `count` tokens of the highest scores (V), the best first, of equal ones the first, each with its score."""
    if not count:
        return []
    worst = scores.min() if count >= len(scores) else np.partition(scores, -count)[-count]
    candidates = np.flatnonzero(scores >= worst)  # more than `count` where scores are equal
    best = candidates[np.argsort(-scores[candidates], kind="stable")][:count]
    return list(zip(best.tolist(), scores[best].tolist(), strict=True))

"""From logits to the next words, in plain numpy.

In this order: suppressed words are taken out, logits are divided by the temperature, top-k keeps the likeliest words,
top-p the fewest of these that together have the probability asked for (of what top-k left), and one word is drawn of what
remains, by its probability. Of words that are equally likely the one with the lower id comes first.

Each row has a random generator of its own, made of the seed and the row's number, and takes one number of it a word: text i
is the same however many texts are made beside it. This module knows neither words nor models.

Shapes: B rows, V vocabulary, K candidates.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lmdist_export.bundle import GenerationConfig


class Draw:
    """Draws the next word of each row: `draw(logits)`, (B, V) -> (B,)."""

    def __init__(self, config: GenerationConfig, seed: int, rows: int) -> None:
        self.config = config
        self.generators = [np.random.default_rng([seed, row]) for row in range(rows)]

    def __call__(self, logits: NDArray[np.float32]) -> NDArray[np.int64]:
        """The ids (B,) of the next words, of the logits (B, V) of all rows."""
        assert len(logits) == len(self.generators), (logits.shape, len(self.generators))
        rows = zip(logits, self.generators, strict=True)
        return np.array([draw_word(row, self.config, generator) for row, generator in rows], np.int64)


def draw_word(logits: NDArray[np.float32], config: GenerationConfig, generator: np.random.Generator) -> int:
    """One word's id, of the logits (V,)."""
    if config.greedy:
        return int(np.argmax(suppressed(logits, config)))
    ids, probabilities = candidates(logits, config)
    # The inverse of the distribution function. random() is at most 1 - 2**-53, so that the product stays below the sum of
    # all; and a word of probability 0 adds nothing to the sum, so that it is never the first above.
    cumulative = np.cumsum(probabilities)
    return int(ids[np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right")])


def candidates(logits: NDArray[np.float32], config: GenerationConfig) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The ids (K,) of the words that may be drawn from the logits (V,), in rising order, and their probabilities (K,)."""
    allowed = suppressed(logits, config)
    best = allowed.max()
    assert np.isfinite(best), f"the largest logit is {best}"
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the best to -inf, which is right
        scaled = (allowed - best) / config.temperature
    ids = np.arange(len(logits))
    if 0 < config.top_k < len(logits):
        ids = top_k(scaled, config.top_k)
    weights = np.exp(scaled[ids])
    probabilities = weights / weights.sum()
    if config.top_p < 1:
        kept = top_p(probabilities, config.top_p)
        ids, probabilities = ids[kept], probabilities[kept] / probabilities[kept].sum()
    return ids, probabilities


def suppressed(logits: NDArray[np.float32], config: GenerationConfig) -> NDArray[np.float64]:
    """The logits (V,) in double precision, -inf for the words that are never drawn."""
    result = logits.astype(np.float64)
    result[list(config.suppress_tokens)] = -np.inf
    return result


def top_k(logits: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    """Where the `k` largest of (V,) lie, in rising order."""
    least = np.partition(logits, -k)[-k]
    above = np.flatnonzero(logits > least)
    equal = np.flatnonzero(logits == least)[: k - len(above)]
    return np.sort(np.concatenate([above, equal]))


def top_p(probabilities: NDArray[np.float64], p: float) -> NDArray[np.int64]:
    """Where the fewest of (K,) lie whose sum reaches `p`, the likeliest first taken, in rising order."""
    # All below (1 - p) / K are together below 1 - p, so that none of them is needed; the rest is short enough to sort.
    likely = np.flatnonzero(probabilities >= (1 - p) / len(probabilities))
    order = likely[np.argsort(-probabilities[likely], kind="stable")]
    needed = np.searchsorted(np.cumsum(probabilities[order]), p) + 1
    return np.sort(order[:needed])

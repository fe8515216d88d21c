"""Perplexity, for training and for scoring without torch."""

import math


def perplexity(nats: float) -> float:
    """Return exp(`nats` per token), infinite if that overflows a float."""
    return math.exp(nats) if nats < 700 else math.inf

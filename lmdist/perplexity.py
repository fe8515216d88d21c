"""Perplexity, for what trains and for what scores without torch."""

import math


def perplexity(nats: float) -> float:
    """exp(nats a word), infinite where that is more than a float holds."""
    return math.exp(nats) if nats < 700 else math.inf

"""The neural cache in plain NumPy and fp64: each pair of each token, one after the other, by the formulas of the paper."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from lmdist.model.language_model import LanguageModel
from lmdist.text.vocabulary import END_ID


def distributions(
    model: LanguageModel, tokens: Sequence[int] | NDArray[np.integer], size: int, theta: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the log-probabilities (N + 1, V) of model and cache before each of N tokens and after the last.

    The first token follows <eos>. There the cache is empty, and has the model's.
    """
    inputs = torch.tensor([[END_ID, *map(int, tokens)]])
    with torch.no_grad():
        hidden, _ = model(inputs, model.initial_state(1))
        by_model = torch.log_softmax(model.logits(hidden)[0].double(), 1).numpy()
    states = hidden[0].double().numpy()
    by_cache = by_model.copy()
    for now in range(1, len(states)):
        places = range(max(0, now - size), now)
        weights = np.array([np.exp(theta * (states[now] @ states[place])) for place in places])
        probabilities = np.zeros(model.vocabulary_size)
        for place, weight in zip(places, weights / weights.sum(), strict=True):
            probabilities[int(tokens[place])] += weight
        with np.errstate(divide="ignore"):
            by_cache[now] = np.log(probabilities)
    return by_model, by_cache


def mixture(by_model: NDArray[np.float64], by_cache: NDArray[np.float64], weight: float) -> NDArray[np.float64]:
    """Return log((1 - weight) p_model + weight p_cache)."""
    return np.log((1 - weight) * np.exp(by_model) + weight * np.exp(by_cache))

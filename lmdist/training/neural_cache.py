"""The neural cache by torch: its probability of each token of a text, and theta and the weight that fit a text best.

    static, cached = token_log_probabilities(model, tokens, streams, device, size, [theta])
    nats = -mixed(static, cached[0], weight).mean()

The cache (Grave et al. 2017, arXiv:1612.04426; its formulas are in lmdist/cache_settings.py) needs no training: it remembers
the last hidden states and the tokens after them. A text is read in windows: the hidden states of a window times those that each
can remember are one matrix multiplication. This module knows no files.

Shapes: B streams, T tokens of a window, M pairs in memory, H size of the last layer, K thetas, N tokens of the text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lmdist.cache_settings import NeuralCache
from lmdist.errors import DataError
from lmdist.model.language_model import LanguageModel
from lmdist.model.loss import IGNORED
from lmdist.text.token_files import Tokens
from lmdist.training.data import Streams

WINDOW = 256
"""Tokens of each stream that are read at a time; `lmdist-evaluate` without a cache reads as many."""
LOGITS_AT_ONCE = 1024
"""Tokens whose logits are held at a time."""
THETAS = (0.0, *(round(0.02 * 1.35**number, 3) for number in range(19)))
"""0, and 0.02 to 4.4 in steps of a third: larger models, whose h . h is larger, need a smaller one."""
MAX_WEIGHT = 0.99
"""A token that is not in the cache keeps some probability."""
BISECTIONS = 30
"""Halvings of the interval of weights: to 1e-9, far below what is rounded away."""


class Memory:
    """The pairs that each of B streams remembers: a hidden state and the token that came after it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.hidden: Tensor | None = None  # (B, M, H)
        self.tokens: Tensor | None = None  # (B, M)

    def read(self, hidden: Tensor, targets: Tensor, thetas: Sequence[float]) -> Tensor:
        """Return the probability of `targets` (B, T) by the cache before each, (K, B, T), and remember the pairs.

        `hidden` (B, T, H) is what the targets are predicted from. Where nothing is remembered yet the result is NaN.
        """
        length = targets.shape[1]
        keys = hidden if self.hidden is None else torch.cat([self.hidden, hidden], dim=1)  # (B, M + T, H)
        tokens = targets if self.tokens is None else torch.cat([self.tokens, targets], dim=1)  # (B, M + T)
        position = torch.arange(tokens.shape[1], device=tokens.device)  # (M + T)
        now = position[-length:, None]  # (T, 1)
        outside = torch.zeros(length, len(position), device=hidden.device)  # (T, M + T)
        outside.masked_fill_((position >= now) | (position < now - self.size), -math.inf)
        scores = hidden @ keys.transpose(1, 2)  # (B, T, M + T)
        match = tokens[:, None] == targets[:, :, None]  # (B, T, M + T)
        found = [(torch.softmax(outside + theta * scores, dim=2) * match).sum(2) for theta in thetas]  # (B, T) each
        self.hidden, self.tokens = keys[:, -self.size :], tokens[:, -self.size :]
        return torch.stack(found)


@torch.no_grad()
def token_log_probabilities(
    model: LanguageModel,
    tokens: Tokens | np.ndarray,
    streams: int,
    device: torch.device,
    size: int = 0,
    thetas: Sequence[float] = (),
) -> tuple[Tensor, Tensor]:
    """Return log p of each token by the model (N) and by its cache of `size` tokens for each theta (K, N), in fp64.

    The text is read as in `evaluate`, in the order of its batches. Where the cache is empty its p is the model's.
    """
    batches = Streams(tokens, streams, WINDOW)
    state = model.initial_state(streams)
    memory = Memory(size)
    static, cached = [], []
    for step in range(batches.steps_per_epoch):
        inputs, targets = batches.batch(step, slice(0, streams)).tensors_on(device)
        hidden, state = model(inputs, state)  # (B, T, H)
        rows = zip(hidden.flatten(0, 1).split(LOGITS_AT_ONCE), targets.flatten().split(LOGITS_AT_ONCE), strict=True)
        nats = [functional.cross_entropy(model.logits(h), ids, ignore_index=IGNORED, reduction="none") for h, ids in rows]
        present = targets != IGNORED
        by_model = -torch.cat(nats).view_as(targets)[present].double()
        static.append(by_model)
        if thetas:
            by_cache = memory.read(hidden, targets, thetas)[:, present].double().log()
            cached.append(torch.where(by_cache.isnan(), by_model, by_cache))
    return torch.cat(static), torch.cat(cached, dim=1) if thetas else torch.empty(0, len(tokens), dtype=torch.float64)


def mixed(static: Tensor, cached: Tensor, weight: float) -> Tensor:
    """Return log((1 - weight) p_model + weight p_cache) from the logarithms of both."""
    weights = torch.tensor([1 - weight, weight], dtype=static.dtype, device=static.device).log()
    return torch.logaddexp(static + weights[0], cached + weights[1])


def best_weight(static: Tensor, cached: Tensor) -> float:
    """Return the weight for which `mixed` has the largest sum, to 1e-4.

    The sum is concave in the weight, so the weight is where the sum's derivative changes its sign.
    """
    gain = (cached - static).clamp(max=300).expm1()  # p_cache / p_model - 1, and no infinity
    low, high = 0.0, MAX_WEIGHT
    for _ in range(BISECTIONS):
        weight = (low + high) / 2
        rises = float((gain / (1 + weight * gain)).sum()) > 0
        low, high = (weight, high) if rises else (low, weight)
    return round(low, 4)


def tune(model: LanguageModel, tokens: np.ndarray, streams: int, device: torch.device, size: int) -> NeuralCache:
    """Return the cache of `size` tokens whose theta and weight fit a text best; raise DataError if the loss is not finite."""
    static, cached = token_log_probabilities(model, tokens, streams, device, size, THETAS)
    if not static.isfinite().all():
        raise DataError(
            "the loss on the text that tunes the cache is not finite: the weights are too large for a trained model"
        )
    weights = [best_weight(static, by_cache) for by_cache in cached]
    sums = [float(mixed(static, by_cache, weight).sum()) for by_cache, weight in zip(cached, weights, strict=True)]
    best = sums.index(max(sums))
    return NeuralCache(size, THETAS[best], weights[best])


def log_mean(log_probabilities: Sequence[Tensor]) -> Tensor:
    """Return the logarithm of the mean probability of each token (N) by an ensemble, from those of its models."""
    return torch.logsumexp(torch.stack(list(log_probabilities)), dim=0) - math.log(len(log_probabilities))

"""Nats a word, over all ranks.

A metric is a (sum, count) pair: both are summed over the ranks, and divided once, at the end. The sum stays on the device
until someone asks, so that counting costs no wait for the GPU. This module does not know where the figures go.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lmdist.distributed import World


class Nats:
    """Summed nats and the words they were measured on."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.sum = torch.zeros((), dtype=torch.float64, device=world.device)
        self.count = 0

    def add(self, nats: Tensor, tokens: int) -> None:
        """Add one batch: its summed nats, a scalar, and the number of its words, both of this rank."""
        self.sum += nats.detach()
        self.count += tokens

    def mean(self) -> float:
        """Nats a word over all ranks; every rank must ask at the same point."""
        total, count = self.world.sum([self.sum.item(), self.count])
        return total / count if count else math.nan


def perplexity(nats: float) -> float:
    """exp(nats a word), infinite where that is more than a float holds."""
    return math.exp(nats) if nats < 700 else math.inf

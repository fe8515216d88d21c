"""Nats per token, over all ranks.

A metric is a (sum, count) pair: both are summed over the ranks and divided once, at the end. The sum stays on the device
until it is read, so that counting never waits for the GPU. This module does not know where the figures go.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lmdist.training.distributed import World


class NatsTotal:
    """Summed nats and the number of tokens they belong to."""

    def __init__(self, world: World, nats: float = 0.0, count: int = 0) -> None:
        """Start from `nats` on `count` tokens of all ranks, as a resumed run does."""
        self.world = world
        self.sum = torch.tensor(nats if world.is_main else 0.0, dtype=torch.float64, device=world.device)
        self.count = count if world.is_main else 0

    def add(self, nats: Tensor, num_tokens: int) -> None:
        """Add one batch of this rank: its summed nats, a scalar, and the number of its tokens."""
        self.sum += nats.detach()
        self.count += num_tokens

    def totals(self) -> tuple[float, int]:
        """Return summed nats and tokens over all ranks; a collective call."""
        nats, count = self.world.sum([self.sum.item(), self.count])
        return nats, int(count)

    def mean(self) -> float:
        """Return nats per token over all ranks; a collective call."""
        nats, count = self.totals()
        return nats / count if count else math.nan

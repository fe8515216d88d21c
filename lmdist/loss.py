"""From the last layer's output to nats.

Log-sum-exp and loss are in fp32 whatever the precision of the model: on bf16 logits the loss comes out wrong by 0.02 to
0.13 nats. This module knows no ranks and does not divide: what a step's loss is divided by is the global batch's matter.

Shapes: B rows, T words, H size of the last layer, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from lmdist.data import IGNORED


def summed_nats(hidden: Tensor, projection: nn.Linear, targets: Tensor) -> Tensor:
    """Sum over all words of -log p(target), as an fp32 scalar; `hidden` is (B, T, H), `targets` (B, T)."""
    logits = projection(hidden.flatten(0, 1))  # (B * T, V)
    return functional.cross_entropy(logits.float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")

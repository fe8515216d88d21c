"""From the last layer's output to nats, without ever holding the logits of all words.

With a large vocabulary the logits (B * T, V) and their gradient are most of a step's memory, and reading and writing them is
much of its time. So they are made for some hundred words at a time, and what they are needed for is done at once: they
become probabilities, in their place, then their own gradient, then the gradients of the hidden states and of the projection,
and are gone. The backward pass has only to multiply these by what comes from above. (The idea of Liger Kernel, Hsu et al.
2024, arXiv:2410.10989, and of Cut Cross-Entropy, Wijmans et al. 2024, arXiv:2411.09009; here it is plain PyTorch.)

torch's own F.linear_cross_entropy is as small in memory and, in the chunks it takes by itself, about three times slower than
plain logits at the batch sizes of an LSTM.

Log-sum-exp and loss are in fp32 whatever the precision of the model: on bf16 logits the loss comes out wrong by 0.02 to
0.13 nats. This module knows no ranks and does not divide: what a step's loss is divided by is the global batch's matter.

Shapes: N = B * T words, R words of a chunk, H size of the last layer, V vocabulary.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

IGNORED = -100
"""The target of a place that counts for nothing, such as the padding of a batch. torch's own `ignore_index`."""
ROWS = 512
"""Words of a chunk, at least: with fewer, reading the projection anew for each chunk costs more than it saves."""


def summed_nats(hidden: Tensor, projection: nn.Module, targets: Tensor) -> Tensor:
    """Sum over all words of -log p(target), as an fp32 scalar; `hidden` is (B, T, H), `targets` (B, T)."""
    hidden, targets = hidden.flatten(0, 1), targets.flatten()  # (N, H), (N)
    if isinstance(projection, nn.AdaptiveLogSoftmaxWithLoss):
        return adaptive_nats(hidden, projection, targets)
    assert isinstance(projection, nn.Linear), projection
    return linear_nats(hidden, projection.weight, projection.bias, targets)


def adaptive_nats(hidden: Tensor, projection: nn.AdaptiveLogSoftmaxWithLoss, targets: Tensor) -> Tensor:
    """The summed nats of the adaptive softmax (Grave et al. 2017, arXiv:1609.04309): exact, normalised over all words.

    A rare word costs the nats of its cluster, among the frequent words, and its own, among the words of the cluster.
    """
    nats = hidden.new_zeros((), dtype=torch.float32)
    first = targets.clone()  # what is predicted among the frequent words and the clusters
    for number, (start, end) in enumerate(pairwise(projection.cutoffs)):
        inside = (targets >= start) & (targets < end)
        first[inside] = projection.cutoffs[0] + number
        rows = inside.nonzero().squeeze(1)  # none is also right: then the cluster's gradients are zeros
        narrow, words = projection.tail[number]  # type: ignore[misc]
        nats = nats + linear_nats(narrow(hidden[rows]), words.weight, words.bias, targets[rows] - start)
    return nats + linear_nats(hidden, projection.head.weight, projection.head.bias, first)


def linear_nats(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Summed nats of `targets` (N,) by the logits hidden (N, H) @ weight (V, H) + bias (V,); IGNORED ones are left out.

    The products are in autocast's precision where it is on.
    """
    device = hidden.device.type
    low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        nats: Tensor = LinearNats.apply(hidden, weight, bias, targets, low, torch.is_grad_enabled())  # type: ignore[assignment]
    return nats


def activation_penalty(raw: Tensor, dropped: Tensor, activation: float, temporal: float) -> Tensor:
    """AR and TAR of Merity et al. 2017 (arXiv:1708.01009), an fp32 scalar: a mean, so that a batch's is the mean of its rows'.

    `activation` is the weight of the mean square of the last layer's outputs `dropped` (B, T, H), `temporal` that of the mean
    square of the change of `raw` (B, T, H), those before dropout, from word to word.
    """
    penalty = activation * dropped.float().square().mean()
    if raw.shape[1] > 1:
        penalty = penalty + temporal * (raw[:, 1:] - raw[:, :-1]).float().square().mean()
    return penalty


class LinearNats(torch.autograd.Function):
    """Projection and cross-entropy in one, chunk by chunk, with the gradients made on the way forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, low: torch.dtype, learning: bool
    ) -> Tensor:
        """The summed nats of `targets`; the gradients are made only where one is `learning`."""
        exact = torch.promote_types(low, torch.float32)
        matrix, offset = weight.to(low), None if bias is None else bias.to(low)
        nats = torch.zeros((), dtype=exact, device=hidden.device)
        by_hidden, by_weight, by_bias = torch.empty_like(hidden), None, None
        parts = max(1, len(hidden) // ROWS)
        for rows, words, by_rows in zip(*(tensor.chunk(parts) for tensor in (hidden, targets, by_hidden)), strict=True):
            rows = rows.to(low)  # (R, H)
            there = (words != IGNORED).unsqueeze(1)  # (R, 1)
            words = words.clamp(min=0).unsqueeze(1)  # (R, 1)
            logits = functional.linear(rows, matrix, offset)  # (R, V)
            largest, right = logits.amax(1, keepdim=True), logits.gather(1, words)  # (R, 1)
            # In place: the logits are not needed any more. In fp32 no second matrix of this size is ever made.
            p = torch.softmax(logits, 1, out=logits) if low == exact else torch.softmax(logits, 1, dtype=exact)
            # The largest probability is exp(largest - log-sum-exp) and at least 1 / V: its logarithm is exact.
            log_sum_exp = largest.to(exact) - p.amax(1, keepdim=True).log()
            nats += ((log_sum_exp - right) * there).sum()
            if not learning:
                continue
            by_logits = p.scatter_add_(1, words, p.new_full((1, 1), -1).expand_as(words)).to(low)  # (R, V)
            # Words that do not count are left out of the products, which is less work than out of the logits' gradient.
            by_rows.copy_((by_logits @ matrix) * there)
            rows, counts = rows * there, there.squeeze(1).to(low)
            if by_weight is None:
                by_weight = (by_logits.t() @ rows).to(weight.dtype)  # (V, H)
            elif low == weight.dtype:
                by_weight.addmm_(by_logits.t(), rows)
            else:
                by_weight += by_logits.t() @ rows
            if bias is not None:
                by_chunk = (counts @ by_logits).to(bias.dtype)  # (V)
                by_bias = by_chunk if by_bias is None else by_bias.add_(by_chunk)
        if learning:
            ctx.save_for_backward(by_hidden, by_weight, by_bias)
        return nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """The gradients, times what the sum was multiplied by after."""
        return (*(None if gradient is None else gradient.mul_(factor) for gradient in ctx.saved_tensors), None, None, None)

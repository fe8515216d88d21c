"""The loss: projection and cross-entropy fused, in chunks, so that the logits of all tokens never exist at once.

With a large vocabulary the logits (B * T, V) and their gradient are most of a step's memory, and reading and writing them is
much of its time. Here a chunk of some hundred tokens goes all the way in the forward pass: its logits become probabilities in
place, then their own gradient, then the gradients of the hidden states and of the projection. The backward pass only
multiplies these by the incoming gradient, a scalar. The idea is that of Liger Kernel (Hsu et al. 2024, arXiv:2410.10989) and
of Cut Cross-Entropy (Wijmans et al. 2024, arXiv:2411.09009), in plain PyTorch.

torch's own F.linear_cross_entropy needs as little memory. With its default chunks it is about three times slower than plain
logits at the batch sizes of an LSTM.

Log-sum-exp and loss are fp32 in any precision of the model: on bf16 logits the loss is off by 0.02 to 0.13 nats. This module
knows no ranks and does not divide by the tokens of the global batch.

Shapes: N = B * T tokens, C tokens of a chunk, H size of the last layer, V vocabulary.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

IGNORED = -100
"""The target of padding: torch's default `ignore_index`."""
CHUNK_SIZE = 512
"""The least tokens of a chunk: with fewer, reading the projection again for each chunk costs more than it saves."""
BLOCK_BYTES = 1 << 20
"""On a CPU the softmax of a chunk is computed in blocks of so many bytes per thread, which stay in its core's L2 cache."""


def summed_nats(hidden: Tensor, projection: nn.Module, targets: Tensor) -> Tensor:
    """Return the summed negative log-likelihood of `targets` (B, T), an fp32 scalar, for outputs `hidden` (B, T, H)."""
    hidden, targets = hidden.flatten(0, 1), targets.flatten()  # (N, H), (N)
    if isinstance(projection, nn.AdaptiveLogSoftmaxWithLoss):
        return adaptive_nats(hidden, projection, targets)
    assert isinstance(projection, nn.Linear), projection
    return linear_nats(hidden, projection.weight, projection.bias, targets)


def adaptive_nats(hidden: Tensor, projection: nn.AdaptiveLogSoftmaxWithLoss, targets: Tensor) -> Tensor:
    """Return the summed nats of the adaptive softmax (Grave et al. 2017, arXiv:1609.04309), exact over all tokens.

    -log p of a rare token is that of its cluster, among the frequent tokens and the clusters, plus its own in the cluster.
    """
    nats = hidden.new_zeros((), dtype=torch.float32)
    first = targets.clone()  # among the frequent tokens and the clusters
    for number, (start, end) in enumerate(pairwise(projection.cutoffs)):
        inside = (targets >= start) & (targets < end)
        first[inside] = projection.cutoffs[0] + number
        index = inside.nonzero().squeeze(1)  # if it is empty, the cluster's gradients are zeros
        narrow, output = projection.tail[number]  # type: ignore[misc]
        nats = nats + linear_nats(narrow(hidden[index]), output.weight, output.bias, targets[index] - start)
    return nats + linear_nats(hidden, projection.head.weight, projection.head.bias, first)


def linear_nats(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Return the summed nats of `targets` (N) for the logits hidden (N, H) @ weight.t() (H, V) + bias (V), without IGNORED.

    The matrix multiplications are in autocast's precision if it is on.
    """
    device = hidden.device.type
    low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        nats: Tensor = LinearNats.apply(hidden, weight, bias, targets, low, torch.is_grad_enabled())  # type: ignore[assignment]
    return nats


def activation_penalty(raw: Tensor, dropped: Tensor, activation: float, temporal: float) -> Tensor:
    """Return AR and TAR of Merity et al. 2017 (arXiv:1708.01009), an fp32 scalar and a mean over the batch.

    `activation` is the weight of the mean square of the last layer's outputs after dropout, `dropped` (B, T, H); `temporal`
    that of the mean square of the change from token to token of those before dropout, `raw` (B, T, H).
    """
    penalty = activation * dropped.float().square().mean()
    if raw.shape[1] > 1:
        penalty = penalty + temporal * (raw[:, 1:] - raw[:, :-1]).float().square().mean()
    return penalty


def softmax_in_place(logits: Tensor, ids: Tensor, exact: torch.dtype, with_gradients: bool) -> Tensor:
    """Return the log-sum-exp (C, 1) of logits (C, V), whose memory is used for the probabilities; `ids` is (C, 1).

    `with_gradients` the logits become the gradient of -log p(ids), p - one_hot(ids). All is computed in the type `exact`, and
    the gradient is rounded to that of the logits. On a CPU a few rows at a time, because elementwise work on the whole matrix
    is bound by the memory.
    """
    size = len(logits)
    if logits.device.type == "cpu":
        size = max(1, torch.get_num_threads() * BLOCK_BYTES // (logits.shape[1] * exact.itemsize))
    buffer = None if logits.dtype == exact else logits.new_empty(min(size, len(logits)), logits.shape[1], dtype=exact)
    log_sum_exp = logits.new_empty(len(logits), 1, dtype=exact)
    for block, targets, result in zip(logits.split(size), ids.split(size), log_sum_exp.split(size), strict=True):
        p = block if buffer is None else buffer[: len(block)].copy_(block)
        largest = p.amax(1, keepdim=True)
        torch.softmax(p, 1, out=p)
        # The largest probability is exp(largest - log-sum-exp) and at least 1 / V: its logarithm is exact.
        torch.sub(largest, p.amax(1, keepdim=True).log(), out=result)
        if with_gradients:
            p.scatter_add_(1, targets, p.new_full((1, 1), -1).expand_as(targets))
            if buffer is not None:
                block.copy_(p)
    return log_sum_exp


class LinearNats(torch.autograd.Function):
    """Projection and cross-entropy in one, chunk by chunk, with the gradients computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, low: torch.dtype, with_gradients: bool
    ) -> Tensor:
        """Return the summed nats of `targets`; compute the gradients only if `with_gradients`."""
        exact = torch.promote_types(low, torch.float32)
        matrix, offset = weight.to(low), None if bias is None else bias.to(low)
        nats = torch.zeros((), dtype=exact, device=hidden.device)
        by_hidden, by_weight, by_bias = torch.empty_like(hidden), None, None
        num_chunks = max(1, len(hidden) // CHUNK_SIZE)
        chunks = zip(*(tensor.chunk(num_chunks) for tensor in (hidden, targets, by_hidden)), strict=True)
        for vectors, ids, by_vectors in chunks:
            vectors = vectors.to(low)  # (C, H)
            mask = (ids != IGNORED).unsqueeze(1)  # (C, 1)
            ids = ids.clamp(min=0).unsqueeze(1)  # (C, 1)
            logits = functional.linear(vectors, matrix, offset)  # (C, V)
            correct = logits.gather(1, ids)  # (C, 1)
            log_sum_exp = softmax_in_place(logits, ids, exact, with_gradients)  # (C, 1)
            nats += ((log_sum_exp - correct) * mask).sum()
            if not with_gradients:
                continue
            by_logits = logits  # (C, V), in place
            # Masking the operands and results is less work than masking the logits' gradient.
            by_vectors.copy_((by_logits @ matrix) * mask)  # (C, H)
            vectors, weights = vectors * mask, mask.squeeze(1).to(low)  # (C, H), (C)
            if by_weight is None:
                by_weight = (by_logits.t() @ vectors).to(weight.dtype)  # (V, H)
            elif low == weight.dtype:
                by_weight.addmm_(by_logits.t(), vectors)
            else:
                by_weight += by_logits.t() @ vectors
            if bias is not None:
                by_chunk = (weights @ by_logits).to(bias.dtype)  # (V)
                by_bias = by_chunk if by_bias is None else by_bias.add_(by_chunk)
        if with_gradients:
            ctx.save_for_backward(by_hidden, by_weight, by_bias)
        return nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Return the saved gradients times the gradient of the sum, a scalar."""
        return (*(None if saved is None else saved.mul_(gradient) for saved in ctx.saved_tensors), None, None, None)

"""The loss: projection and cross-entropy fused, in chunks, so that the logits of all tokens never exist at once.

With a large vocabulary the logits (B * T, V) and their gradient are most of a step's memory, and reading and writing them is
much of its time. Here a chunk of at least a thousand tokens goes all the way in the forward pass: its logits, then the
gradients of the hidden states and of the projection. The backward pass only multiplies these by the incoming gradient, a
scalar, unless it is the one that was expected. The idea is that of Liger Kernel (Hsu et al. 2024, arXiv:2410.10989) and of Cut
Cross-Entropy (Wijmans et al. 2024, arXiv:2411.09009), in plain PyTorch.

A GPU takes few large kernels (`LinearNats`). A CPU takes blocks of the vocabulary that stay in a core's cache, and the layouts
of matrices that its matrix multiplications are fast in (`BlockedLinearNats`).

torch's own F.linear_cross_entropy needs as little memory. With its default chunks it is about three times slower than plain
logits at the batch sizes of an LSTM.

Log-sum-exp and loss are fp32 in any precision of the model: on bf16 logits the loss is off by 0.02 to 0.13 nats. This module
knows no ranks and does not divide by the tokens of the global batch.

Shapes: N = B * T tokens, C tokens of a chunk, H size of the last layer, V vocabulary, R rows of a block of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

IGNORED = -100
"""The target of padding: torch's default `ignore_index`."""
CHUNK_SIZE = 1024
"""The least tokens of a chunk: with fewer, reading the projection and its gradient again for each chunk costs more than it
saves."""
BLOCK_BYTES = 1 << 21
"""On a CPU the fp32 logits of a block of the vocabulary have so many bytes per thread: about a core's L2 cache."""
CLUSTER_MULTIPLE = 64
"""The tokens of an adaptive head's cluster are padded to a multiple of this: oneDNN compiles and keeps a kernel for each shape,
and without padding nearly every step has another one."""
GRADIENT_ROWS = 2048
"""The rows of the projection whose gradient is computed at once, and cast while it is in the cache."""
LARGEST_RATIO = 1e16
"""A sum of p(token) / p(target) from which the ratios are related to a likelier token: far from the ends of fp32 and bf16."""


def summed_nats(hidden: Tensor, projection: nn.Module, targets: Tensor, expected_gradient: Tensor | None = None) -> Tensor:
    """Return the summed negative log-likelihood of `targets` (B, T), an fp32 scalar, for outputs `hidden` (B, T, H).

    `expected_gradient`: see `linear_nats`.
    """
    hidden, targets = hidden.flatten(0, 1), targets.flatten()  # (N, H), (N)
    if isinstance(projection, nn.AdaptiveLogSoftmaxWithLoss):
        return adaptive_nats(hidden, projection, targets, expected_gradient)
    assert isinstance(projection, nn.Linear), projection
    return linear_nats(hidden, projection.weight, projection.bias, targets, expected_gradient)


def adaptive_nats(
    hidden: Tensor, projection: nn.AdaptiveLogSoftmaxWithLoss, targets: Tensor, expected_gradient: Tensor | None
) -> Tensor:
    """Return the summed nats of the adaptive softmax (Grave et al. 2017, arXiv:1609.04309), exact over all tokens.

    -log p of a rare token is that of its cluster, among the frequent tokens and the clusters, plus its own in the cluster.
    """
    nats = hidden.new_zeros((), dtype=torch.float32)
    first = targets.clone()  # among the frequent tokens and the clusters
    for number, (start, end) in enumerate(pairwise(projection.cutoffs)):
        inside = (targets >= start) & (targets < end)
        first[inside] = projection.cutoffs[0] + number
        index = inside.nonzero().squeeze(1)  # if it is empty, the cluster's gradients are zeros
        padding = (0, -len(index) % CLUSTER_MULTIPLE)
        index, inner = functional.pad(index, padding), functional.pad(targets[index] - start, padding, value=IGNORED)
        narrow, output = projection.tail[number]  # type: ignore[misc]
        nats = nats + linear_nats(narrow(hidden[index]), output.weight, output.bias, inner, expected_gradient)
    return nats + linear_nats(hidden, projection.head.weight, projection.head.bias, first, expected_gradient)


def linear_nats(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, expected_gradient: Tensor | None = None
) -> Tensor:
    """Return the summed nats of `targets` (N) for the logits hidden (N, H) @ weight.t() (H, V) + bias (V), without IGNORED.

    The matrix multiplications are in autocast's precision if it is on. `expected_gradient` is a hint: if it is the gradient
    that arrives in the backward pass, the saved gradients need no multiplication.
    """
    device = hidden.device.type
    low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    function = BlockedLinearNats if device == "cpu" else LinearNats
    with torch.autocast(device, enabled=False):
        arguments = hidden, weight, bias, targets, low, torch.is_grad_enabled(), expected_gradient
        nats: Tensor = function.apply(*arguments)  # type: ignore[assignment]
    return nats


def activation_penalty(raw: Tensor, dropped: Tensor, counted: Tensor, activation: float, temporal: float) -> Tensor:
    """Return AR and TAR of Merity et al. 2017 (arXiv:1708.01009), an fp32 scalar and a sum over the tokens `counted` (B, T).

    `activation` is the weight of the mean square of the last layer's outputs after dropout, `dropped` (B, T, H); `temporal`
    that of the mean square of the change from token to token of those before dropout, `raw` (B, T, H). A sequence of T tokens
    has T - 1 changes, which together weigh as much as its tokens. What is not counted may be anything finite.
    """
    penalty = activation * (dropped.float().square().mean(2) * counted).sum()
    length = raw.shape[1]
    if length > 1:
        changes = (raw[:, 1:] - raw[:, :-1]).float().square().mean(2)  # (B, T - 1)
        penalty = penalty + temporal * length / (length - 1) * (changes * (counted[:, 1:] & counted[:, :-1])).sum()
    return penalty


def softmax_in_place(logits: Tensor, ids: Tensor, exact: torch.dtype, with_gradients: bool) -> Tensor:
    """Return the log-sum-exp (C, 1) of logits (C, V), whose memory is used for the probabilities; `ids` is (C, 1).

    `with_gradients` the logits become the gradient of -log p(ids), p - one_hot(ids). All is computed in the type `exact`, and
    the gradient is rounded to that of the logits.
    """
    p = logits.to(exact)
    largest = p.amax(1, keepdim=True)
    torch.softmax(p, 1, out=p)
    # The largest probability is exp(largest - log-sum-exp) and at least 1 / V: its logarithm is exact.
    log_sum_exp = largest - p.amax(1, keepdim=True).log()
    if with_gradients:
        p.scatter_add_(1, ids, p.new_full((1, 1), -1).expand_as(ids))
        if p is not logits:
            logits.copy_(p)
    return log_sum_exp


class LinearNats(torch.autograd.Function):
    """Projection and cross-entropy in one, chunk by chunk, with the gradients computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        low: torch.dtype,
        with_gradients: bool,
        _expected_gradient: Tensor | None,  # to compare it would wait for the GPU
    ) -> Tensor:
        """Return the summed nats of `targets`; compute the gradients only if `with_gradients`."""
        exact = torch.promote_types(low, torch.float32)
        matrix, offset = weight.to(low), None if bias is None else bias.to(low)
        nats = torch.zeros((), dtype=exact, device=hidden.device)
        by_hidden, by_weight, by_bias = torch.empty_like(hidden), None, None
        for vectors, ids, by_vectors in chunks(hidden, targets, by_hidden):
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
        saved = (None if saved is None else saved.mul_(gradient) for saved in ctx.saved_tensors)
        return (*saved, None, None, None, None)


class BlockedLinearNats(torch.autograd.Function):
    """The same on a CPU, chunk by chunk and in it block by block of the vocabulary.

    Of each token v and position n only the ratio p(v) / p(target of n) is computed, r(v, n): its sum over v is 1 / p(target).
    So one exponential is enough, and no softmax; the sums scale the operands of the gradients' matrix multiplications.
    The ratios are (V, C), because these multiplications are up to twice as fast that way.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        low: torch.dtype,
        with_gradients: bool,
        expected_gradient: Tensor | None,
    ) -> Tensor:
        """Return the summed nats of `targets`; compute the gradients, times the expected one, only if `with_gradients`."""
        exact = torch.promote_types(low, torch.float32)
        expected = torch.ones((), dtype=exact) if expected_gradient is None else expected_gradient
        nats = torch.zeros((), dtype=exact)
        by_hidden = torch.empty_like(hidden)
        by_weight = torch.empty_like(weight) if with_gradients else None
        by_bias = torch.zeros_like(bias) if with_gradients and bias is not None else None
        parts = chunks(hidden, targets, by_hidden)
        blocks = projection_blocks(weight, bias, len(parts[0][0]), exact)
        if len(parts) > 1 and low != weight.dtype:
            # Several chunks read the weights several times, and bf16 is fast with the right layouts only. For a single chunk a
            # block is cast when it is read, in the cache, which takes no memory.
            blocks = [block.cast(low, with_gradients) for block in blocks]
        for number, (vectors, ids, by_vectors) in enumerate(parts):
            mask = ids != IGNORED  # (C)
            ids = ids.clamp(min=0)  # (C)
            vectors, target_rows = vectors.to(low), weight[ids]  # (C, H), (C, H)
            # Rounded like the other logits, so that a token as likely as the target has the ratio 1.
            target_logits = (vectors.to(exact) * target_rows.to(low).to(exact)).sum(1).to(low).to(exact)  # (C)
            if bias is not None:
                target_logits += bias[ids]
            ratios, sums, shift, weighted_rows = probability_ratios(vectors, blocks, target_logits, with_gradients)
            nats += ((sums.log() + (shift - target_logits)) * mask).sum()
            if not with_gradients:
                continue
            assert by_weight is not None
            # The gradient of a logit is p - 1 for the target, else p = ratio / sum.
            scale = mask * expected  # (C)
            factor = scale / sums  # (C)
            by_vectors.copy_(weighted_rows * factor.unsqueeze(1) - target_rows * scale.unsqueeze(1))  # (C, H)
            scaled = (vectors * factor.unsqueeze(1)).to(low)  # (C, H)
            for block, by_rows in zip(ratios.split(GRADIENT_ROWS), by_weight.split(GRADIENT_ROWS), strict=True):
                by_chunk = block @ scaled  # (rows, H)
                by_rows.add_(by_chunk.to(weight.dtype)) if number else by_rows.copy_(by_chunk)
            by_weight.index_add_(0, ids, vectors * -scale.unsqueeze(1))
            if by_bias is not None:
                by_bias.add_(ratios @ factor.to(low)).index_add_(0, ids, -scale)
        if with_gradients:
            ctx.save_for_backward(expected, by_hidden, by_weight, by_bias)
        return nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Return the saved gradients, times the gradient of the sum if it is not the expected one."""
        expected, *saved = ctx.saved_tensors
        if gradient != expected:
            for each in saved:
                if each is not None:
                    each.mul_(gradient / expected)
        return (*saved, None, None, None, None)


class Block(NamedTuple):
    """Some rows of the projection: as many as have fp32 logits that stay in a core's cache."""

    weight: Tensor
    """(R, H)."""
    transposed: Tensor
    """The same as (H, R)."""
    bias: Tensor | None
    """(R, 1)."""

    def cast(self, low: torch.dtype, with_gradients: bool) -> Block:
        """Return the block in another type, its transposed rows contiguous `with_gradients`, which alone multiply by them."""
        weight = self.weight.to(low)
        return Block(weight, weight.t().contiguous() if with_gradients else weight.t(), self.bias)


def projection_blocks(weight: Tensor, bias: Tensor | None, chunk_size: int, exact: torch.dtype) -> list[Block]:
    """Split a projection (V, H) into blocks whose logits, in the type `exact` and of `chunk_size` tokens, have BLOCK_BYTES."""
    rows = max(1, torch.get_num_threads() * BLOCK_BYTES // (max(1, chunk_size) * exact.itemsize))
    weights = weight.split(rows)
    biases = [None] * len(weights) if bias is None else bias.unsqueeze(1).split(rows)
    return [Block(weight, weight.t(), bias) for weight, bias in zip(weights, biases, strict=True)]


def probability_ratios(
    vectors: Tensor, blocks: Sequence[Block], shift: Tensor, with_gradients: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return r = exp(logits - shift) (V, C), its sums over the vocabulary (C), the shift (C), and r.t() @ projection (C, H).

    `vectors` are (C, H) in the precision of the matrix multiplications. `shift` (C) is a logit of each position, which is
    replaced by a larger one if the ratios become too large. Without gradients only sums and shift are computed.
    """
    low, exact = vectors.dtype, shift.dtype
    operand = vectors.t().contiguous()  # (H, C)
    rows, vocabulary_size = len(blocks[0].weight), sum(len(block.weight) for block in blocks)
    ratios = torch.empty(vocabulary_size if with_gradients else rows, len(vectors), dtype=low)  # (V, C)
    buffer = torch.empty(rows, len(vectors), dtype=exact)
    product, product_exact = torch.empty_like(operand), torch.empty_like(operand, dtype=exact)  # (H, C)
    sums, weighted_rows = torch.zeros_like(shift), torch.zeros_like(product_exact)  # (C), (H, C)
    for number, (weight, transposed, bias) in enumerate(blocks):
        start = number * rows if with_gradients else 0
        if weight.dtype != low:
            weight = weight.to(low)
            transposed = weight.t()
        logits = torch.mm(weight, operand, out=ratios[start : start + len(weight)])  # (R, C)
        values = buffer[: len(weight)]
        block_sums = exponentials(logits, bias, shift, out=values)  # (C)
        if (block_sums > LARGEST_RATIO).any():
            larger = torch.maximum(shift, (logits if bias is None else logits + bias).amax(0).to(exact))  # (C)
            correction, shift = torch.exp(shift - larger), larger  # (C), (C)
            for computed in (sums, weighted_rows, ratios[:start]):
                computed.mul_(correction)
            block_sums = exponentials(logits, bias, shift, out=values)
        sums.add_(block_sums)
        if with_gradients:
            logits.copy_(values)
            torch.mm(transposed, logits, out=product)
            # By way of a copy, because adding bf16 to fp32 is slow.
            weighted_rows.add_(product_exact.copy_(product))
    return ratios, sums, shift, weighted_rows.t()


def exponentials(logits: Tensor, bias: Tensor | None, shift: Tensor, *, out: Tensor) -> Tensor:
    """Compute exp(logits + bias - shift) (R, C) into `out`; return its sums over the rows (C)."""
    out.copy_(logits)
    if bias is not None:
        out.add_(bias)
    return out.sub_(shift).exp_().sum(0)


def chunks(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Split tensors of N rows each into chunks of at least CHUNK_SIZE rows."""
    num_chunks = max(1, len(tensors[0]) // CHUNK_SIZE)
    return list(zip(*(tensor.chunk(num_chunks) for tensor in tensors), strict=True))

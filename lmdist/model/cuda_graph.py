"""Forward and backward of a step as one CUDA graph, recorded once and replayed for each batch.

A step of an LSTM is hundreds of short kernels, and launching them one by one takes longer than running them. Only batches of
one shape can share a graph; others, such as the last and shorter one of an epoch, run without it. The first replay is compared
with the result without a graph. This module does not know what is computed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lmdist.console import log

WARM_UP = 3
"""Calls before the recording, in which cuBLAS and cuDNN choose their kernels and allocate what they keep for a stream: they
run on that of the recording, in which nothing may be allocated."""

TOLERANCE = 0.02
"""The largest relative error allowed of a result of the graph, by norm."""

Function = Callable[..., tuple[Tensor, ...]]


class Graphed:
    """A function of tensors that also fills the gradients of `model`, replayed if its arguments have their usual shapes.

    The gradients must be None before each call: a graph overwrites them, and does not add to them.
    """

    def __init__(self, function: Function, model: nn.Module) -> None:
        self.function = function
        self.parameters = list(model.parameters())
        self.stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        self.shapes: list[torch.Size] = []
        self.calls = 0
        self.replay: Function | None = None

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        """Return the results of the function."""
        shapes = [argument.shape for argument in arguments]
        if self.calls == 0:
            self.shapes = shapes
        if shapes != self.shapes or self.calls < 0:
            return self.function(*arguments)
        self.calls += 1
        if self.calls <= WARM_UP:
            return self.call_aside(*arguments)
        if self.replay is None:
            return self.record(arguments)
        return self.replay(*arguments)

    def call_aside(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        """Call the function on the stream of the recording, after all that was called before and before all that follows."""
        if self.stream is None:
            return self.function(*arguments)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            results = self.function(*arguments)
        torch.cuda.current_stream().wait_stream(self.stream)
        return results

    def record(self, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Record the graph and compare it with the function; if that fails, continue without a graph.

        If a result is not finite, it is not recorded yet.
        """
        expected = self.call_aside(*arguments), [parameter.grad for parameter in self.parameters]
        if not all_finite([*expected[0], *expected[1]]):
            return expected[0]  # fp16, whose loss scale is still too high: nothing to compare with, so the next call records
        try:
            for parameter in self.parameters:
                parameter.grad = None
            replay = recorded(self.function, arguments, self.parameters, self.stream)
            found = replay(*arguments), [parameter.grad for parameter in self.parameters]
            error = max_relative_error([*found[0], *found[1]], [*expected[0], *expected[1]])
            if not error <= TOLERANCE:
                raise RuntimeError(f"its results differ by {error:.2g}")
            self.replay = replay
        except RuntimeError as failure:
            self.calls = -1
            reason = str(failure).partition("\n")[0]
            log(f"warning: training continues without a CUDA graph, more slowly: {reason}")
            for parameter, gradient in zip(self.parameters, expected[1], strict=True):
                parameter.grad = gradient
            return expected[0]
        return found[0]


def recorded(
    function: Function, arguments: tuple[Tensor, ...], parameters: list[nn.Parameter], stream: torch.cuda.Stream | None
) -> Function:
    """Return `function` as a CUDA graph, recorded on `stream`.

    Its results are copies, its gradients are overwritten by the next replay.
    """
    inputs = [argument.clone() for argument in arguments]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        outputs = function(*inputs)
    gradients = [parameter.grad for parameter in parameters]

    def replay(*arguments: Tensor) -> tuple[Tensor, ...]:
        for buffer, argument in zip(inputs, arguments, strict=True):
            buffer.copy_(argument)
        graph.replay()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        return tuple(output.clone() for output in outputs)

    return replay


def all_finite(tensors: list[Tensor | None]) -> bool:
    """Return whether all numbers are finite."""
    return bool(torch.stack([tensor.isfinite().all() for tensor in tensors if tensor is not None]).all())


def max_relative_error(found: list[Tensor | None], expected: list[Tensor | None]) -> float:
    """Return the largest relative error, by norm, of a tensor of `found` against its counterpart in `expected`."""
    largest = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        if ours is None or theirs is None:
            assert ours is theirs, (ours, theirs)
            continue
        error = (ours.float() - theirs.float()).norm() / theirs.float().norm().clamp(min=1e-30)
        largest = max(largest, error.nan_to_num(torch.inf).item())
    return largest

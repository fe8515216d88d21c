"""Forward and backward of a step as one CUDA graph: the GPU is told once what to launch, and does it again for each batch.

A step of an LSTM is hundreds of short kernels, and launching them one by one takes longer than running them. Only batches of
one shape can share a graph; others, such as the last and shorter one of an epoch, run as they always did. The first answer of
a graph is compared with the one without it. This module does not know what is computed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

WARM_UP = 3
"""Calls before the recording: cuBLAS and cuDNN choose their kernels in them."""

TOLERANCE = 0.02
"""The largest relative difference allowed between a result of the graph and of the function."""

Function = Callable[..., tuple[Tensor, ...]]


class Graphed:
    """A function of tensors that also fills the gradients of `model`, replayed where its arguments have their usual shapes.

    The gradients must be None before each call: one graph writes them, and does not add to them.
    """

    def __init__(self, function: Function, model: nn.Module) -> None:
        self.function = function
        self.parameters = list(model.parameters())
        self.shapes: list[torch.Size] = []
        self.calls = 0
        self.replay: Function | None = None

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        """What the function gives."""
        shapes = [argument.shape for argument in arguments]
        if self.calls == 0:
            self.shapes = shapes
        if shapes != self.shapes or self.calls < 0:
            return self.function(*arguments)
        self.calls += 1
        if self.calls <= WARM_UP:
            return self.function(*arguments)
        if self.replay is None:
            return self.record(arguments)
        return self.replay(*arguments)

    def record(self, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Record the graph and compare it with the function; where that fails, go on without one."""
        generator = torch.cuda.get_rng_state()
        expected = self.function(*arguments), [parameter.grad for parameter in self.parameters]
        try:
            for parameter in self.parameters:
                parameter.grad = None
            torch.cuda.set_rng_state(generator)  # the same dropout again
            replay = recorded(self.function, arguments, self.parameters)
            torch.cuda.set_rng_state(generator)
            found = replay(*arguments), [parameter.grad for parameter in self.parameters]
            worst = largest_difference([*found[0], *found[1]], [*expected[0], *expected[1]])
            if not worst <= TOLERANCE:
                raise RuntimeError(f"its results differ by {worst:.2g}")
            self.replay = replay
        except RuntimeError as error:
            self.calls = -1
            reason = str(error).partition("\n")[0]
            sys.stderr.write(f"warning: training goes on without a CUDA graph, more slowly: {reason}\n")
            for parameter, gradient in zip(self.parameters, expected[1], strict=True):
                parameter.grad = gradient
            return expected[0]
        return found[0]


def recorded(function: Function, arguments: tuple[Tensor, ...], parameters: list[nn.Parameter]) -> Function:
    """`function` as a CUDA graph; what it gives and the gradients are copies, or lie where the next replay writes them."""
    inputs = [argument.clone() for argument in arguments]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function(*inputs)
    gradients = [parameter.grad for parameter in parameters]

    def replay(*arguments: Tensor) -> tuple[Tensor, ...]:
        for kept, given in zip(inputs, arguments, strict=True):
            kept.copy_(given)
        graph.replay()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        return tuple(output.clone() for output in outputs)

    return replay


def largest_difference(found: list[Tensor | None], expected: list[Tensor | None]) -> float:
    """The largest difference between two tensors of the lists, relative to the norm of the expected one."""
    worst = 0.0
    for here, there in zip(found, expected, strict=True):
        if here is None or there is None:
            assert here is there, (here, there)
            continue
        difference = (here.float() - there.float()).norm() / there.float().norm().clamp(min=1e-30)
        worst = max(worst, difference.nan_to_num(torch.inf).item())
    return worst

"""When a graph is recorded, replayed and abandoned; the function stands in for the recording (tests/gpu has the real one)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lmdist.model import cuda_graph
from lmdist.model.cuda_graph import WARM_UP, Graphed


@pytest.fixture
def model(monkeypatch) -> nn.Linear:
    for name in ("get_rng_state", "set_rng_state"):
        monkeypatch.setattr(torch.cuda, name, getattr(torch, name))
    torch.manual_seed(0)
    return nn.Linear(3, 2)


class Recording:
    """Stands in for a CUDA graph: counts its replays, and computes with the shapes it was recorded with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: float = 0.0) -> None:
        self.replays = 0
        self.error = error
        monkeypatch.setattr(cuda_graph, "recorded", self.record)

    def record(self, function, recorded, parameters, stream):
        shapes = [argument.shape for argument in recorded]

        def replay(*arguments: Tensor) -> tuple[Tensor, ...]:
            assert [argument.shape for argument in arguments] == shapes
            self.replays += 1
            return tuple(result + self.error for result in function(*arguments))

        return replay


def run(graphed: Graphed, model: nn.Linear, batch_size: int) -> None:
    """One step: its result and its gradient are those of the function itself."""
    inputs = torch.rand(batch_size, 3)
    expected = model(inputs).square().sum()
    expected.backward()
    gradient = model.weight.grad
    model.zero_grad(set_to_none=True)
    (found,) = graphed(inputs)
    torch.testing.assert_close(found, expected.detach())
    assert gradient is not None
    torch.testing.assert_close(model.weight.grad, gradient)
    model.zero_grad(set_to_none=True)


def of(model: nn.Linear) -> Graphed:
    def function(inputs: Tensor) -> tuple[Tensor, ...]:
        result = model(inputs).square().sum()
        result.backward()
        return (result.detach(),)

    return Graphed(function, model)


def test_batches_of_the_usual_shape_are_replayed_and_others_are_not(model, monkeypatch):
    recording, graphed = Recording(monkeypatch), of(model)
    for _ in range(WARM_UP):
        run(graphed, model, 4)
        run(graphed, model, 2)
    assert recording.replays == 0
    for _ in range(5):
        run(graphed, model, 4)
        run(graphed, model, 2)
    assert recording.replays == 5


def test_a_graph_with_incorrect_results_is_abandoned_with_a_warning(model, monkeypatch, capsys):
    recording, graphed = Recording(monkeypatch, error=1.0), of(model)
    for _ in range(WARM_UP + 4):
        run(graphed, model, 4)
    assert recording.replays == 1
    assert "continues without a CUDA graph, more slowly: its results differ by" in capsys.readouterr().err


def test_a_graph_is_recorded_when_the_gradients_are_finite_at_last(model, monkeypatch, capsys):
    recording, graphed = Recording(monkeypatch), of(model)
    for _ in range(WARM_UP + 2):  # as in fp16, while the loss scale is too high
        graphed(torch.full((4, 3), torch.inf))
        model.zero_grad(set_to_none=True)
    assert recording.replays == 0
    for _ in range(3):
        run(graphed, model, 4)
    assert recording.replays == 3
    assert capsys.readouterr().err == ""


def test_a_graph_that_cannot_be_recorded_is_abandoned_with_a_warning(model, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(cuda_graph, "recorded", fail)
    graphed = of(model)
    for _ in range(WARM_UP + 3):
        run(graphed, model, 4)
    assert capsys.readouterr().err.count("not permitted when stream is capturing\n") == 1

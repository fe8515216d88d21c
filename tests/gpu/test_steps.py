"""What a training step computes on a GPU, or where there is none, on the CPU: the same tests, so that they are known to run.

python -m pytest -m gpu        # benchmarks/gpu.py does so on the day when there is a GPU
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from corpora import chain
from lmdist.model import cuda_graph
from lmdist.model.cuda_graph import WARM_UP, Graphed
from lmdist.model.language_model import LanguageModel
from lmdist.model.lstm import Layer
from lmdist.model.precision import PRECISIONS, Precision, configure_precision
from lmdist.settings import DataSettings, ModelSettings, OptimizerSettings, Recipe
from lmdist.training.data import Streams
from lmdist.training.distributed import World
from lmdist.training.metrics import NatsTotal
from lmdist.training.optimizer import optimizer_state
from lmdist.training.step import DrawnAhead, TrainingStep

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
WORLD = World(0, 1, DEVICE)
VOCABULARY_SIZE, BATCH_SIZE, LENGTH = 1000, 8, 16
EVERYTHING = slice(0, BATCH_SIZE)
STREAMS = Streams(chain(BATCH_SIZE * (4 * LENGTH + 7), VOCABULARY_SIZE), BATCH_SIZE, LENGTH)  # every fifth batch is shorter
# Sizes for cuDNN's persistent kernel.
WEIGHT_DROP = ModelSettings(128, 256, 2, 0.3, dropout_embedding=0.1, weight_dropout=0.5, tied=True)
ADAPTIVE = ModelSettings(128, 128, 2, 0.3, tied=False, head="adaptive")
LARGEST_ERROR = {"fp32": 1e-5, "tf32": 5e-3, "bf16": 0.05, "fp16": 0.01}
"""Of a gradient against fp64, by norm."""


def step_of(settings: ModelSettings, precision: str, optimizer: OptimizerSettings | None = None) -> TrainingStep:
    """Return the step of a training job, as the job makes it."""
    torch.manual_seed(1)
    model = LanguageModel(settings, VOCABULARY_SIZE).to(DEVICE)
    data = DataSettings(global_batch=BATCH_SIZE, window=LENGTH)
    recipe = Recipe(data=data, model=settings, optimizer=optimizer or OptimizerSettings(learning_rate=0.01))
    step = TrainingStep(recipe, model, Precision(precision, ""), WORLD)
    configure_precision(step.precision, model, DEVICE, BATCH_SIZE, LENGTH)
    return step


def forward_backward(step: TrainingStep, number: int) -> float:
    """Compute the gradients of a batch; return its nats per token."""
    nats = NatsTotal(WORLD)
    step.forward_backward(STREAMS.batch(number, EVERYTHING), number, nats)
    return nats.mean()


def exact(settings: ModelSettings, parameters: dict[str, Tensor], seed: int) -> tuple[float, dict[str, Tensor]]:
    """Return the nats per token of the first batch and the gradients in fp64 on the CPU, by torch's own softmax."""
    model = LanguageModel(settings, VOCABULARY_SIZE).double()
    model.load_state_dict(parameters)
    batch, masks = STREAMS.batch(0, EVERYTHING), model.dropout.draw(seed, 0, BATCH_SIZE, EVERYTHING)
    hidden, _ = model(batch.inputs, tuple(part.double() for part in model.initial_state(BATCH_SIZE)), masks)
    log_p = model.logits(model.dropout.drop_vectors(hidden, -1, masks)).log_softmax(2)
    nats = -log_p.gather(2, batch.targets.unsqueeze(2)).mean()
    nats.backward()
    return nats.item(), {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("precision", PRECISIONS[DEVICE.type])
@pytest.mark.parametrize("settings", [WEIGHT_DROP, ADAPTIVE], ids=["weight drop", "adaptive head"])
def test_gradients_are_those_of_fp64_in_every_precision(settings, precision):
    step = step_of(settings, precision)
    before = {name: value.cpu().clone() for name, value in step.model.state_dict().items()}
    types: list[torch.dtype] = []
    layers = [layer for layer in step.model.layers if isinstance(layer, Layer) and layer.kernel != "fp32"]
    for layer in layers:
        layer.register_forward_hook(lambda _, __, outputs: types.append(outputs[0].dtype))
    found = forward_backward(step, 0)
    assert types == [step.precision.dtype] * len(layers)  # and not what a library takes in its place
    nats, gradients = exact(settings, before, step.seed)
    assert found == pytest.approx(nats, rel=LARGEST_ERROR[precision] / 10)
    assert gradients.keys() == {name for name, _ in step.model.named_parameters()}
    for name, parameter in step.model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        gradient = parameter.grad.cpu().double() / (step.scaler.get_scale() if step.scaler.is_enabled() else 1)
        error = (gradient - gradients[name]).norm() / gradients[name].norm()
        assert error < LARGEST_ERROR[precision], name


def recorded_on_cpu(function, arguments, parameters, stream):
    """Stand in for a CUDA graph, which reads, and writes gradients, always at the same addresses."""
    inputs, gradients = [each.clone() for each in arguments], [torch.empty_like(each) for each in parameters]

    def replay(*arguments: Tensor) -> tuple[Tensor, ...]:
        for buffer, argument in zip(inputs, arguments, strict=True):
            buffer.copy_(argument)
        outputs = function(*inputs)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.copy_(parameter.grad)
        return outputs

    return replay


def with_graph(step: TrainingStep, monkeypatch: pytest.MonkeyPatch) -> TrainingStep:
    """Return a step whose masks are drawn ahead, and whose forward and backward are a graph: on a GPU as it was made."""
    if DEVICE.type == "cpu":
        step.draw_masks = DrawnAhead(step.draw)
        monkeypatch.setattr(cuda_graph, "recorded", recorded_on_cpu)
        step.compute_part = Graphed(step.forward_backward_part, step.model)
    return step


@pytest.mark.parametrize("precision", PRECISIONS[DEVICE.type])
def test_a_graph_computes_bit_for_bit_what_the_step_without_one_does(precision, monkeypatch):
    graphed, plain = with_graph(step_of(WEIGHT_DROP, precision), monkeypatch), step_of(WEIGHT_DROP, precision)
    plain.compute_part, plain.draw_masks = plain.forward_backward_part, plain.draw
    for number in range(20):
        assert forward_backward(graphed, number) == forward_backward(plain, number), number
        norms = [step.clip_and_update(0.01).item() for step in (graphed, plain)]
        assert norms[0] == pytest.approx(norms[1], rel=0, abs=0, nan_ok=True), number
    assert isinstance(graphed.compute_part, Graphed)
    assert graphed.compute_part.replay is not None, "no graph was recorded, or it was abandoned"
    for ours, theirs in zip(graphed.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


ADAMW = OptimizerSettings(learning_rate=0.001)
SGD = OptimizerSettings("sgd", 0.1, momentum=0.9, weight_decay=0)


@pytest.mark.parametrize("optimizer", [ADAMW, SGD], ids=["adamw", "sgd"])
def test_steps_that_overflow_in_fp16_are_skipped_until_the_scale_has_fallen(optimizer, monkeypatch):
    step = with_graph(step_of(WEIGHT_DROP, "fp16", optimizer), monkeypatch)
    if DEVICE.type == "cpu":  # few have an LSTM in fp16: its outputs are, and their gradients
        for layer in step.model.layers:
            assert isinstance(layer, Layer)
            layer.kernel = "fp32"
            layer.register_forward_hook(lambda _, __, outputs: (outputs[0].half(), outputs[1]))
    step.scaler = torch.GradScaler(DEVICE.type, init_scale=2.0**40)
    parameters = list(step.model.parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    garbage = [torch.full_like(parameter, torch.nan) for parameter in parameters]
    del garbage  # what is allocated and not filled is likely to be this
    number, scale = 0, torch.inf
    while step.scaler.get_scale() < scale:
        for parameter, value in zip(parameters, before, strict=True):
            assert torch.equal(parameter, value), number
        scale = step.scaler.get_scale()
        forward_backward(step, number)
        step.clip_and_update(optimizer.learning_rate)
        number += 1
    assert WARM_UP < number < 40
    nats = []
    for more in range(40):
        nats.append(forward_backward(step, 5 * more))  # the first batch again and again
        step.clip_and_update(optimizer.learning_rate)
    assert sum(nats[-5:]) < sum(nats[:5]) - 0.5, nats
    assert all(bool(tensor.isfinite().all()) for tensor in optimizer_state(step.optimizer).values())
    assert isinstance(step.compute_part, Graphed)
    assert step.compute_part.replay is not None, "the overflow was taken for an incorrect graph"

"""In which precision a job computes: what was asked for, or the fastest that this machine computes rightly.

On a CPU bf16 pays only where the processor has instructions for it (AMX: five times fp32's speed; without any, a third of
it), so it is timed. And it is not always right: oneDNN's backward of an LSTM in bf16 is wrong on AMX for some sizes, and no
loss curve of a hundred steps shows it. So before the first step every layer's gradients are compared with fp32's on the very
shapes in use, and a layer that fails takes another kernel, or stays in fp32.

On a GPU the fastest LSTM is cuDNN's persistent kernel, which keeps the recurrent weights on the chip from word to word. torch
takes it for some sizes only, and in fp16.

This module does not know the loop. Shapes: B rows, T words, I numbers into a layer, H hidden.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from lmdist.errors import UsageError
from lmdist.model.language_model import LanguageModel
from lmdist.model.lstm import KERNELS, Layer
from lmdist.settings import ModelSettings

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

PRECISIONS = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "tf32", "bf16", "fp16")}

WORTHWHILE = 2.0
"""A precision that is chosen unasked is at least so many times as fast as fp32: a choice that depended on the moment would
make a run differ from its repetition."""

WRONG = 0.05
"""A gradient in bf16 that differs from fp32's by more than this, relative to its norm. Right ones differ by 0.005, wrong ones
by 1."""

LARGE_LAYER = 512
"""The hidden size from which on bf16 on a CPU is faster by plain matrix products than by oneDNN."""

PERSISTENT_HIDDEN_SIZE = 1024
PERSISTENT_ROWS = 128
MULTIPLE = 128


@dataclass(frozen=True)
class Precision:
    """The precision of a job, and why it has it."""

    name: str
    """fp32, tf32, bf16 or fp16."""
    why: str
    """Empty where it was asked for."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of the matrix products' factors."""
        return DTYPES[self.name]

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context that a forward pass runs in."""
        return torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32)


def choose(asked: str, before: str, device: torch.device, settings: ModelSettings, rows: int) -> Precision:
    """The precision for what was `asked` in training.precision; `rows` are those that a rank reads at once.

    Where it may choose, a run goes on in the precision it had `before`, if the device has it.
    """
    if asked not in ("auto", *PRECISIONS[device.type]):
        raise UsageError(f"training.precision {asked} needs a GPU; on a CPU it must be auto, fp32 or bf16")
    if asked != "auto":
        return Precision(asked, "")
    if before in PRECISIONS[device.type]:
        return Precision(before, "as the run was begun")
    if device.type == "cpu":
        gain = gain_of_bf16(settings)
        return Precision("bf16" if gain >= WORTHWHILE else "fp32", f"bf16 runs at {gain:.1f} times the speed of fp32 here")
    if not misses_of_the_persistent_kernel(settings, rows, "fp16"):
        return Precision("fp16", "with these sizes cuDNN takes its persistent LSTM kernel")
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return Precision("bf16", "this GPU has it, and the sizes miss cuDNN's persistent LSTM kernel, which is fp16's")
    return Precision("fp16", "this GPU has no bf16")


def gain_of_bf16(settings: ModelSettings) -> float:
    """How many times as fast as fp32 the CPU multiplies bf16 matrices of about the model's sizes."""
    factors = torch.rand(512, settings.hidden_size), torch.rand(settings.hidden_size, 2048)
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = (factor.to(dtype) for factor in factors)
        seconds[dtype] = min(timed(left, right) for _ in range(4))
    return seconds[torch.float32] / seconds[torch.bfloat16]


def timed(left: Tensor, right: Tensor) -> float:
    """Seconds for one product."""
    began = time.perf_counter()
    torch.mm(left, right)
    return time.perf_counter() - began


def prepare_for(precision: Precision, model: LanguageModel, device: torch.device, rows: int, length: int) -> list[str]:
    """Set torch and the model up for a precision, and batches of `rows` x `length` words; gives what the user should know."""
    if device.type == "cpu":
        return choose_kernels(model, rows, length) if precision.name == "bf16" else []
    # Products of tensor cores with tf32 only, so that fp32 means fp32.
    products = "tf32" if precision.name == "tf32" else "ieee"
    torch.backends.cuda.matmul.fp32_precision = products
    torch.backends.cudnn.rnn.fp32_precision = products  # type: ignore[attr-defined]
    misses = misses_of_the_persistent_kernel(model.settings, rows, precision.name)
    if not misses:
        return []
    return [f"  hint   cuDNN's persistent LSTM kernel, the fastest one, is missed by {'; '.join(misses)}"]


def choose_kernels(model: LanguageModel, rows: int, length: int) -> list[str]:
    """Choose for each layer the fastest right kernel to compute in bf16 on the CPU; gives a warning for each that has none.

    The layers of one size are alike, so one of them is tried, on batches of `rows` x `length` words.
    """
    warnings: list[str] = []
    found: dict[tuple[int, int], str] = {}
    for layer in model.layers:
        assert isinstance(layer, Layer)
        sizes = layer.input_size, layer.hidden_size
        if sizes not in found:
            found[sizes], errors = right_kernel(layer, rows, length)
            if found[sizes] == "fp32":
                shown = ", ".join(f"{kernel} {error:.2g}" for kernel, error in errors.items())
                warnings.append(
                    f"warning: bf16 gradients of an LSTM layer {sizes[0]} -> {sizes[1]} are wrong on this processor "
                    f"(relative error: {shown}); the layer stays in fp32"
                )
        layer.kernel = found[sizes]
    return warnings


def right_kernel(layer: Layer, rows: int, length: int) -> tuple[str, dict[str, float]]:
    """The fastest kernel whose gradients are right in bf16, else fp32; and the errors of those that were tried."""
    errors: dict[str, float] = {}
    for kernel in KERNELS[::-1] if layer.hidden_size >= LARGE_LAYER else KERNELS:
        errors[kernel] = gradient_error(layer, kernel, rows, length)
        if errors[kernel] <= WRONG:
            return kernel, errors
    return "fp32", errors


def gradient_error(layer: Layer, kernel: str, rows: int, length: int) -> float:
    """The largest relative error of a gradient of `layer` in bf16, against fp32, on rows x length words."""
    trial = Layer(layer.input_size, layer.hidden_size)
    trial.load_state_dict(layer.state_dict())
    inputs = torch.rand(rows, length, layer.input_size).sub_(0.5).requires_grad_()  # (B, T, I)
    state = torch.rand(rows, layer.hidden_size).sub_(0.5), torch.rand(rows, layer.hidden_size).sub_(0.5)
    direction = torch.rand(rows, length, layer.hidden_size).sub_(0.5)
    gradients = []
    for trial.kernel in ("fp32", kernel):
        with torch.autocast("cpu", torch.bfloat16):
            outputs, _ = trial(inputs, state)
        gradients.append(torch.autograd.grad(outputs, [inputs, *trial.parameters()], direction.to(outputs.dtype)))
    errors = [(found.float() - right).norm() / right.norm() for right, found in zip(*gradients, strict=True)]
    return float(max(error.nan_to_num(torch.inf) for error in errors))


def misses_of_the_persistent_kernel(settings: ModelSettings, rows: int, precision: str) -> list[str]:
    """What keeps torch from cuDNN's persistent LSTM kernel; empty where it takes it.

    Its conditions, from torch's source: fp16, one layer in one direction, hidden size at most 1024, sizes in multiples of 128,
    rows in multiples of 8 and at most 128 on a GPU.
    """
    misses = [] if precision == "fp16" else [f"precision {precision} (fp16)"]
    for name in ("embedding_size", "hidden_size"):
        value = getattr(settings, name)
        if value % MULTIPLE:
            misses.append(f"{name} {value} (a multiple of {MULTIPLE})")
    if max(settings.layer_sizes) > PERSISTENT_HIDDEN_SIZE:
        misses.append(f"a layer of {max(settings.layer_sizes)} (at most {PERSISTENT_HIDDEN_SIZE})")
    if rows % 8 or rows > PERSISTENT_ROWS:
        misses.append(f"{rows} rows a GPU (a multiple of 8, at most {PERSISTENT_ROWS})")
    return misses

"""Choose the precision of a job: the one of the recipe, or the fastest that this machine computes correctly.

On a CPU bf16 pays only if the processor has instructions for it (AMX: five times fp32's speed; without any, a third of it),
so it is timed. And it is not always correct: oneDNN's backward pass of an LSTM in bf16 is incorrect on AMX for some sizes,
and a loss curve of a hundred steps does not show it. So before the first step each layer's gradients are compared with fp32's
on the shapes in use; a layer that fails takes another kernel, or stays in fp32.

On a GPU the fastest LSTM is cuDNN's persistent kernel, which keeps the recurrent weights on the chip from token to token.
torch takes it for some sizes only, and in fp16.

This module does not know the loop. Shapes: B batch size, T tokens, I input size, H hidden size.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lmdist.errors import UsageError
from lmdist.model.language_model import LanguageModel
from lmdist.model.lstm import KERNELS, STATE_PARTS, Layer
from lmdist.settings import ModelSettings

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

PRECISIONS = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "tf32", "bf16", "fp16")}

WORTHWHILE = 2.0
"""The speed relative to fp32 from which bf16 is chosen for `auto`: a narrow choice would make a run differ from its
repetition."""

TOLERANCE = 0.05
"""The largest relative error of a gradient in bf16 against fp32, by norm. Correct ones have 0.005, incorrect ones 1."""

LARGE_LAYER = 1000
"""The input or hidden size from which on bf16 on a CPU is faster by plain matrix multiplications than by oneDNN."""

PERSISTENT_HIDDEN_SIZE = 1024
PERSISTENT_BATCH_SIZE = 128
PERSISTENT_MULTIPLE = 128


@dataclass(frozen=True)
class Precision:
    """The precision of a job."""

    name: str
    """fp32, tf32, bf16 or fp16."""
    reason: str
    """Why it was chosen; empty if the recipe names it."""

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of the operands of matrix multiplications."""
        return DTYPES[self.name]

    def autocast(self, device: torch.device) -> torch.autocast:
        """Return the context of a forward pass."""
        return torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32)


def choose(setting: str, before: str, device: torch.device, settings: ModelSettings, batch_size: int) -> Precision:
    """Return the precision for the setting `training.precision` and the batch size of a forward pass.

    For `auto`, a run continues in the precision it had `before`, if the device has it.
    """
    if setting not in ("auto", *PRECISIONS[device.type]):
        raise UsageError(f"training.precision {setting} needs a GPU; on a CPU it must be auto, fp32 or bf16")
    if setting != "auto":
        return Precision(setting, "")
    if before in PRECISIONS[device.type]:
        return Precision(before, "as the run was started")
    if device.type == "cpu":
        gain = bf16_speedup(settings)
        return Precision("bf16" if gain >= WORTHWHILE else "fp32", f"bf16 runs at {gain:.1f} times the speed of fp32 here")
    if not unmet_persistent_conditions(settings, batch_size, "fp16"):
        return Precision("fp16", "with these sizes torch takes cuDNN's persistent LSTM kernel")
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return Precision("bf16", "this GPU has it, and these sizes miss cuDNN's persistent LSTM kernel, which needs fp16")
    return Precision("fp16", "this GPU has no bf16")


def bf16_speedup(settings: ModelSettings) -> float:
    """Return the speed of bf16 relative to fp32 in a CPU's multiplication of matrices of about the model's sizes."""
    operands = torch.rand(512, settings.hidden_size), torch.rand(settings.hidden_size, 2048)
    low = [operand.bfloat16() for operand in operands]
    # Taking turns, because on a busy machine both types must meet the same load.
    rounds = [(seconds_of_matmul(*operands), seconds_of_matmul(*low)) for _ in range(8)]
    return min(fp32 for fp32, _ in rounds) / min(bf16 for _, bf16 in rounds)


def seconds_of_matmul(left: Tensor, right: Tensor) -> float:
    """Return the seconds of one matrix multiplication."""
    start = time.perf_counter()
    torch.mm(left, right)
    return time.perf_counter() - start


def configure_precision(
    precision: Precision, model: LanguageModel, device: torch.device, batch_size: int, length: int
) -> list[str]:
    """Set torch and the model up for a precision and batches of (`batch_size`, `length`) tokens; return hints for the user."""
    if device.type == "cpu":
        return choose_kernels(model, batch_size, length) if precision.name == "bf16" else []
    set_fp32("tf32" if precision.name == "tf32" else "ieee")
    misses = unmet_persistent_conditions(model.settings, batch_size, precision.name)
    if not misses:
        return []
    return [f"  hint   cuDNN's persistent LSTM kernel, the fastest one, is missed by {'; '.join(misses)}"]


def set_fp32(precision: Literal["ieee", "tf32"]) -> None:
    """Set how GPUs multiply matrices of fp32: in TF32, as torch has cuDNN do it by default, only if that is asked for."""
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.rnn.fp32_precision = precision  # type: ignore[attr-defined]


def choose_kernels(model: LanguageModel, batch_size: int, length: int) -> list[str]:
    """Set each layer to its fastest correct kernel in bf16 on the CPU; return a warning for each layer that has none.

    Of the layers of one size, one is tried, on batches of (`batch_size`, `length`) tokens.
    """
    warnings: list[str] = []
    found: dict[tuple[int, int], str] = {}
    for layer in model.layers:
        assert isinstance(layer, Layer)
        sizes = layer.input_size, layer.hidden_size
        if sizes not in found:
            found[sizes], errors = correct_kernel(layer, batch_size, length)
            if found[sizes] == "fp32":
                shown = ", ".join(f"{kernel} {error:.2g}" for kernel, error in errors.items())
                warnings.append(
                    f"warning: bf16 gradients of an LSTM layer {sizes[0]} -> {sizes[1]} are incorrect on this processor "
                    f"(relative error: {shown}); the layer stays in fp32"
                )
        layer.kernel = found[sizes]
    return warnings


def correct_kernel(layer: Layer, batch_size: int, length: int) -> tuple[str, dict[str, float]]:
    """Return the fastest kernel whose gradients are correct in bf16, else fp32; and the errors of those that were tried."""
    errors: dict[str, float] = {}
    for kernel in KERNELS[::-1] if max(layer.input_size, layer.hidden_size) >= LARGE_LAYER else KERNELS:
        errors[kernel] = gradient_error(layer, kernel, batch_size, length)
        if errors[kernel] <= TOLERANCE:
            return kernel, errors
    return "fp32", errors


def gradient_error(layer: Layer, kernel: str, batch_size: int, length: int) -> float:
    """Return the largest relative error of a gradient of `layer` in bf16 against fp32, on (`batch_size`, `length`) tokens."""
    trial = Layer(layer.input_size, layer.hidden_size)
    trial.load_state_dict(layer.state_dict())
    inputs = torch.rand(batch_size, length, layer.input_size).sub_(0.5).requires_grad_()  # (B, T, I)
    state = tuple(torch.rand(batch_size, layer.hidden_size).sub_(0.5) for _ in STATE_PARTS)  # parts (B, H)
    direction = torch.rand(batch_size, length, layer.hidden_size).sub_(0.5)  # (B, T, H)
    gradients = []
    for trial.kernel in ("fp32", kernel):
        with torch.autocast("cpu", torch.bfloat16):
            outputs, _ = trial(inputs, state)
        gradients.append(torch.autograd.grad(outputs, [inputs, *trial.parameters()], direction.to(outputs.dtype)))
    errors = [(found.float() - expected).norm() / expected.norm() for expected, found in zip(*gradients, strict=True)]
    return float(max(error.nan_to_num(torch.inf) for error in errors))


def unmet_persistent_conditions(settings: ModelSettings, batch_size: int, precision: str) -> list[str]:
    """Return the conditions that torch sets for cuDNN's persistent LSTM kernel and that are not met.

    From torch's source: fp16, one layer in one direction, hidden size at most 1024, sizes in multiples of 128, a batch size in
    multiples of 8 and at most 128 per GPU.
    """
    misses = [] if precision == "fp16" else [f"precision {precision} (fp16)"]
    for name in ("embedding_size", "hidden_size"):
        value = getattr(settings, name)
        if value % PERSISTENT_MULTIPLE:
            misses.append(f"{name} {value} (a multiple of {PERSISTENT_MULTIPLE})")
    if max(settings.layer_sizes) > PERSISTENT_HIDDEN_SIZE:
        misses.append(f"a layer of {max(settings.layer_sizes)} (at most {PERSISTENT_HIDDEN_SIZE})")
    if batch_size % 8 or batch_size > PERSISTENT_BATCH_SIZE:
        misses.append(f"batch size {batch_size} per GPU (a multiple of 8, at most {PERSISTENT_BATCH_SIZE})")
    return misses

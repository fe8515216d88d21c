"""One LSTM layer with nn.LSTM's own parameters: the one file in training that knows the cell, its gates and its state.

In fp32 and on a GPU, torch computes a layer by oneDNN or cuDNN. torch's autocast has cuDNN compute in fp16 whatever type was
asked for, so on a GPU a layer casts by itself. In bf16 on a CPU, oneDNN is fast for small layers only, and
its backward is incorrect on processors with AMX for hidden sizes from 1024 on in multiples of 32 (torch 2.13, oneDNN 3.12:
the gradients have relative errors of 1, and a loss curve hardly shows it). For large layers `GatedLSTM` does the same by
plain matrix multiplications. precision.py finds out which kernel is correct and fast on a machine. This module knows neither
losses nor ranks.

Another cell is another `Layer`, with its own `STATE_PARTS`: the model, the training step and the checkpoints carry the parts
of a state without knowing what they mean.

Shapes: B batch size, T tokens, I input size, H hidden size. The four gates lie side by side in torch's order: input, forget,
cell, output (4H).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lmdist.settings import InitSettings

STATE_PARTS = ("h", "c")
"""The parts of a layer's state: output and cell, each (B, H)."""
State = tuple[Tensor, ...]
"""A tensor for each of STATE_PARTS."""
RECURRENT = "weight_hh_l0"
"""The name of a layer's recurrent weights, (4H, H), which weight dropout drops."""
KERNELS = ("onednn", "matmul")
"""The kernels that compute a layer in bf16 on a CPU."""


class Layer(nn.LSTM):
    """A single nn.LSTM layer, batch first, whose recurrent weights may be replaced for a call."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size, batch_first=True)
        self.kernel = "onednn"
        """How it is computed under autocast on a CPU: onednn, matmul (GatedLSTM) or fp32."""

    @torch.no_grad()
    def initialize(self, settings: InitSettings) -> None:
        """Replace some of the parameters that nn.LSTM begins with."""
        if settings.recurrent == "orthogonal":
            for gate in self.get_parameter(RECURRENT).chunk(4):
                nn.init.orthogonal_(gate)
        if settings.forget_gate_bias is not None:
            for name, value in (("bias_ih_l0", settings.forget_gate_bias), ("bias_hh_l0", 0.0)):
                self.get_parameter(name).chunk(4)[1].fill_(value)

    def forward(  # type: ignore[override]
        self, inputs: Tensor, state: State, recurrent: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Return the outputs (B, T, H) for `inputs` (B, T, I) and the state after them; the parts of a state are (B, H).

        `recurrent` (4H, H) takes the place of the recurrent weights, as what weight dropout has left of them.
        """
        if inputs.device.type == "cuda":
            return self.cast_and_compute(inputs, state, recurrent)
        h, c = state
        weight_ih, weight_hh, bias_ih, bias_hh = self.parameters()
        weight_hh = weight_hh if recurrent is None else recurrent
        kernel = self.kernel if inputs.device.type == "cpu" and torch.is_autocast_enabled("cpu") else "torch"
        if kernel == "matmul":
            outputs, h, c = GatedLSTM.apply(inputs, h, c, weight_ih, weight_hh, bias_ih + bias_hh)  # type: ignore[misc]
            return outputs, (h, c)
        with torch.autocast("cpu", enabled=False) if kernel == "fp32" else nullcontext():
            inputs = inputs.float() if kernel == "fp32" else inputs
            return self.compute(inputs, state, [weight_ih, weight_hh, bias_ih, bias_hh])

    def cast_and_compute(self, inputs: Tensor, state: State, recurrent: Tensor | None) -> tuple[Tensor, State]:
        """Do what `forward` does, all of it in the type of autocast, if that is on: as on a GPU."""
        device = inputs.device.type
        weight_ih, weight_hh, *biases = self.parameters()
        weights = [weight_ih, weight_hh if recurrent is None else recurrent, *biases]
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_ih.dtype
        with torch.autocast(device, enabled=False):
            if low != weight_ih.dtype or weights[1] is not weight_hh:  # the parameters themselves are one block already
                weights = one_block(weights, low)
            return self.compute(inputs.to(low), tuple(part.to(low) for part in state), weights)

    def compute(self, inputs: Tensor, state: State, weights: list[Tensor]) -> tuple[Tensor, State]:
        """Return what `forward` does, by torch's own LSTM."""
        h, c = state
        outputs, h, c = torch._VF.lstm(  # type: ignore[attr-defined]
            inputs,
            (h.unsqueeze(0), c.unsqueeze(0)),
            weights,
            True,  # has biases
            1,  # layer
            0.0,  # dropout between layers
            self.training,
            False,  # one direction
            True,  # batch first
        )
        return outputs, (h[0], c[0])


def one_block(weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return weights in another type, as views of one block of memory, in their order.

    It is the order in which cuDNN has those of a layer. Apart from each other torch would copy them together, with a warning.
    """
    block = torch.cat([weight.to(dtype).flatten() for weight in weights])
    parts = block.split([weight.numel() for weight in weights])
    return [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]


class GatedLSTM(torch.autograd.Function):
    """An LSTM layer by large matrix multiplications in bf16: the inputs of all tokens at once, then one token after another.

    The gates overwrite their pre-activations, and the gates' gradients overwrite the gates. The weights' gradients are two
    large matrix multiplications after the last token. What is computed element by element, and the sums, are fp32: a token's
    gates (B, 4H) are few enough to stay in a core's cache, where each operation on them costs little.
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, h: Tensor, c: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the outputs (B, T, H), and h and c after the last token, each (B, H)."""
        batch_size, length, _ = inputs.shape
        low = torch.bfloat16
        vectors = inputs.transpose(0, 1).to(low, memory_format=torch.contiguous_format)  # (T, B, I)
        matrix_ih, matrix_hh = weight_ih.to(low), weight_hh.to(low)
        gates = (vectors.flatten(0, 1) @ matrix_ih.t()).view(length, batch_size, -1)  # (T, B, 4H), without the bias
        hidden = torch.empty(length + 1, batch_size, h.shape[1], dtype=low)
        cells = torch.empty(length + 1, batch_size, h.shape[1])
        hidden[0], cells[0] = h, c
        exact, output = torch.empty(batch_size, gates.shape[2]), torch.empty_like(h)  # (B, 4H), (B, H)
        input_gate, forget_gate, candidate, output_gate = exact.chunk(4, dim=1)  # each (B, H)
        for t in range(length):
            torch.addmm(gates[t], hidden[t], matrix_hh.t(), out=gates[t])
            exact.copy_(gates[t]).add_(bias)
            input_and_forget(exact).sigmoid_()
            candidate.tanh_()
            output_gate.sigmoid_()
            gates[t] = exact
            torch.mul(cells[t], forget_gate, out=cells[t + 1]).addcmul_(input_gate, candidate)
            hidden[t + 1] = torch.tanh(cells[t + 1], out=output).mul_(output_gate)
        ctx.save_for_backward(vectors, matrix_ih, matrix_hh, gates, hidden, cells)
        return hidden[1:].transpose(0, 1).contiguous(), hidden[-1].float(), cells[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Return the gradients of the inputs of `forward` from those of its outputs: (B, T, H), and h and c, each (B, H)."""
        vectors, matrix_ih, matrix_hh, gates, hidden, cells = ctx.saved_tensors
        by_outputs, by_h, by_c = gradients
        by_outputs, by_h, by_c = by_outputs.transpose(0, 1), by_h.to(hidden.dtype), by_c.clone()  # (T, B, H), (B, H), (B, H)
        exact, by_gates = (torch.empty(gates.shape[1:]) for _ in range(2))  # each (B, 4H)
        by_output, by_cell, tanh = (torch.empty_like(by_c) for _ in range(3))  # each (B, H)
        input_gate, forget_gate, candidate, output_gate = exact.chunk(4, dim=1)  # each (B, H)
        by_input_gate, by_forget_gate, by_candidate, by_output_gate = by_gates.chunk(4, dim=1)
        by_bias = torch.zeros(gates.shape[2])
        for t in reversed(range(len(vectors))):
            exact.copy_(gates[t])
            by_output.copy_(by_h).add_(by_outputs[t])
            torch.tanh(cells[t + 1], out=tanh)
            by_c.add_(times_tanh_derivative(torch.mul(by_output, output_gate, out=by_cell), tanh))
            # The gradients of the gates, then of their pre-activations.
            torch.mul(by_c, candidate, out=by_input_gate)
            torch.mul(by_c, cells[t], out=by_forget_gate)
            torch.mul(by_c, input_gate, out=by_candidate)
            torch.mul(by_output, tanh, out=by_output_gate)
            times_sigmoid_derivative(input_and_forget(by_gates), input_and_forget(exact))
            times_tanh_derivative(by_candidate, candidate)
            times_sigmoid_derivative(by_output_gate, output_gate)
            by_bias.add_(by_gates.sum(0))
            gates[t] = by_gates
            by_c.mul_(forget_gate)
            by_h = gates[t] @ matrix_hh  # (B, H)
        flat = gates.flatten(0, 1)  # (T * B, 4H)
        by_inputs = (flat @ matrix_ih).view_as(vectors).transpose(0, 1)  # (B, T, I)
        by_weight_ih = transposed_product(flat, vectors.flatten(0, 1)).float()  # (4H, I)
        by_weight_hh = transposed_product(flat, hidden[:-1].flatten(0, 1)).float()  # (4H, H)
        return by_inputs, by_h.float(), by_c, by_weight_ih, by_weight_hh, by_bias


def input_and_forget(gates: Tensor) -> Tensor:
    """Return the input and the forget gate of gates that lie side by side: (B, 4H) -> (B, 2H)."""
    return gates[:, : gates.shape[1] // 2]


def times_sigmoid_derivative(gradient: Tensor, gate: Tensor) -> Tensor:
    """Multiply a gradient by the derivative of the sigmoid that returned `gate`, in place."""
    return torch.ops.aten.sigmoid_backward(gradient, gate, grad_input=gradient)


def times_tanh_derivative(gradient: Tensor, tanh: Tensor) -> Tensor:
    """Multiply a gradient by the derivative of the hyperbolic tangent that returned `tanh`, in place."""
    return torch.ops.aten.tanh_backward(gradient, tanh, grad_input=gradient)


def transposed_product(left: Tensor, right: Tensor) -> Tensor:
    """Return left.t() @ right for `left` (N, J) and `right` (N, I), as (J, I).

    A CPU multiplies matrices in bf16 at half its speed if the first one is transposed. So it is copied, or, if that is less
    to copy, the second one is, and the transposed result.
    """
    if len(left) < right.shape[1]:
        return left.t().contiguous() @ right
    return (right.t().contiguous() @ left).t().contiguous()

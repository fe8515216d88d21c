"""One LSTM layer with nn.LSTM's own parameters: the one file in training that knows the cell, its gates and its state.

In fp32 and on a GPU, torch computes a layer by oneDNN or cuDNN. In bf16 on a CPU, oneDNN is fast for small layers only, and
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

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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

    def forward(  # type: ignore[override]
        self, inputs: Tensor, state: State, recurrent: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Return the outputs (B, T, H) for `inputs` (B, T, I) and the state after them; the parts of a state are (B, H).

        `recurrent` (4H, H) takes the place of the recurrent weights, as what weight dropout has left of them.
        """
        h, c = state
        weight_ih, weight_hh, bias_ih, bias_hh = self.parameters()
        weight_hh = weight_hh if recurrent is None else recurrent
        kernel = self.kernel if inputs.device.type == "cpu" and torch.is_autocast_enabled("cpu") else "torch"
        if kernel == "matmul":
            outputs, h, c = GatedLSTM.apply(inputs, h, c, weight_ih, weight_hh, bias_ih + bias_hh)  # type: ignore[misc]
            return outputs, (h, c)
        with torch.autocast("cpu", enabled=False) if kernel == "fp32" else nullcontext():
            outputs, h, c = torch._VF.lstm(  # type: ignore[attr-defined]
                inputs.float() if kernel == "fp32" else inputs,
                (h.unsqueeze(0), c.unsqueeze(0)),
                [weight_ih, weight_hh, bias_ih, bias_hh],
                True,  # has biases
                1,  # layer
                0.0,  # dropout between layers
                self.training,
                False,  # one direction
                True,  # batch first
            )
        return outputs, (h[0], c[0])


class GatedLSTM(torch.autograd.Function):
    """An LSTM layer by large matrix multiplications in bf16: the inputs of all tokens at once, then one token after another.

    The gates overwrite their pre-activations, and the gates' gradients overwrite the gates. The weights' gradients are two
    large matrix multiplications after the last token. Cells and sums of gradients are fp32.
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
        gates = torch.addmm(bias.to(low), vectors.flatten(0, 1), matrix_ih.t()).view(length, batch_size, -1)  # (T, B, 4H)
        hidden = torch.empty(length + 1, batch_size, h.shape[1], dtype=low)
        cells = torch.empty(length + 1, batch_size, h.shape[1])
        hidden[0], cells[0] = h, c
        for t in range(length):
            torch.addmm(gates[t], hidden[t], matrix_hh.t(), out=gates[t])
            input_gate, forget_gate, candidate, output_gate = activate(gates[t])
            torch.mul(cells[t], forget_gate, out=cells[t + 1]).addcmul_(input_gate, candidate)
            torch.mul(output_gate, cells[t + 1].tanh().to(low), out=hidden[t + 1])
        ctx.save_for_backward(vectors, matrix_ih, matrix_hh, gates, hidden, cells)
        return hidden[1:].transpose(0, 1).contiguous(), hidden[-1].float(), cells[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Return the gradients of the inputs of `forward` from those of its outputs: (B, T, H), and h and c, each (B, H)."""
        vectors, matrix_ih, matrix_hh, gates, hidden, cells = ctx.saved_tensors
        by_outputs, by_h, by_c = gradients
        by_outputs, by_h, by_c = by_outputs.transpose(0, 1), by_h.to(hidden.dtype), by_c.clone()  # (T, B, H), (B, H), (B, H)
        for t in reversed(range(len(vectors))):
            input_gate, forget_gate, candidate, output_gate = gates[t].float().chunk(4, dim=1)  # each (B, H)
            by_input, by_forget, by_candidate, by_output = gates[t].chunk(4, dim=1)
            by_h = (by_outputs[t] + by_h).float()
            tanh = cells[t + 1].tanh()
            by_c.addcmul_(by_h * output_gate, 1 - tanh * tanh)
            by_output.copy_(by_h * tanh * output_gate * (1 - output_gate))
            by_input.copy_(by_c * candidate * input_gate * (1 - input_gate))
            by_forget.copy_(by_c * cells[t] * forget_gate * (1 - forget_gate))
            by_candidate.copy_(by_c * input_gate * (1 - candidate * candidate))
            by_c.mul_(forget_gate)
            by_h = gates[t] @ matrix_hh  # (B, H)
        flat = gates.flatten(0, 1)  # (T * B, 4H)
        by_inputs = (flat @ matrix_ih).view_as(vectors).transpose(0, 1)  # (B, T, I)
        by_weight_ih = (flat.t() @ vectors.flatten(0, 1)).float()  # (4H, I)
        by_weight_hh = (flat.t() @ hidden[:-1].flatten(0, 1)).float()  # (4H, H)
        return by_inputs, by_h.float(), by_c, by_weight_ih, by_weight_hh, flat.sum(0, dtype=torch.float32)


def activate(gates: Tensor) -> tuple[Tensor, ...]:
    """Apply the activations of the four gates in place: (B, 4H) -> 4 x (B, H)."""
    parts = gates.chunk(4, dim=1)
    for number, part in enumerate(parts):
        part.tanh_() if number == 2 else part.sigmoid_()
    return parts

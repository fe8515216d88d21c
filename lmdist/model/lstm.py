"""One LSTM layer over nn.LSTM's own parameters, and the kernels a CPU has to compute it in bf16.

In fp32, and on a GPU, a layer is what torch makes of it: oneDNN, or cuDNN. In bf16 on a CPU, oneDNN is fast for small layers
only, and its backward is wrong on processors with AMX for hidden sizes from 1024 on in multiples of 32 (torch 2.13, oneDNN
3.12: the gradients have nothing to do with the right ones, and a loss curve hardly shows it). For large layers `GatedLSTM`
does the same with plain matrix products. Which kernel is right and fast on this machine is found out by precision.py; this
module knows nothing of losses and ranks.

Shapes: B rows, T words, I numbers into the layer, H hidden. The four gates lie side by side in torch's order: input, forget,
cell, output.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

KERNELS = ("onednn", "products")
"""The kernels to compute a layer in bf16 on a CPU."""


class Layer(nn.LSTM):
    """A single nn.LSTM layer, batch first, whose recurrent weights may be dropped out."""

    def __init__(self, size_in: int, size: int, weight_dropout: float = 0.0) -> None:
        super().__init__(size_in, size, batch_first=True)
        self.weight_dropout = weight_dropout
        self.kernel = "onednn"
        """How it is computed under autocast on a CPU: onednn, products (GatedLSTM) or fp32."""

    def forward(self, inputs: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # type: ignore[override]
        """Read `inputs` (B, T, I) from (h, c), each (B, H), on; give the outputs (B, T, H) and the state after.

        Weight drop is one mask over the recurrent weights for all words of a batch (Merity et al. 2018, arXiv:1708.02182).
        """
        h, c = state
        weight_ih, weight_hh, bias_ih, bias_hh = self.parameters()
        weight_hh = functional.dropout(weight_hh, self.weight_dropout, self.training)
        kernel = self.kernel if inputs.device.type == "cpu" and torch.is_autocast_enabled("cpu") else "torch"
        if kernel == "products":
            outputs, h, c = GatedLSTM.apply(inputs, h, c, weight_ih, weight_hh, bias_ih + bias_hh)  # type: ignore[misc]
            return outputs, (h, c)
        with torch.autocast("cpu", enabled=False) if kernel == "fp32" else nullcontext():
            outputs, h, c = torch._VF.lstm(  # type: ignore[attr-defined]
                inputs.float() if kernel == "fp32" else inputs,
                (h.unsqueeze(0), c.unsqueeze(0)),
                [weight_ih, weight_hh, bias_ih, bias_hh],
                True,  # it has biases
                1,  # layer
                0.0,  # dropout between layers
                self.training,
                False,  # one direction
                True,  # batch first
            )
        return outputs, (h[0], c[0])


class GatedLSTM(torch.autograd.Function):
    """An LSTM layer of large matrix products in bf16: the inputs of all words at once, then the words one after the other.

    The gates are kept in place of what they are made from, and their gradients in place of the gates; the gradients of the
    weights are two large products after the last word. Cells and sums of gradients are fp32.
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, h: Tensor, c: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The outputs (B, T, H), and h and c after the last word, each (B, H)."""
        rows, length, _ = inputs.shape
        low = torch.bfloat16
        words = inputs.transpose(0, 1).to(low, memory_format=torch.contiguous_format)  # (T, B, I)
        matrix_ih, matrix_hh = weight_ih.to(low), weight_hh.to(low)
        gates = torch.addmm(bias.to(low), words.flatten(0, 1), matrix_ih.t()).view(length, rows, -1)  # (T, B, 4H)
        hidden = torch.empty(length + 1, rows, h.shape[1], dtype=low)
        cells = torch.empty(length + 1, rows, h.shape[1])
        hidden[0], cells[0] = h, c
        for t in range(length):
            torch.addmm(gates[t], hidden[t], matrix_hh.t(), out=gates[t])
            input_gate, forget_gate, candidate, output_gate = activate(gates[t])
            torch.mul(cells[t], forget_gate, out=cells[t + 1]).addcmul_(input_gate, candidate)
            torch.mul(output_gate, cells[t + 1].tanh().to(low), out=hidden[t + 1])
        ctx.save_for_backward(words, matrix_ih, matrix_hh, gates, hidden, cells)
        return hidden[1:].transpose(0, 1).contiguous(), hidden[-1].float(), cells[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """From the gradients of outputs (B, T, H), h and c after the last word, each (B, H), to those of all inputs."""
        words, matrix_ih, matrix_hh, gates, hidden, cells = ctx.saved_tensors
        by_outputs, by_h, by_c = gradients
        by_outputs, by_h, by_c = by_outputs.transpose(0, 1), by_h.to(hidden.dtype), by_c.clone()  # (T, B, H), (B, H), (B, H)
        for t in reversed(range(len(words))):
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
        by_words = (flat @ matrix_ih).view_as(words).transpose(0, 1)  # (B, T, I)
        by_weight_ih = (flat.t() @ words.flatten(0, 1)).float()  # (4H, I)
        by_weight_hh = (flat.t() @ hidden[:-1].flatten(0, 1)).float()  # (4H, H)
        return by_words, by_h.float(), by_c, by_weight_ih, by_weight_hh, flat.sum(0, dtype=torch.float32)


def activate(gates: Tensor) -> tuple[Tensor, ...]:
    """The four gates of a word from the sums that they are made from, in their place: (B, 4H) -> 4 x (B, H)."""
    parts = gates.chunk(4, dim=1)
    for number, part in enumerate(parts):
        part.tanh_() if number == 2 else part.sigmoid_()
    return parts

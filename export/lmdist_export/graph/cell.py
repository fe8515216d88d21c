"""The recurrent cell, an LSTM: its gates, the parts of its state, its weights and its nodes.

No other file of the graphs knows the cell; lmdist/model/lstm.py is its counterpart in torch. With x the layer's input and
W, U, b its weights (Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000):

    input, output, forget, cell = W x + U h + b        # each (B, H), side by side (B, 4H)
    c = sigmoid(forget) * c + sigmoid(input) * tanh(cell)
    h = sigmoid(output) * tanh(c)

Shapes: B batch, I a layer's input, H its size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lmdist_export.graph.onnx_file import Graph

GATES = ("input", "output", "forget", "cell")
"""The gates in the order of ONNX's LSTM operator, in which the exported weights have them."""
TORCH_GATES = ("input", "forget", "cell", "output")
STATE = ("h", "c")
"""The parts of a layer's state, each (B, H). The first one is the layer's output."""

Matmul = Callable[..., str]
"""`matmul(matrix, values, bias)` multiplies values (B, inputs) by a matrix of the layer, named as in `layer_shapes`."""


def gates_size(size: int) -> int:
    """Return 4H: the length of all gates of a layer side by side."""
    return len(GATES) * size


def layer_shapes(input_size: int, size: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a layer's weights by name; a matrix has the shape (outputs, inputs)."""
    gates = gates_size(size)
    return {"input": (gates, input_size), "hidden": (gates, size), "bias": (gates,)}


def layer_weights(parameters: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    """Return a layer's weights, as `layer_shapes` names them, from the parameters of torch's LSTM; its two biases are added."""
    ordered = {name: onnx_gates(value) for name, value in parameters.items()}
    return {
        "input": ordered["weight_ih_l0"],  # (4H, I)
        "hidden": ordered["weight_hh_l0"],  # (4H, H)
        "bias": ordered["bias_ih_l0"] + ordered["bias_hh_l0"],  # (4H)
    }


def torch_parameters(weights: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    """Return the parameters of torch's LSTM from a layer's weights; the sum of its two biases is the first of them."""
    ordered = {name: reordered(value, GATES, TORCH_GATES) for name, value in weights.items()}
    return {
        "weight_ih_l0": ordered["input"],  # (4H, I)
        "weight_hh_l0": ordered["hidden"],  # (4H, H)
        "bias_ih_l0": ordered["bias"],  # (4H)
        "bias_hh_l0": np.zeros_like(ordered["bias"]),  # (4H)
    }


def onnx_gates(parameter: NDArray[np.float32]) -> NDArray[np.float32]:
    """Reorder the gates of a parameter (4H, ...) from torch's order to ONNX's."""
    return reordered(parameter, TORCH_GATES, GATES)


def reordered(parameter: NDArray[np.float32], before: Sequence[str], after: Sequence[str]) -> NDArray[np.float32]:
    """Put the gates of a parameter (4H, ...) from one order into another."""
    gates = dict(zip(before, np.split(parameter, len(before)), strict=True))
    return np.concatenate([gates[name] for name in after])


def step(g: Graph, matmul: Matmul, from_input: str, state: Sequence[str], size: int, *, equal_splits: bool) -> list[str]:
    """Return the layer's state after one token, in the order of STATE.

    `from_input` (B, 4H) is W x + b, computed beforehand for all tokens. `equal_splits` splits into parts of equal length only.
    """
    h, c = state
    gates = g("Add", from_input, matmul("hidden", h))  # (B, 4H)
    if equal_splits:
        *sigmoids, candidate = g.several("Split", len(GATES), gates, axis=1)
        input_gate, output_gate, forget_gate = (g("Sigmoid", gate) for gate in sigmoids)
    else:  # one sigmoid over three gates is faster than three
        sigmoids, candidate = g.several("Split", 2, gates, g.constant(np.array([3 * size, size])), axis=1)
        input_gate, output_gate, forget_gate = g.several("Split", 3, g("Sigmoid", sigmoids), axis=1)
    kept, added = g("Mul", forget_gate, c), g("Mul", input_gate, g("Tanh", candidate))
    c = g("Add", kept, added)
    return [g("Mul", output_gate, g("Tanh", c)), c]

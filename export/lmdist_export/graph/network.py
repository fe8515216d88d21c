"""What the model computes, as nodes: embedding, layers and projection, in the precision of the weights.

This module knows no sampling. It uses the layers' cell through cell.py only.

Shapes: B batch, T tokens, R rows (T*B of a prompt, B of a step), V vocabulary (V' rounded up to whole blocks), E embedding, H a
layer's size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lmdist_export.graph import cell
from lmdist_export.graph.onnx_file import BOOL, FLOAT, FLOAT16, INT8, INT32, UINT8, Graph
from lmdist_export.graph.sizes import NBITS_BLOCK, Sizes, weights

StateNames = Sequence[Sequence[str]]
"""The names of the values of each layer's state, (B, H) each, in the order of cell.STATE."""


@dataclass(frozen=True)
class Target:
    """What a graph is built for: a file of weights, a provider and a processor."""

    weights_file: str
    cuda: bool = False
    int8_saturates: bool = False
    """Whether the processor's int8 matrix multiplication with signed weights saturates at 16 bits, as without VNNI."""


class Network:
    """Writes the model into graphs."""

    def __init__(self, sizes: Sizes, root: Graph, target: Target) -> None:
        self.sizes = sizes
        self.root = root
        self.target = target
        self.table = weights(sizes)
        self.declared: set[str] = set()
        self.derived: dict[str, str] = {}

    # --- weights and matrix multiplications

    def weight(self, name: str) -> str:
        """Declare a weight of the table in the graph, once, and return its name."""
        if name not in self.declared:
            self.declared.add(name)
            weight = self.table[name]
            self.root.weight(name, weight.kind, weight.shape, self.target.weights_file, weight.offset)
        return name

    def derive(self, name: str, operator: str, *inputs: str, **attributes: int) -> str:
        """Return a value that is computed from weights once, before any loop, and cached as `name`."""
        if name not in self.derived:
            self.derived[name] = self.root(operator, *inputs, **attributes)
        return self.derived[name]

    def matrix(self, name: str) -> str:
        """Return a matrix of weights in the type that its matrix multiplication takes here."""
        kind = self.table[name].kind
        if kind == FLOAT16 and not self.target.cuda:
            # onnxruntime has no fp16 matrix multiplication on a CPU; the session converts them once, when it is opened.
            return self.derive(f"{name} in fp32", "Cast", self.weight(name), to=FLOAT)
        if kind == INT8 and self.target.int8_saturates:
            wide = self.derive(f"{name} in 32 bits", "Cast", self.weight(name), to=INT32)
            shifted = self.derive(f"{name} above 0", "Add", wide, self.root.constant(np.int32(128)))
            return self.derive(f"{name} without sign", "Cast", shifted, to=UINT8)
        return self.weight(name)

    def quantize(self, g: Graph, values: str) -> str:
        """Quantize values from -1 to 1 to uint8: the scale is 1/127, the zero point 128.

        The scale is fixed because outputs of layers lie there; so a row's result does not depend on the rows beside it.
        """
        return g("QuantizeLinear", values, g.constant(np.float32(1 / 127)), g.constant(np.uint8(128)))

    def matmul(self, g: Graph, name: str, values: str, bias: str = "", scale: str = "") -> str:
        """Return `values` (R, inputs), times the scalar `scale`, times the matrix `name`, plus `bias`: (R, outputs).

        `bias` (outputs) is a weight's name or a value.
        """
        kind = self.table[name].kind
        if kind == INT8:
            return self.int8_matmul(g, name, self.quantize(g, values), bias, scale)
        bias = self.weight(bias) if bias in self.table else bias
        if scale:
            values = g("Mul", values, scale)
        if kind == UINT8:
            outputs, blocks, _ = self.table[name].shape
            inputs = self.sizes.layer_sizes[-1]
            assert math.ceil(inputs / NBITS_BLOCK) == blocks, (inputs, blocks)
            return g(
                "MatMulNBits",
                values,
                self.weight(name),
                self.weight(f"{name}.scale"),
                *("", "", bias),
                **{"K": inputs, "N": outputs, "bits": 4, "block_size": NBITS_BLOCK, "accuracy_level": 4},
            )
        if kind == FLOAT16 and self.target.cuda:
            values = g("Cast", g("Gemm", g("Cast", values, to=FLOAT16), self.matrix(name), transB=1), to=FLOAT)
            return g("Add", values, bias) if bias else values
        # Gemm reads the matrix as it is stored. MatMul would need a second, transposed copy of it.
        return g("Gemm", values, self.matrix(name), bias, transB=1)

    def int8_matmul(self, g: Graph, name: str, quantized: str, bias: str = "", scale: str = "") -> str:
        """Return what `matmul` does for an int8 matrix and values that `quantize` has quantized."""
        bias = self.weight(bias) if bias in self.table else bias
        unit = g.constant(np.float32(1 / 127))
        zero = g.constant(np.uint8(128)) if self.target.int8_saturates else g.constant(np.int8(0))
        left = g("Mul", unit, scale) if scale else unit
        return g(
            "MatMulIntegerToFloat",
            quantized,
            self.matrix(name),
            left,
            self.weight(f"{name}.scale"),
            g.constant(np.uint8(128)),
            zero,
            bias,
        )

    # --- the model

    def embedded_gates(self, g: Graph, tokens: str) -> str:
        """Return the first layer's W x + b for the embeddings of `tokens` (R): (R, 4H)."""
        with g.within("embedding"):
            rows = g("Gather", self.weight("embedding"), tokens)  # (R, E)
            if self.sizes.precision == "fp16":
                rows = g("Cast", rows, to=FLOAT)
        with g.within("layer_0"):
            bias = self.weight("layer_0.bias")
            if not self.sizes.is_quantized:
                return self.matmul(g, "layer_0.input", rows, bias)
            gates = self.int8_matmul(g, "layer_0.input", rows)  # a row's own scale is applied afterwards
            return g("Add", g("Mul", gates, g("Gather", self.weight("embedding.scale"), tokens)), bias)

    def embeddings(self, g: Graph, tokens: str) -> str:
        """Return the embeddings of `tokens` (R) in fp32: (R, E)."""
        rows = g("Cast", g("Gather", self.weight("embedding"), tokens), to=FLOAT)  # (R, E)
        if not self.sizes.is_quantized:
            return rows
        scale = g("Mul", g("Gather", self.weight("embedding.scale"), tokens), g.constant(np.float32(1 / 127)))
        return g("Mul", g("Sub", rows, g.constant(np.float32(128))), scale)

    def cell(self, g: Graph, layer: int, from_input: str, state: Sequence[str]) -> list[str]:
        """Return a layer's state after one token, from its W x + b (B, 4H) and its state before."""

        def matmul(matrix: str, values: str, bias: str = "") -> str:
            return self.matmul(g, f"layer_{layer}.{matrix}", values, bias and f"layer_{layer}.{bias}")

        # A CUDA graph cannot replay a split into unequal parts (token_graph).
        return cell.step(g, matmul, from_input, state, self.sizes.layer_sizes[layer], equal_splits=self.target.cuda)

    def step(self, g: Graph, tokens: str, state: StateNames) -> StateNames:
        """Return the state after all layers have read one token of each row, `tokens` (B)."""
        after: list[Sequence[str]] = []
        gates = self.embedded_gates(g, tokens)  # (B, 4H)
        for layer, before in enumerate(state):
            with g.within(f"layer_{layer}"):
                if layer:
                    gates = self.matmul(g, f"layer_{layer}.input", after[-1][0], f"layer_{layer}.bias")
                after.append(self.cell(g, layer, gates, before))
        return after

    def prefill(self, g: Graph, tokens: str, state: StateNames, lengths: str = "") -> tuple[str, StateNames]:
        """Read `tokens` (T, B), of row b its first `lengths` (B), and return the last layer's outputs (T*B, H) and the state.

        A layer reads all tokens before the next layer does, so that W x + b of all of them is one matrix multiplication.
        """
        after: list[Sequence[str]] = []
        time_and_batch = g("Shape", tokens)
        gates = self.embedded_gates(g, g("Reshape", tokens, g.constant(np.array([-1]))))  # (T*B, 4H)
        hidden = ""
        mask = [read_mask(g, time_and_batch, lengths)] if lengths else []
        for layer, size in enumerate(self.sizes.layer_sizes):
            with g.within(f"layer_{layer}"):
                if layer:
                    gates = self.matmul(g, f"layer_{layer}.input", hidden, f"layer_{layer}.bias")
                shape = g("Concat", time_and_batch, g.constant(np.array([cell.gates_size(size)])), axis=0)
                body = self.prefill_body(g, layer, masked=bool(lengths))
                by_time = [g("Reshape", gates, shape), *mask]  # (T, B, 4H), (T, B, 1)
                outputs = g.several(
                    "Scan", len(cell.STATE) + 1, *state[layer], *by_time, body=body, num_scan_inputs=len(by_time)
                )
                after.append(outputs[:-1])
                hidden = g("Reshape", outputs[-1], g.constant(np.array([-1, size])))  # (T*B, H)
        return hidden, after

    def prefill_body(self, g: Graph, layer: int, *, masked: bool) -> Graph:
        """Return the body of a layer's Scan over the tokens: state and gates in, state and output out.

        A `masked` body has one more input: which rows read the token. (OpenVINO knows no Scan that refers to values outside.)
        """
        size = self.sizes.layer_sizes[layer]
        body = g.subgraph(f"layer_{layer}")
        before = [body.input(f"{name}_in_{layer}", FLOAT, ["batch", size]) for name in cell.STATE]
        gates = body.input(f"gates_in_{layer}", FLOAT, ["batch", cell.gates_size(size)])
        after = self.cell(body, layer, gates, before)
        if masked:
            mask = body.input(f"mask_in_{layer}", BOOL, ["batch", 1])
            after = [body("Where", mask, new, old) for new, old in zip(after, before, strict=True)]
        for name, value in zip(cell.STATE, after, strict=True):
            body.output(value, f"{name}_out_{layer}", FLOAT, ["batch", size])
        body.output(after[0], f"hidden_out_{layer}", FLOAT, ["batch", size])
        return body

    def logits(self, g: Graph, hidden: str, bias: str = "", scale: str = "") -> str:
        """Return the logits (R, V') after the last layer's outputs (R, H), times the scalar `scale`.

        `bias` (V') replaces the model's own. An adaptive head returns log-probabilities, to which it is added.
        """
        with g.within("projection"):
            if not self.sizes.cutoffs:
                return self.matmul(g, "projection", hidden, bias or "projection.bias", scale)
            logits = self.adaptive_log_probabilities(g, hidden)
            logits = g("Add", logits, bias) if bias else logits
            return g("Mul", logits, scale) if scale else logits

    def adaptive_log_probabilities(self, g: Graph, hidden: str) -> str:
        """Return the log-probabilities (R, V') of an adaptive head (Grave et al. 2017, arXiv:1609.04309)."""
        head = g("LogSoftmax", self.matmul(g, "projection", hidden, "projection.bias"), axis=1)
        parts = [self.sizes.cutoffs[0], *([1] * len(self.sizes.clusters))]
        frequent, *of_clusters = g.several("Split", len(parts), head, g.constant(np.array(parts)), axis=1)
        scores = [frequent]
        for number, of_cluster in enumerate(of_clusters):
            narrow = self.matmul(g, f"cluster_{number}.narrow", hidden)
            name = f"cluster_{number}.words"
            if self.sizes.is_quantized:  # these have no bound: the scale of each row is its maximum
                largest = g("ReduceMax", g("Abs", narrow), axes=[1])
                largest = g("Max", largest, g.constant(np.float32(1e-30)))
                narrow = g("Mul", self.int8_matmul(g, name, self.quantize(g, g("Div", narrow, largest))), largest)
            else:
                narrow = self.matmul(g, name, narrow)
            scores.append(g("Add", g("LogSoftmax", narrow, axis=1), of_cluster))
        if self.sizes.padded > self.sizes.vocabulary_size:
            padding = np.full((1, self.sizes.padded - self.sizes.vocabulary_size), -np.inf, np.float32)
            scores.append(g("Add", g("Mul", of_clusters[0], g.constant(np.float32(0))), g.constant(padding)))
        return g("Concat", *scores, axis=1)


def read_mask(g: Graph, time_and_batch: str, lengths: str) -> str:
    """Return which rows read which of T tokens, (T, B, 1): row b its first `lengths` (B)."""
    num_tokens = g("Gather", time_and_batch, g.constant(np.int64(0)))
    places = g("Range", g.constant(np.int64(0)), num_tokens, g.constant(np.int64(1)))  # (T)
    return g("Unsqueeze", g("Less", g("Unsqueeze", places, g.constant(np.array([1]))), lengths), g.constant(np.array([2])))

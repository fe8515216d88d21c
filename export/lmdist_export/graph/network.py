"""What the model computes, in the precision of its weights, as the nodes of a graph.

Shapes: R rows, B rows of a batch, T words, V vocabulary (V' rounded up to whole blocks), E embedding, H a layer's size.
"""

from __future__ import annotations

import math

import numpy as np

from lmdist_export.graph.onnx_file import FLOAT, FLOAT16, INT8, INT32, INT64, UINT8, Graph
from lmdist_export.graph.sizes import NBITS_BLOCK, Sizes, weights


class Network:
    """What the model computes, written into graphs."""

    def __init__(self, sizes: Sizes, root: Graph, location: str, *, cuda: bool = False, saturates: bool = False) -> None:
        """`location` names the file of weights; `saturates` says of the processor that products of 8 bits with sign do."""
        self.sizes = sizes
        self.root = root
        self.location = location
        self.table = weights(sizes)
        self.cuda = cuda
        self.saturates = saturates
        self.declared: set[str] = set()
        self.derived: dict[str, str] = {}

    def weight(self, name: str) -> str:
        """The name of a weight, which the graph then has."""
        if name not in self.declared:
            self.declared.add(name)
            weight = self.table[name]
            self.root.weight(name, weight.kind, weight.shape, self.location, weight.offset)
        return name

    def derive(self, name: str, operator: str, *inputs: str, **attributes: int) -> str:
        """A value that is made of weights once, before any loop, and known as `name`."""
        if name not in self.derived:
            self.derived[name] = self.root(operator, *inputs, **attributes)
        return self.derived[name]

    def matrix(self, name: str) -> str:
        """A matrix of weights as its product takes it here."""
        kind = self.table[name].kind
        if kind == FLOAT16 and not self.cuda:
            # onnxruntime has no products of fp16 on a CPU; it widens them once, when the session opens.
            return self.derive(f"{name} in fp32", "Cast", self.weight(name), to=FLOAT)
        if kind == INT8 and self.saturates:
            wide = self.derive(f"{name} in 32 bits", "Cast", self.weight(name), to=INT32)
            shifted = self.derive(f"{name} above 0", "Add", wide, self.root.constant(np.int32(128)))
            return self.derive(f"{name} without sign", "Cast", shifted, to=UINT8)
        return self.weight(name)

    def quantized(self, g: Graph, values: str) -> str:
        """Numbers from -1 to 1 as whole ones from 1 to 255: a unit is 127, and 0 is 128.

        A fixed scale, because LSTM outputs lie there; so that what a row gives does not depend on the rows beside it.
        """
        return g("QuantizeLinear", values, g.constant(np.float32(1 / 127)), g.constant(np.uint8(128)))

    def product(self, g: Graph, name: str, values: str, bias: str = "", scale: str = "") -> str:
        """`values` (..., inputs) times the matrix `name`: (..., outputs).

        With weights of 8 bits `values` are whole numbers of `quantized`. `scale` is a number to multiply with; `bias` (outputs)
        is added after it.
        """
        kind = self.table[name].kind
        if kind == INT8:
            unit = g.constant(np.float32(1 / 127))
            zero = g.constant(np.uint8(128)) if self.saturates else g.constant(np.int8(0))
            left = g("Mul", unit, scale) if scale else unit
            return g(
                "MatMulIntegerToFloat",
                values,
                self.matrix(name),
                left,
                self.weight(f"{name}.scale"),
                g.constant(np.uint8(128)),
                zero,
                bias,
            )
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
        if kind == FLOAT16 and self.cuda:
            values = g("Cast", g("Gemm", g("Cast", values, to=FLOAT16), self.matrix(name), transB=1), to=FLOAT)
            return g("Add", values, bias) if bias else values
        # Gemm reads the matrix as it lies. MatMul would need a second, transposed copy of it.
        return g("Gemm", values, self.matrix(name), bias, transB=1)

    def whole(self, g: Graph, name: str, values: str) -> str:
        """`values` as the product with the matrix `name` takes them."""
        return self.quantized(g, values) if self.table[name].kind == INT8 else values

    def first_gates(self, g: Graph, tokens: str) -> str:
        """What the words `tokens` (R) add to the first layer's gates: (R, 4H)."""
        rows = g("Gather", self.weight("embedding"), tokens)  # (R, E)
        if self.sizes.precision == "fp16":
            rows = g("Cast", rows, to=FLOAT)
        bias = self.weight("layer_0.bias")
        if not self.sizes.whole:
            return self.product(g, "layer_0.input", rows, bias)
        gates = self.product(g, "layer_0.input", rows)  # a row's own scale comes after
        return g("Add", g("Mul", gates, g("Gather", self.weight("embedding.scale"), tokens)), bias)

    def cell(self, g: Graph, layer: int, inputs: str, hidden: str, cell: str) -> tuple[str, str]:
        """One step of a layer from the inputs' part of its gates (B, 4H): h and c, (B, H) each."""
        size = self.sizes.layer_sizes[layer]
        name = f"layer_{layer}.hidden"
        gates = g("Add", inputs, self.product(g, name, self.whole(g, name, hidden)))  # (B, 4H)
        if self.cuda:  # parts of equal length alone can be cut in a CUDA graph (word_graph)
            *three, candidate = g.several("Split", 4, gates, axis=1)
            input_gate, output_gate, forget_gate = (g("Sigmoid", gate) for gate in three)
        else:
            three, candidate = g.several("Split", 2, gates, g.constant(np.array([3 * size, size])), axis=1)
            input_gate, output_gate, forget_gate = g.several("Split", 3, g("Sigmoid", three), axis=1)
        kept, added = g("Mul", forget_gate, cell), g("Mul", input_gate, g("Tanh", candidate))
        cell = g("Add", kept, added)
        return g("Mul", output_gate, g("Tanh", cell)), cell

    def step(self, g: Graph, tokens: str, h: list[str], c: list[str]) -> tuple[list[str], list[str]]:
        """All layers read one word a row, `tokens` (B): their new h and c."""
        h, c = list(h), list(c)
        gates = self.first_gates(g, tokens)
        for layer in range(len(self.sizes.layer_sizes)):
            if layer:
                name = f"layer_{layer}.input"
                gates = self.product(g, name, self.whole(g, name, h[layer - 1]), self.weight(f"layer_{layer}.bias"))
            h[layer], c[layer] = self.cell(g, layer, gates, h[layer], c[layer])
        return h, c

    def read(self, g: Graph, tokens: str, h: list[str], c: list[str], lengths: str = "") -> tuple[str, list[str], list[str]]:
        """All layers read `tokens` (T, B), row b its first `lengths` (B): the last layer's outputs (T*B, H), new h and c.

        A layer reads all words before the next one does, so that its input weights meet them in one product.
        """
        h, c = list(h), list(c)
        rows_and_words = g("Shape", tokens)
        gates = self.first_gates(g, g("Reshape", tokens, g.constant(np.array([-1]))))  # (T*B, 4H)
        hidden = ""
        for layer, size in enumerate(self.sizes.layer_sizes):
            if layer:
                name = f"layer_{layer}.input"
                gates = self.product(g, name, self.whole(g, name, hidden), self.weight(f"layer_{layer}.bias"))
            shape = g("Concat", rows_and_words, g.constant(np.array([4 * size])), axis=0)
            body = g.body(f"layer_{layer}")
            state = ["batch", size]
            before = body.input(f"h_in_{layer}", FLOAT, state), body.input(f"c_in_{layer}", FLOAT, state)
            place = body.input(f"place_in_{layer}", INT64, []) if lengths else ""
            inputs = body.input(f"gates_in_{layer}", FLOAT, ["batch", 4 * size])
            after = self.cell(body, layer, inputs, *before)
            if lengths:
                there = body("Unsqueeze", body("Less", place, lengths), body.constant(np.array([1])))  # (B, 1)
                after = tuple(body("Where", there, new, old) for new, old in zip(after, before, strict=True))
            body.output(after[0], f"h_out_{layer}", FLOAT, state)
            body.output(after[1], f"c_out_{layer}", FLOAT, state)
            if lengths:
                body.output(body("Add", place, body.constant(np.int64(1))), f"place_out_{layer}", INT64, [])
            body.output(after[0], f"hidden_out_{layer}", FLOAT, state)
            states = [h[layer], c[layer], *([g.constant(np.int64(0))] if lengths else [])]
            outputs = g.several("Scan", len(states) + 1, *states, g("Reshape", gates, shape), body=body, num_scan_inputs=1)
            h[layer], c[layer] = outputs[:2]
            hidden = g("Reshape", outputs[-1], g.constant(np.array([-1, size])))  # (T*B, H)
        return hidden, h, c

    def logits(self, g: Graph, hidden: str, bias: str = "", scale: str = "") -> str:
        """Scores (R, V') of all words after the last layer's outputs (R, H), times `scale`.

        `bias` (V') stands in for the model's own. An adaptive head gives logarithms of probabilities, to which it is added.
        """
        rows = self.whole(g, "projection", hidden)
        if not self.sizes.cutoffs:
            return self.product(g, "projection", rows, bias or self.weight("projection.bias"), scale)
        first = g("LogSoftmax", self.product(g, "projection", rows, self.weight("projection.bias")), axis=1)
        clusters = len(self.sizes.clusters)
        parts = [self.sizes.cutoffs[0], *([1] * clusters)]
        scores, *of_clusters = g.several("Split", len(parts), first, g.constant(np.array(parts)), axis=1)
        scores = [scores]
        for number, of_cluster in enumerate(of_clusters):
            narrow = self.product(g, f"cluster_{number}.narrow", self.whole(g, f"cluster_{number}.narrow", hidden))
            name = f"cluster_{number}.words"
            if self.sizes.whole:  # these are bound by nothing: each row by its own largest
                largest = g("ReduceMax", g("Abs", narrow), axes=[1])
                largest = g("Max", largest, g.constant(np.float32(1e-30)))
                narrow = g("Mul", self.product(g, name, self.quantized(g, g("Div", narrow, largest))), largest)
            else:
                narrow = self.product(g, name, narrow)
            scores.append(g("Add", g("LogSoftmax", narrow, axis=1), of_cluster))
        if self.sizes.padded > self.sizes.vocabulary_size:
            nothing = np.full((1, self.sizes.padded - self.sizes.vocabulary_size), -np.inf, np.float32)
            scores.append(g("Add", g("Mul", of_clusters[0], g.constant(np.float32(0))), g.constant(nothing)))
        result = g("Concat", *scores, axis=1)
        result = g("Add", result, bias) if bias else result
        return g("Mul", result, scale) if scale else result

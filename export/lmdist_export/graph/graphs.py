"""The graphs of a bundle, made of the sizes in its manifest: one that reads, one that scores, two that make words.

    step_graph        tokens (B, T), h, c              -> logits (B, T, V), next_h, next_c
    score_graph       tokens (B, T), targets, h, c     -> log_probabilities (B, T), next_h, next_c
    generation_graph  prompt (B, P), uniform (N, B, A) -> words (N, B), next_h, next_c: N words in one run
    word_graph        word (B), uniform (B, A), state  -> next_word (B), next state: one word a run, for a GPU

All are made of the same two rooms: `Network` holds what the model computes, in the precision of its weights, and `draw` turns
logits into words. A graph is written anew wherever it is needed, by lmdist-export into files for every runtime, and by the
sampler straight into onnxruntime. So no graph of a stranger ever runs: of a bundle only weights are taken, whose place and
length the sizes decide. A graph for generation has just the nodes that its options need.

Why each graph is what it is says docs/sampling.md. This module knows no onnxruntime and reads no file.

Shapes: B rows, T words, P words of a prompt, N new words, A uniform numbers a word, V vocabulary (V' rounded up to whole
blocks), E embedding, H a layer's size, S the sum of the layers' sizes, K candidates.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate, pairwise

import numpy as np

from lmdist.text.vocabulary import END_ID, UNKNOWN_ID
from lmdist_export.graph.onnx_file import BOOL, FLOAT, FLOAT16, INT8, INT32, INT64, UINT8, Graph, Shape, model_bytes

VERSION = 2
BLOCK = 256  # words whose probabilities are summed first, so that a draw looks at V/256 sums and then at 256 words
NBITS_BLOCK = 64  # 4-bit weights that share a scale: 128 is not faster, 32 is
ALIGNMENT = 4096  # of weights in their file, so that they can be mapped
ATTEMPTS = 24  # uniform numbers a word where a draw may be refused; each refusal leaves about half of what is wrong


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model and the precision of its weights, which decide all of a graph but the weights' values."""

    layer_sizes: list[int]
    vocabulary_size: int
    embedding_size: int
    tied: bool
    precision: str = "fp32"
    cutoffs: list[int] = field(default_factory=list)
    """Of an adaptive head: the ids at which a cluster of rarer words begins."""

    @property
    def clusters(self) -> list[tuple[int, int]]:
        """Of each cluster the length of its rows, a quarter of those before, and the number of its words."""
        ends = [*self.cutoffs, self.vocabulary_size]
        return [(self.layer_sizes[-1] >> 2 * number, end - start) for number, (start, end) in enumerate(pairwise(ends), 1)]

    @property
    def state_size(self) -> int:
        """S: the layers' states lie side by side."""
        return sum(self.layer_sizes)

    @property
    def padded(self) -> int:
        """V': the vocabulary in whole blocks. What is beyond it has the logit -inf."""
        return math.ceil(self.vocabulary_size / BLOCK) * BLOCK

    @property
    def whole(self) -> bool:
        """Whether weights are whole numbers with a scale."""
        return self.precision in ("int8", "int4")


@dataclass(frozen=True)
class Weight:
    """A tensor in the file of weights: its type and shape, and where it begins."""

    kind: int
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Features:
    """What a generation graph can do beside drawing from all words; each costs nodes, and what is not asked for has none."""

    greedy: bool = False
    adjusted: bool = False
    top_k: bool = False
    top_p: bool = False
    min_p: bool = False
    typical_p: bool = False

    @property
    def sorted(self) -> bool:
        """Whether the likeliest words are sorted out first: for a few, or for an order that is not that of likelihood."""
        return self.top_k or self.typical_p

    @property
    def attempts(self) -> int:
        """A: uniform numbers a word."""
        return ATTEMPTS if (self.top_p or self.min_p) and not (self.sorted or self.greedy) else 1


EVERY_FEATURE = Features(adjusted=True, top_k=True, top_p=True, min_p=True, typical_p=True)


# --- the weights ---------------------------------------------------------------------------------------------------


def weights(sizes: Sizes) -> dict[str, Weight]:
    """The weights in the order of their file.

    Matrices of whole numbers are stored as their kernel wants them: (inputs, outputs) of 8 bits, with a scale for each
    output; of 4 bits as MatMulNBits reads them. Others are (outputs, inputs). Gates are in ONNX's order: input, output,
    forget, cell.
    """
    plain = FLOAT16 if sizes.precision == "fp16" else FLOAT
    shapes: dict[str, tuple[int, tuple[int, ...]]] = {}

    def matrix(name: str, outputs: int, inputs: int) -> None:
        if sizes.precision == "int4" and name == "projection":
            blocks = math.ceil(inputs / NBITS_BLOCK)
            shapes[name] = UINT8, (outputs, blocks, NBITS_BLOCK // 2)
            shapes[f"{name}.scale"] = FLOAT, (outputs * blocks,)
        elif sizes.whole:
            shapes[name] = INT8, (inputs, outputs)
            shapes[f"{name}.scale"] = FLOAT, (outputs,)
        else:
            shapes[name] = plain, (outputs, inputs)

    last = sizes.layer_sizes[-1]
    rows = sizes.cutoffs[0] + len(sizes.clusters) if sizes.cutoffs else sizes.padded
    matrix("projection", rows, last)
    shapes["projection.bias"] = FLOAT, (rows,)
    for number, (length, words) in enumerate(sizes.clusters):
        matrix(f"cluster_{number}.narrow", length, last)
        matrix(f"cluster_{number}.words", words, length)
    for layer, (before, size) in enumerate(pairwise([sizes.embedding_size, *sizes.layer_sizes])):
        matrix(f"layer_{layer}.input", 4 * size, before)
        matrix(f"layer_{layer}.hidden", 4 * size, size)
        shapes[f"layer_{layer}.bias"] = FLOAT, (4 * size,)
    if sizes.whole:
        shapes["embedding"] = UINT8, (sizes.vocabulary_size, sizes.embedding_size)
        shapes["embedding.scale"] = FLOAT, (sizes.vocabulary_size, 1)
    elif not sizes.tied:
        shapes["embedding"] = plain, (sizes.vocabulary_size, sizes.embedding_size)
    lengths = [length_of(kind, shape) for kind, shape in shapes.values()]
    offsets = accumulate((math.ceil(length / ALIGNMENT) * ALIGNMENT for length in lengths), initial=0)
    made = {name: Weight(*shapes[name], offset) for name, offset in zip(shapes, offsets, strict=False)}
    if "embedding" not in made:  # the rows of the projection, without those beyond the vocabulary
        made["embedding"] = Weight(plain, (sizes.vocabulary_size, sizes.embedding_size), made["projection"].offset)
    return made


def length_of(kind: int, shape: Sequence[int]) -> int:
    """The bytes of a tensor."""
    return math.prod(shape) * {FLOAT: 4, FLOAT16: 2}.get(kind, 1)


def file_length(sizes: Sizes) -> int:
    """The bytes of the file of weights."""
    return max(weight.offset + length_of(weight.kind, weight.shape) for weight in weights(sizes).values())


# --- the model -----------------------------------------------------------------------------------------------------


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


# --- the graphs ----------------------------------------------------------------------------------------------------


def step_graph(sizes: Sizes, location: str, run: str = "", *, cuda: bool = False, saturates: bool = False) -> bytes:
    """The graph that reads words and gives the logits after each."""
    g = Graph("lmdist_step")
    network = Network(sizes, g, location, cuda=cuda, saturates=saturates)
    tokens = g.input("tokens", INT64, ["batch", "time"])
    hidden, *state = network.read(g, g("Transpose", tokens, perm=[1, 0]), *state_inputs(g, sizes))
    rows = g("Slice", network.logits(g, hidden), *(g.constant(np.array([n])) for n in (0, sizes.vocabulary_size, 1)))
    shape = g("Concat", *rows_then_words(g, tokens), g.constant(np.array([sizes.vocabulary_size])), axis=0)
    logits = g("Transpose", g("Reshape", rows, shape), perm=[1, 0, 2])
    g.output(logits, "logits", FLOAT, ["batch", "time", sizes.vocabulary_size])
    state_outputs(g, sizes, *state)
    return model_bytes(g, metadata("lmdist step graph", sizes, run))


def score_graph(sizes: Sizes, location: str, *, cuda: bool = False, saturates: bool = False) -> bytes:
    """The graph that reads words and gives the log-probability of the word after each."""
    g = Graph("lmdist_score")
    network = Network(sizes, g, location, cuda=cuda, saturates=saturates)
    tokens = g.input("tokens", INT64, ["batch", "time"])
    targets = g.input("targets", INT64, ["batch", "time"])
    hidden, *state = network.read(g, g("Transpose", tokens, perm=[1, 0]), *state_inputs(g, sizes))
    logits = network.logits(g, hidden)  # (T*B, V')
    by_row = g("Reshape", g("Transpose", targets, perm=[1, 0]), g.constant(np.array([-1, 1])))
    scores = g("Sub", g("GatherElements", logits, by_row, axis=1), g("ReduceLogSumExp", logits, axes=[1]))  # (T*B, 1)
    shape = g("Concat", *rows_then_words(g, tokens), axis=0)
    g.output(g("Transpose", g("Reshape", scores, shape), perm=[1, 0]), "log_probabilities", FLOAT, ["batch", "time"])
    state_outputs(g, sizes, *state)
    return model_bytes(g, metadata("lmdist score graph", sizes, ""))


def generation_graph(
    sizes: Sizes, features: Features, location: str, run: str = "", *, cuda: bool = False, saturates: bool = False
) -> bytes:
    """The graph that reads prompts and makes N words after each, or fewer where all have stopped."""
    g = Graph("lmdist_generation")
    network = Network(sizes, g, location, cuda=cuda, saturates=saturates)
    prompt = g.input("prompt", INT64, ["batch", "prompt_words"])
    lengths = g.input("lengths", INT64, ["batch"])
    h, c = state_inputs(g, sizes)
    uniform = g.input("uniform", FLOAT, ["new_words", "batch", features.attempts])
    bias = g.input("bias", FLOAT, [sizes.padded])
    stops = g.input("stops", INT64, ["stop_words"])
    going = g.input("going", BOOL, ["batch"])
    options = draw_inputs(g, sizes, features)

    # All words of a prompt but its last are read; the last one is the first that a step of the loop reads.
    last = g("Sub", lengths, g.constant(np.int64(1)))
    by_time = g("Transpose", prompt, perm=[1, 0])  # (P, B)
    _, h, c = network.read(g, by_time, h, c, last)
    word = g("GatherElements", prompt, g("Unsqueeze", last, g.constant(np.array([1]))), axis=1)  # (B, 1)
    word = g("Squeeze", word, g.constant(np.array([1])))
    bias = bias_after_scale(g, network, bias, options)

    layers = range(len(sizes.layer_sizes))
    body = g.body("word")
    carried = [
        ("word", INT64, ["batch"], word),
        ("going", BOOL, ["batch"], going),
        *((f"h_{layer}", FLOAT, ["batch", sizes.layer_sizes[layer]], h[layer]) for layer in layers),
        *((f"c_{layer}", FLOAT, ["batch", sizes.layer_sizes[layer]], c[layer]) for layer in layers),
        *([("counts", FLOAT, ["batch", sizes.padded], options["counts"])] if features.adjusted else []),
    ]
    place = body.input("place", INT64, [])
    body.input("condition", BOOL, [])
    names = {name: body.input(f"{name}_before", kind, shape) for name, kind, shape, _ in carried}
    numbers = body("Gather", uniform, place, axis=0)  # (B, A)
    drawn, mass, new_h, new_c, counts = word_after(body, network, features, names, bias, numbers, options)
    column = body.constant(np.array([1]))
    new_word = body("Squeeze", drawn, column)
    stopped = body("ReduceMax", body("Cast", body("Equal", drawn, stops), to=INT32), axes=[1], keepdims=0)
    new_going = body("And", names["going"], body("Equal", stopped, body.constant(np.int32(0))))
    any_going = body("Cast", body("ReduceMax", body("Cast", new_going, to=INT32), keepdims=0), to=BOOL)
    after = {"word": new_word, "going": new_going}
    after |= {f"h_{layer}": new_h[layer] for layer in layers} | {f"c_{layer}": new_c[layer] for layer in layers}
    if features.adjusted:
        after["counts"] = counts
    body.output(any_going, "go_on", BOOL, [])
    for name, kind, shape, _ in carried:
        body.output(after[name], f"{name}_after", kind, shape)
    body.output(new_word, "word_made", INT64, ["batch"])
    body.output(body("Squeeze", mass, column), "mass_made", FLOAT, ["batch"])

    trips = g("Squeeze", g("Slice", g("Shape", uniform), *(g.constant(np.array([n])) for n in (0, 1))))
    starts = [value for *_, value in carried]
    ends = g.several("Loop", len(carried) + 2, trips, g.constant(np.bool_(True)), *starts, body=body)
    result = dict(zip((name for name, *_ in carried), ends, strict=False))
    g.output(ends[-2], "words", INT64, ["made_words", "batch"])
    g.output(ends[-1], "mass", FLOAT, ["made_words", "batch"])
    g.output(result["going"], "next_going", BOOL, ["batch"])
    state_outputs(g, sizes, [result[f"h_{layer}"] for layer in layers], [result[f"c_{layer}"] for layer in layers])
    if features.adjusted:
        g.output(result["counts"], "next_counts", FLOAT, ["batch", sizes.padded])
    return model_bytes(g, metadata("lmdist generation graph", sizes, run) | {"features": json.dumps(asdict(features))})


def word_graph(sizes: Sizes, features: Features, location: str, *, cuda: bool = False, saturates: bool = False) -> bytes:
    """The graph that makes one word a row, for a device where a Loop would come back to the host for each of its nodes.

    What goes from word to word has an input NAME and an output next_NAME of the same shape, the layers' states one by one:
    onnxruntime cuts and joins parts of unequal lengths by tables that it copies from the host, and a CUDA graph replays the
    copy and not the table. For the same reason nothing here asks for a shape, unless an option needs it (`capturable`).
    """
    g = Graph("lmdist_word")
    network = Network(sizes, g, location, cuda=cuda, saturates=saturates)
    states = {name: [f"{name}_{layer}" for layer in range(len(sizes.layer_sizes))] for name in ("h", "c")}
    before = {"word": g.input("word", INT64, ["batch"])}
    for names in states.values():
        before |= {name: g.input(name, FLOAT, ["batch", size]) for name, size in zip(names, sizes.layer_sizes, strict=True)}
    mass = g.input("mass", FLOAT, ["batch", 1])
    uniform = g.input("uniform", FLOAT, ["batch", features.attempts])
    bias = g.input("bias", FLOAT, [sizes.padded])
    options = draw_inputs(g, sizes, features)
    before |= {"counts": options["counts"]} if features.adjusted else {}
    bias = bias_after_scale(g, network, bias, options)
    drawn, of_word, h, c, counts = word_after(g, network, features, before, bias, uniform, options)
    g.output(g("Squeeze", drawn, g.constant(np.array([1]))), "next_word", INT64, ["batch"])
    for names, parts in ((states["h"], h), (states["c"], c)):
        for name, part, size in zip(names, parts, sizes.layer_sizes, strict=True):
            g.output(part, f"next_{name}", FLOAT, ["batch", size])
    # Added up, for what is not finite stays so: it is looked at once, after the last word.
    g.output(g("Add", mass, of_word), "next_mass", FLOAT, ["batch", 1])
    if features.adjusted:
        g.output(counts, "next_counts", FLOAT, ["batch", sizes.padded])
    return model_bytes(g, metadata("lmdist word graph", sizes, ""))


def capturable(sizes: Sizes, features: Features) -> bool:
    """Whether all of a word graph runs as a CUDA graph: no Loop, no shape, and no table that is copied from the host."""
    return not (features.sorted or features.attempts > 1 or sizes.cutoffs)


def bias_after_scale(g: Graph, network: Network, bias: str, options: dict[str, str]) -> str:
    """What `Network.logits` is to add: `bias` (V') and the model's own, over the temperature as the logits are."""
    if network.sizes.cutoffs:
        return bias
    bias = g("Add", bias, network.weight("projection.bias"))
    return g("Mul", bias, options["inverse_temperature"]) if "inverse_temperature" in options else bias


def word_after(
    g: Graph, network: Network, features: Features, before: dict[str, str], bias: str, uniform: str, options: dict[str, str]
) -> tuple[str, str, list[str], list[str], str]:
    """The word after `before`: drawn (B, 1) and its `draw` mass (B, 1), then the layers' new h and c, and the new counts."""
    layers = range(len(network.sizes.layer_sizes))
    h, c = network.step(
        g, before["word"], [before[f"h_{layer}"] for layer in layers], [before[f"c_{layer}"] for layer in layers]
    )
    logits = network.logits(g, h[-1], bias, options.get("inverse_temperature", ""))
    if features.adjusted:
        logits = adjusted(g, logits, before["counts"], options)
    drawn, mass = draw(g, network.sizes, features, logits, uniform, options, cuda=network.cuda)
    # Weights of a stranger may make words likely that are beyond the vocabulary, where nothing can be read.
    drawn = g("Min", drawn, g.constant(np.int64(network.sizes.vocabulary_size - 1)))
    if not features.adjusted:
        return drawn, mass, h, c, ""
    one_more = g("Add", g("GatherElements", before["counts"], drawn, axis=1), g.constant(np.float32(1)))
    return drawn, mass, h, c, g("ScatterElements", before["counts"], drawn, one_more, axis=1)


def metadata(what: str, sizes: Sizes, run: str) -> dict[str, str]:
    """What stands in a graph's file, each value JSON, for a runtime that has nothing else."""
    values = {
        "format": what,
        "version": VERSION,
        **asdict(sizes),
        "eos_id": END_ID,
        "unknown_id": UNKNOWN_ID,
        "run": run,
    }
    return {name: json.dumps(value) for name, value in values.items()}


def rows_then_words(g: Graph, tokens: str) -> tuple[str, str]:
    """T and B of `tokens` (B, T), each as a shape of one number."""
    shape = g("Shape", tokens)
    return g("Gather", shape, g.constant(np.array([1]))), g("Gather", shape, g.constant(np.array([0])))


def state_inputs(g: Graph, sizes: Sizes) -> tuple[list[str], list[str]]:
    """The state that goes in, (B, S) for h and for c, as the layers' parts (B, H)."""
    parts = []
    for name in ("h", "c"):
        value = g.input(name, FLOAT, ["batch", sizes.state_size])
        parts.append(g.several("Split", len(sizes.layer_sizes), value, g.constant(np.array(sizes.layer_sizes)), axis=1))
    return parts[0], parts[1]


def state_outputs(g: Graph, sizes: Sizes, h: list[str], c: list[str]) -> None:
    """The state that comes out: the layers' parts side by side."""
    for name, parts in (("next_h", h), ("next_c", c)):
        g.output(g("Concat", *parts, axis=1), name, FLOAT, ["batch", sizes.state_size])


# --- the draw ------------------------------------------------------------------------------------------------------


def draw_inputs(g: Graph, sizes: Sizes, features: Features) -> dict[str, str]:
    """The options of generation that are inputs of the graph, by their names."""
    names: dict[str, tuple[int, Shape]] = {}
    if not features.greedy:
        names["inverse_temperature"] = FLOAT, []
    if features.adjusted:
        names["counts"] = FLOAT, ["batch", sizes.padded]
        names["in_prompt"] = BOOL, ["batch", sizes.padded]
        names["row_bias"] = FLOAT, ["rows", sizes.padded]
        names |= dict.fromkeys(("repetition_penalty", "presence_penalty", "frequency_penalty"), (FLOAT, []))
    if features.sorted and not features.greedy:
        names["top_k"] = INT64, [1]
    if not features.greedy:
        names |= {name: (FLOAT, []) for name in ("top_p", "min_p", "typical_p") if getattr(features, name)}
    return {name: g.input(name, *of) for name, of in names.items()}


def adjusted(g: Graph, logits: str, counts: str, options: dict[str, str]) -> str:
    """Logits (B, V') less what the words that a text already has are to pay."""
    zero = g.constant(np.float32(0))
    repetition = options["repetition_penalty"]
    made = g("Greater", counts, zero)
    paid = g("Where", g("Greater", logits, zero), g("Div", logits, repetition), g("Mul", logits, repetition))
    logits = g("Where", g("Or", made, options["in_prompt"]), paid, logits)
    once, each = options["presence_penalty"], options["frequency_penalty"]
    price = g("Add", g("Mul", g("Cast", made, to=FLOAT), once), g("Mul", counts, each))
    return g("Add", g("Sub", logits, price), options["row_bias"])


def draw(
    g: Graph, sizes: Sizes, features: Features, logits: str, uniform: str, options: dict[str, str], *, cuda: bool = False
) -> tuple[str, str]:
    """The next words (B, 1) of `logits` (B, V') by `uniform` (B, A); and a sum (B, 1) that is finite where the logits are."""
    if features.greedy:
        return g("ArgMax", logits, axis=1), g("ReduceMax", logits, axes=[1])
    if features.sorted:
        return draw_of_candidates(g, features, logits, uniform, options)
    probabilities = g("Reshape", g("Softmax", logits, axis=1), g.constant(np.array([-1, sizes.padded // BLOCK, BLOCK])))
    sums = g("ReduceSum", probabilities, g.constant(np.array([2])), keepdims=0)  # (B, V'/256)
    first = column_of(g, uniform, 0)
    drawn = two_level(g, sizes, probabilities, sums, first, cuda=cuda)
    if not (features.top_p or features.min_p):
        return drawn[0], drawn[2]
    return accepted(g, sizes, features, probabilities, drawn, uniform, options, cuda=cuda), drawn[2]


def two_level(g: Graph, sizes: Sizes, weights: str, sums: str, uniform: str, *, cuda: bool) -> tuple[str, str, str]:
    """A word (B, 1) of `weights` (B, V'/256, 256) with `sums` (B, V'/256) by `uniform` (B, 1), its weight, and the sum of all.

    The inverse of the distribution function, first of blocks, then inside one. A uniform number is at most 1 - 2**-24, and
    that part of a sum rounds to less than the sum: what has no weight is never drawn.
    """
    column, blocks = g.constant(np.array([1])), sizes.padded // BLOCK
    up_to = g("CumSum", sums, g.constant(np.int64(1)))  # (B, V'/256)
    mass = column_of(g, up_to, blocks - 1)
    target = g("Mul", mass, uniform)
    before = g("LessOrEqual", up_to, target)
    below = g("ReduceMax", g("Mul", up_to, g("Cast", before, to=FLOAT)), axes=[1])
    # Never beyond the last, whatever numbers a row has that is not asked for.
    block = g("Min", g("ReduceSum", g("Cast", before, to=INT64), column), g.constant(np.int64(blocks - 1)))  # (B, 1)
    if cuda:  # GatherND copies a table from the host (word_graph)
        index = g("Add", g("Unsqueeze", block, column), g.constant(np.zeros((1, 1, BLOCK), np.int64)))  # (B, 1, 256)
        inside = g("Squeeze", g("GatherElements", weights, index, axis=1), column)  # (B, 256)
    else:
        inside = g("GatherND", weights, block, batch_dims=1)  # (B, 256)
    up_to = g("CumSum", inside, g.constant(np.int64(1)))
    most = g("Mul", column_of(g, up_to, BLOCK - 1), g.constant(np.float32(1 - 2**-24)))
    target = g("Min", g("Sub", target, below), most)
    place = g("ReduceSum", g("Cast", g("LessOrEqual", up_to, target), to=INT64), column)
    place = g("Min", place, g.constant(np.int64(BLOCK - 1)))  # (B, 1)
    word = g("Add", g("Mul", block, g.constant(np.int64(BLOCK))), place)
    return word, g("GatherElements", inside, place, axis=1), mass


def accepted(
    g: Graph,
    sizes: Sizes,
    features: Features,
    weights: str,
    drawn: tuple[str, str, str],
    uniform: str,
    options: dict[str, str],
    *,
    cuda: bool,
) -> str:
    """Words (B, 1) that top-p and min-p allow: what `two_level` has `drawn`, or where that is not allowed, of likelier ones.

    A word is allowed if all likelier ones together have less than top_p, and if it has min_p of the likeliest one's
    probability. To know that of one word takes a look at all and no sorting. Where it is refused the likelier words hold all
    that are allowed, so that the draw among them is exact, and about half of the rest is gone each time.
    """
    column = g.constant(np.array([1]))
    word, of_word, mass = drawn
    of_word = g("Max", of_word, g.constant(np.float32(1e-30)))  # what is divided by it is finite
    most = g("Mul", options["top_p"], mass) if features.top_p else ""
    least = ""
    if features.min_p:
        least = g("Mul", g("Unsqueeze", g("ReduceMax", weights, axes=[1, 2], keepdims=0), column), options["min_p"])

    def judge(g: Graph, weights: str, of_word: str, unit: str) -> tuple[str, str, str, str]:
        """Whether a word is refused (B, 1); the weights of likelier ones in units of its own, their sums, and that unit."""
        unit = g("Mul", unit, of_word)
        by = g("Unsqueeze", of_word, g.constant(np.array([2])))
        likelier = g("ThresholdedRelu", g("Div", weights, by), alpha=1.0)  # (B, V'/256, 256)
        sums = g("ReduceSum", likelier, g.constant(np.array([2])), keepdims=0)  # (B, V'/256)
        above = g("ReduceSum", sums, column)
        reasons = []
        if most:
            reasons.append(g("GreaterOrEqual", g("Mul", above, unit), most))
        if least:
            reasons.append(g("Less", unit, least))
        reason = g("Or", *reasons) if len(reasons) == 2 else reasons[0]
        # The likeliest word is never refused, whatever its product of units is rounded to: none would be left to draw.
        return g("And", reason, g("Greater", above, g.constant(np.float32(0)))), likelier, sums, unit

    def any_of(g: Graph, flags: str) -> str:
        return g("Cast", g("ReduceMax", g("Cast", flags, to=INT32), keepdims=0), to=BOOL)

    first = judge(g, weights, of_word, g.constant(np.float32(1)))
    body = g.body("attempt")
    attempt = body.input("attempt", INT64, [])
    body.input("again", BOOL, [])
    blocks = sizes.padded // BLOCK
    shapes = {
        "word": (INT64, ["batch", 1], word),
        "refused": (BOOL, ["batch", 1], first[0]),
        "likelier": (FLOAT, ["batch", blocks, BLOCK], first[1]),
        "sums": (FLOAT, ["batch", blocks], first[2]),
        "unit": (FLOAT, ["batch", 1], first[3]),
    }
    before = {name: body.input(f"{name}_refused", kind, shape) for name, (kind, shape, _) in shapes.items()}
    number = body(
        "Gather",
        uniform,
        body("Unsqueeze", body("Add", attempt, body.constant(np.int64(1))), body.constant(np.array([0]))),
        axis=1,
    )
    word, of_word, _ = two_level(body, sizes, before["likelier"], before["sums"], number, cuda=cuda)
    refused, *others = judge(body, before["likelier"], of_word, before["unit"])
    refused = body("And", before["refused"], refused)
    after = [body("Where", before["refused"], word, before["word"]), refused, *others]
    body.output(any_of(body, refused), "attempt_again", BOOL, [])
    for (name, (kind, shape, _)), value in zip(shapes.items(), after, strict=True):
        body.output(value, f"{name}_judged", kind, shape)
    starts = [start for *_, start in shapes.values()]
    return g.several("Loop", 5, g.constant(np.int64(ATTEMPTS - 1)), any_of(g, first[0]), *starts, body=body)[0]


def draw_of_candidates(g: Graph, features: Features, logits: str, uniform: str, options: dict[str, str]) -> tuple[str, str]:
    """Words (B, 1) of the `top_k` likeliest of `logits` (B, V'), which top-p, min-p and typical-p narrow, each what is left."""
    last, one = g.constant(np.int64(1)), g.constant(np.array([1]))
    best, ids = g.several("TopK", 2, logits, options["top_k"], axis=1)  # (B, K), the likeliest first
    weights = g("Softmax", best, axis=1)
    mass = g("ReduceSum", weights, one)
    zero = g.constant(np.float32(0))

    def reached(weights: str, rank: str, share: str) -> str:
        """Which of (B, K) are needed for `share` of the sum; of those of one `rank` all or none."""
        before = g("CumSum", weights, last, exclusive=1)
        needed = g("Less", before, g("Mul", g("ReduceSum", weights, one), share))
        lowest = g("ReduceMax", g("Where", needed, rank, g.constant(np.float32(-np.inf))), axes=[1])
        return g("LessOrEqual", rank, lowest)

    if features.top_p:
        weights = g("Where", reached(weights, g("Neg", best), options["top_p"]), weights, zero)
    if features.min_p:
        likeliest = column_of(g, weights, 0)
        enough = g("GreaterOrEqual", weights, g("Mul", likeliest, options["min_p"]))
        weights = g("Where", enough, weights, zero)
    if features.typical_p:
        shares = g("Div", weights, g("ReduceSum", weights, one))
        # Where a process takes denormal numbers for 0, as training does, a floor below 1.2e-38 is none.
        surprise = g("Neg", g("Log", g("Max", shares, g.constant(np.float32(1e-30)))))  # in nats
        entropy = g("ReduceSum", g("Mul", shares, surprise), one)
        there = g("Greater", shares, zero)
        strange = g("Where", there, g("Abs", g("Sub", surprise, entropy)), g.constant(np.float32(np.inf)))
        every = g("Slice", g("Shape", strange), *(g.constant(np.array([n])) for n in (1, 2)))
        strange, order = g.several("TopK", 2, strange, every, axis=1, largest=0)
        ids, weights = (g("GatherElements", values, order, axis=1) for values in (ids, weights))
        weights = g("Where", reached(weights, strange, options["typical_p"]), weights, zero)
    up_to = g("CumSum", weights, last)
    whole = g("ReduceMax", up_to, axes=[1])
    place = g("ReduceSum", g("Cast", g("LessOrEqual", up_to, g("Mul", whole, uniform)), to=INT64), one)
    most = g("Sub", g("Slice", g("Shape", up_to), *(g.constant(np.array([n])) for n in (1, 2))), one)
    return g("GatherElements", ids, g("Min", place, most), axis=1), mass


def column_of(g: Graph, values: str, number: int) -> str:
    """Column `number` of (B, K), as (B, 1)."""
    return g("Slice", values, *(g.constant(np.array([n])) for n in (number, number + 1, 1)))

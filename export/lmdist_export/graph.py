"""The step graph as a table: convert.py builds it, and a file that holds any other graph is refused.

    tokens (B, T) --Gather--> LSTM --> LSTM --> ... --> Gemm --> logits (B, T, V)
                               ^ |      ^ |
    h, c (B, S) ----Split------' |------' |----Concat--> next_h, next_c (B, S)

onnxruntime does what a graph asks for: it reads the files that it names, and makes tensors of the sizes that it computes. So
the graph of a stranger is compared, before onnxruntime sees it, with the one that lmdist writes for the sizes in its metadata:
node for node, shape for shape, and each weight with the bytes that are there. This module reads ONNX's own format for that,
for a machine that samples has no onnx. It does not know what the weights are.

Shapes: B rows, T words, V vocabulary, E embedding, H a layer's size, S the sum of the layers' sizes.
"""

from __future__ import annotations

import json
import math
import reprlib
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from lmdist.errors import DataError
from lmdist.files import check_shape, check_version, size_of

# What the metadata inside model.onnx say, so that the file can be told from others on its own.
FORMAT = "lmdist step graph"
VERSION = 1
OPSET = 17  # has all that the graph needs; every onnxruntime since 1.12 reads it

# --- the table -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model, which stand in the graph's metadata and decide all else in it but the weights' values."""

    layer_sizes: list[int]
    vocabulary_size: int
    embedding_size: int
    tied: bool
    cutoffs: list[int] = field(default_factory=list)
    """Of an adaptive head: the ids at which a cluster of rarer words begins."""

    @property
    def clusters(self) -> list[tuple[int, int]]:
        """Of each cluster the length of its rows, a quarter of those before, and the number of its words."""
        ends = [*self.cutoffs, self.vocabulary_size]
        return [(self.layer_sizes[-1] // 4 ** (number + 1), end - start) for number, (start, end) in enumerate(pairwise(ends))]


@dataclass(frozen=True)
class Node:
    """An operator, and the names of what goes in and comes out."""

    operator: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any] = field(default_factory=dict)
    name: str = ""


def step_nodes(sizes: Sizes) -> list[Node]:
    """The nodes of the step graph, in the order in which they run."""
    layers = range(len(sizes.layer_sizes))
    nodes = [
        Node("Gather", ["embedding", "tokens"], ["embedded"]),  # (B, T, E)
        Node("Transpose", ["embedded"], ["inputs_0"], {"perm": [1, 0, 2]}),  # (T, B, E)
        Node("Split", ["h", "state_sizes"], [f"h_{layer}" for layer in layers], {"axis": 1}),  # (B, H) each
        Node("Split", ["c", "state_sizes"], [f"c_{layer}" for layer in layers], {"axis": 1}),  # (B, H) each
    ]
    for layer, size in enumerate(sizes.layer_sizes):
        name = f"layer_{layer}"
        weights = [f"{name}.W", f"{name}.R", f"{name}.B"]
        nodes += [
            Node("Unsqueeze", [f"h_{layer}", "axis_0"], [f"{name}.h"]),  # (1, B, H)
            Node("Unsqueeze", [f"c_{layer}", "axis_0"], [f"{name}.c"]),  # (1, B, H)
            Node(
                "LSTM",
                [f"inputs_{layer}", *weights, "", f"{name}.h", f"{name}.c"],
                [f"{name}.Y", f"{name}.Y_h", f"{name}.Y_c"],  # (T, 1, B, H), (1, B, H), (1, B, H)
                {"hidden_size": size},
                name,
            ),
            Node("Squeeze", [f"{name}.Y", "axis_1"], [f"inputs_{layer + 1}"]),  # (T, B, H)
            Node("Squeeze", [f"{name}.Y_h", "axis_0"], [f"next_h_{layer}"]),  # (B, H)
            Node("Squeeze", [f"{name}.Y_c", "axis_0"], [f"next_c_{layer}"]),  # (B, H)
        ]
    nodes += [
        Node("Concat", [f"next_h_{layer}" for layer in layers], ["next_h"], {"axis": 1}),  # (B, S)
        Node("Concat", [f"next_c_{layer}" for layer in layers], ["next_c"], {"axis": 1}),  # (B, S)
        Node("Transpose", [f"inputs_{len(layers)}"], ["hidden"], {"perm": [1, 0, 2]}),  # (B, T, H)
        Node("Reshape", ["hidden", "rows_of_hidden"], ["hidden_rows"]),  # (B*T, H)
        *(adaptive_nodes(sizes) if sizes.cutoffs else full_nodes(sizes)),
        Node("Shape", ["tokens"], ["rows_and_words"]),
        Node("Concat", ["rows_and_words", "vocabulary_size"], ["logits_shape"], {"axis": 0}),
        Node("Reshape", ["logits_rows", "logits_shape"], ["logits"]),  # (B, T, V)
    ]
    return nodes


def full_nodes(sizes: Sizes) -> list[Node]:
    """From the last layer's output to logits, by one row a word."""
    # Gemm reads the tied matrix as it lies. MatMul would need a second, transposed copy of it.
    projection = ["hidden_rows", "embedding" if sizes.tied else "projection", "projection_bias"]
    return [Node("Gemm", projection, ["logits_rows"], {"transB": 1})]  # (B*T, V)


def adaptive_nodes(sizes: Sizes) -> list[Node]:
    """From the last layer's output to logarithms of probabilities: of frequent words and clusters, then inside each cluster."""
    numbers = range(len(sizes.clusters))
    nodes = [
        Node("Gemm", ["hidden_rows", "projection", "projection_bias"], ["first_scores"], {"transB": 1}),
        Node("LogSoftmax", ["first_scores"], ["first"], {"axis": 1}),  # (B*T, frequent words + clusters)
        Node("Split", ["first", "first_sizes"], ["frequent", *(f"cluster_{number}" for number in numbers)], {"axis": 1}),
    ]
    for number in numbers:
        name = f"cluster_{number}"
        nodes += [
            Node("Gemm", ["hidden_rows", f"{name}.narrow"], [f"{name}.rows"], {"transB": 1}),
            Node("Gemm", [f"{name}.rows", f"{name}.words"], [f"{name}.scores"], {"transB": 1}),
            Node("LogSoftmax", [f"{name}.scores"], [f"{name}.inside"], {"axis": 1}),
            Node("Add", [f"{name}.inside", name], [f"rare_{number}"]),  # (B*T, words of the cluster)
        ]
    return [*nodes, Node("Concat", ["frequent", *(f"rare_{number}" for number in numbers)], ["logits_rows"], {"axis": 1})]


def constants(sizes: Sizes) -> dict[str, list[int]]:
    """The numbers in the graph that are no weights, int64."""
    numbers = {
        "state_sizes": sizes.layer_sizes,
        "vocabulary_size": [sizes.vocabulary_size],
        "rows_of_hidden": [-1, sizes.layer_sizes[-1]],
        "axis_0": [0],
        "axis_1": [1],
    }
    if sizes.cutoffs:
        numbers["first_sizes"] = [sizes.cutoffs[0], *(1 for _ in sizes.clusters)]
    return numbers


def weight_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """The shape of each weight, float32."""
    rows, last = sizes.cutoffs[0] + len(sizes.clusters) if sizes.cutoffs else sizes.vocabulary_size, sizes.layer_sizes[-1]
    shapes: dict[str, tuple[int, ...]] = {
        "embedding": (sizes.vocabulary_size, sizes.embedding_size),
        "projection_bias": (rows,),
    }
    if not sizes.tied:
        shapes["projection"] = (rows, last)
    for number, (length, words) in enumerate(sizes.clusters):
        shapes[f"cluster_{number}.narrow"] = (length, last)
        shapes[f"cluster_{number}.words"] = (words, length)
    for layer, (before, size) in enumerate(pairwise([sizes.embedding_size, *sizes.layer_sizes])):
        shapes[f"layer_{layer}.W"] = (1, 4 * size, before)
        shapes[f"layer_{layer}.R"] = (1, 4 * size, size)
        shapes[f"layer_{layer}.B"] = (1, 8 * size)
    return shapes


# --- the file ------------------------------------------------------------------------------------------------------

# Fields of ONNX's messages by their numbers, those that lmdist writes: a number, or bytes.
Fields = dict[int, tuple[str, type]]
MODEL: Fields = {
    1: ("ir_version", int),
    2: ("producer", memoryview),
    7: ("graph", memoryview),
    8: ("opset", memoryview),
    14: ("metadata", memoryview),
}
GRAPH: Fields = {
    1: ("nodes", memoryview),
    2: ("name", memoryview),
    5: ("weights", memoryview),
    11: ("inputs", memoryview),
    12: ("outputs", memoryview),
}
NODE: Fields = {
    1: ("inputs", memoryview),
    2: ("outputs", memoryview),
    3: ("name", memoryview),
    4: ("operator", memoryview),
    5: ("attributes", memoryview),
}
ATTRIBUTE: Fields = {1: ("name", memoryview), 3: ("number", int), 8: ("numbers", int), 20: ("type", int)}
TENSOR: Fields = {
    1: ("shape", int),
    2: ("type", int),
    8: ("name", memoryview),
    9: ("data", memoryview),
    13: ("outside", memoryview),
    14: ("is_outside", int),
}
OPERATORS: Fields = {1: ("domain", memoryview), 2: ("version", int)}
PAIR: Fields = {1: ("key", memoryview), 2: ("value", memoryview)}

FLOAT, INT64 = 1, 7  # types of tensors
ONE_NUMBER, SEVERAL_NUMBERS = 2, 7  # types of attributes
LONGEST_TEXT = 1 << 20
MOST_FIELDS = 1 << 16


class OtherGraphError(ValueError):
    """What a file holds is not what lmdist writes."""


def read_step_graph(path: Path) -> Sizes:
    """The sizes of a step graph; raises DataError where the file holds any other graph, or none."""
    if not size_of(path):
        raise DataError(f"{path} is empty; a step graph is expected")
    try:
        return checked(np.memmap(path, np.uint8, "r").data, path)
    except (OtherGraphError, OSError) as error:
        raise DataError(f"{path} is not a step graph as this lmdist writes it: {error}") from None


def checked(data: memoryview, path: Path) -> Sizes:
    """The sizes that the metadata of a model name; raises OtherGraphError unless it is the step graph of these sizes."""
    model = fields(data, MODEL)
    try:
        metadata = {key: json.loads(value) for key, value in pairs(model["metadata"]).items()}
    except (ValueError, RecursionError):
        raise OtherGraphError("its metadata are not JSON") from None
    check_version(metadata, (FORMAT, VERSION), path)
    metadata.setdefault("cutoffs", [])  # younger than the first bundles
    check_shape(metadata, Sizes, path)
    sizes = Sizes(**{name: metadata[name] for name in Sizes.__annotations__})
    if not sizes.layer_sizes or min(*sizes.layer_sizes, sizes.vocabulary_size, sizes.embedding_size) < 1:
        raise OtherGraphError("its metadata name sizes below 1")
    cuts = [0, *sizes.cutoffs, sizes.vocabulary_size]
    if cuts != sorted(set(cuts)) or (sizes.cutoffs and (sizes.tied or min(length for length, _ in sizes.clusters) < 1)):
        raise OtherGraphError("its metadata name clusters that no model has")
    operators = [fields(part, OPERATORS) for part in model["opset"]]
    if len(model["graph"]) != 1 or [(text(one["domain"]), one["version"]) for one in operators] != [("", [OPSET])]:
        raise OtherGraphError(f"it is not of opset {OPSET}")
    graph = fields(model["graph"][0], GRAPH)
    # A layer has several nodes: the table is not made where it is too long to be the graph's.
    longest = max(len(sizes.layer_sizes), len(sizes.cutoffs))
    if longest > len(graph["nodes"]) or [node_of(node) for node in graph["nodes"]] != step_nodes(sizes):
        raise OtherGraphError("its nodes are others")
    numbers, shapes = constants(sizes), weight_shapes(sizes)
    tensors = [fields(tensor, TENSOR) for tensor in graph["weights"]]
    if sorted(text(tensor["name"]) for tensor in tensors) != sorted([*numbers, *shapes]):
        raise OtherGraphError("its weights have other names")
    for tensor in tensors:
        name = text(tensor["name"])
        if name in numbers:
            kind, shape, size = INT64, (len(numbers[name]),), 8 * len(numbers[name])
            right = [bytes(part) for part in tensor["data"]] == [np.array(numbers[name], "<i8").tobytes()]
        else:
            kind, shape, size = FLOAT, shapes[name], 4 * math.prod(shapes[name])
            right = True
        right = right and tensor["type"] == [kind] and tensor["shape"] == list(shape)
        if not is_backed(tensor, size, path) or not right:
            raise OtherGraphError(f"{name} is not what the metadata say, or not as large")
    return sizes


def node_of(data: memoryview) -> Node:
    """A node, as the table has it."""
    node = fields(data, NODE)
    attributes = {}
    for part in node["attributes"]:
        attribute = fields(part, ATTRIBUTE)
        number, numbers, kind = attribute["number"], attribute["numbers"], attribute["type"]
        if (kind, len(number), len(numbers) > 0) not in (([ONE_NUMBER], 1, False), ([SEVERAL_NUMBERS], 0, True)):
            raise OtherGraphError("a node has attributes that are no numbers")
        attributes[text(attribute["name"])] = numbers or number[0]
    inputs, outputs = ([text([name]) for name in node[side]] for side in ("inputs", "outputs"))
    return Node(text(node["operator"]), inputs, outputs, attributes, text(node["name"]))


def is_backed(tensor: dict[str, list[Any]], size: int, path: Path) -> bool:
    """Whether so many bytes are there for a tensor: in the graph, or in the one file beside it that may hold weights."""
    if not tensor["outside"]:
        return [len(part) for part in tensor["data"]] == [size] and tensor["is_outside"] in ([], [0])
    where = {"offset": "0"} | pairs(tensor["outside"])
    if where.keys() != {"location", "offset", "length"} or where["location"] != data_file(path).name:
        raise OtherGraphError(f"it asks for weights from {reprlib.repr(where)}")
    offset = where["offset"]
    if tensor["data"] or where["length"] != str(size) or not (offset.isdecimal() and len(offset) < 20):
        return False
    return int(offset) + size <= size_of(data_file(path))


def data_file(path: Path) -> Path:
    """The file beside a graph that holds the weights beyond protobuf's limit."""
    return path.with_name(f"{path.name}.data")


# --- protobuf ------------------------------------------------------------------------------------------------------


def fields(data: memoryview, known: Fields) -> dict[str, list[Any]]:
    """The values of the fields of a message, each a list in the order of the message; raises OtherGraphError for others."""
    found: dict[str, list[Any]] = {name: [] for name, _ in known.values()}
    place = count = 0
    while place < len(data):
        tag, place = whole_number(data, place)
        value, place = whole_number(data, place)
        if tag & 7 == 2:  # bytes, of a length
            value, place = data[place : place + value], place + value
        name, kind = known.get(tag >> 3, ("", int))
        count += 1
        if not name or tag & 7 not in (0, 2) or not isinstance(value, kind) or place > len(data) or count > MOST_FIELDS:
            raise OtherGraphError(f"it has a field {tag >> 3} that is out of place")
        found[name].append(value)
    return found


def whole_number(data: memoryview, place: int) -> tuple[int, int]:
    """A number of 7 bits a byte, the lowest first, and where it ends."""
    value = 0
    for shift, byte in enumerate(data[place : place + 10]):
        value |= (byte & 127) << 7 * shift
        if byte < 128:
            return value, place + shift + 1
    raise OtherGraphError("it is cut short")


def text(parts: list[memoryview]) -> str:
    """A text field, which comes once or is empty."""
    if len(parts) > 1 or sum(map(len, parts)) > LONGEST_TEXT:
        raise OtherGraphError("it has a text that is too long")
    try:
        return b"".join(parts).decode()
    except UnicodeDecodeError:
        raise OtherGraphError("it has a text that is not UTF-8") from None


def pairs(parts: list[memoryview]) -> dict[str, str]:
    """Texts by their keys."""
    found = [fields(part, PAIR) for part in parts]
    result = {text(pair["key"]): text(pair["value"]) for pair in found}
    if len(result) < len(found):
        raise OtherGraphError("it says a thing twice, which others might read in another way")
    return result

"""Write ONNX's own file format: a graph is built node by node and serialized to the bytes that any runtime reads.

    graph = Graph("double")
    graph.input("x", FLOAT, ["batch", 3])
    graph.output(graph("Mul", "x", graph.constant(np.float32(2))), "y", FLOAT, ["batch", 3])
    model_of(graph, {"format": "an example"}).content

In the modules of this folder `g` is the graph in construction.

A machine that samples has no onnx, so its graphs are built by this module; lmdist-export writes the same bytes to files and has
onnx check them. This module knows protobuf and no model. The fields' numbers are those of onnx.proto3 of
https://github.com/onnx/onnx; weights are external data, in a file beside the graph.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, NamedTuple

import numpy as np

from lmdist import __version__

FLOAT, UINT8, INT8, INT32, INT64, BOOL, FLOAT16 = 1, 2, 3, 6, 7, 9, 10  # of tensors
TYPES = {
    FLOAT: np.dtype("<f4"),
    UINT8: np.dtype("u1"),
    INT8: np.dtype("i1"),
    INT32: np.dtype("<i4"),
    INT64: np.dtype("<i8"),
    BOOL: np.dtype("?"),
    FLOAT16: np.dtype("<f2"),
}
IR_VERSION = 8  # the file format that came with opset 17
OPSET = 17  # has all that the graphs need; every onnxruntime since 1.12 reads it
MICROSOFT = "com.microsoft"  # where onnxruntime keeps its own operators
MICROSOFT_OPERATORS = ("MatMulIntegerToFloat", "MatMulNBits")

Shape = Sequence[int | str]
"""The length of each axis, or the name of a free length."""


def length_of(kind: int, shape: Sequence[int]) -> int:
    """Return the bytes of a tensor."""
    return math.prod(shape) * TYPES[kind].itemsize


class Graph:
    """A graph in construction: `graph("Add", a, b)` adds a node and returns the name of its output.

    A subgraph (the body of a Loop or a Scan) sees all names of the outer graph and keeps its constants there.
    """

    def __init__(self, name: str, outer: Graph | None = None, doc: str = "", docs: Mapping[str, str] | None = None) -> None:
        """`doc` is a sentence about the graph, `docs` has one for each of its inputs and outputs."""
        self.name = name
        self.outer = outer
        self.doc = doc
        self.docs = docs or {}
        self.part = outer.part if outer else ""
        """What the names of new nodes begin with."""
        self.nodes: list[tuple[str, str, Sequence[str], list[str], Mapping[str, Any]]] = []
        """The part, operator, inputs, outputs and attributes of each node."""
        self.inputs: list[bytes] = []
        self.outputs: list[bytes] = []
        self.tensors: list[bytes] = outer.tensors if outer else []
        self.weights: list[str] = outer.weights if outer else []
        """The names of the tensors that lie in a file beside the graph."""
        self.constants: dict[tuple[Any, ...], str] = outer.constants if outer else {}
        self.numbers: count[int] = outer.numbers if outer else count()
        self.renamed: dict[str, str] = outer.renamed if outer else {}
        """The names of values that are outputs, by the names under which nodes have them."""

    def subgraph(self, name: str) -> Graph:
        """Return a new subgraph of this graph."""
        return Graph(name, self)

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """Name the nodes that are added inside by the part of the graph that they are in: "layer_0/Gemm_8"."""
        before, self.part = self.part, f"{self.part}{part}/"
        try:
            yield
        finally:
            self.part = before

    def input(self, name: str, kind: int, shape: Shape) -> str:
        """Declare an input and return its name."""
        self.inputs.append(value_info(name, kind, shape, self.docs.get(name, "")))
        return name

    def output(self, value: str, name: str, kind: int, shape: Shape) -> None:
        """Declare `value` as the output `name`.

        A node's output gets that name; all else is copied: what comes from outside the graph, or is an output already.
        """
        if value not in self.renamed and any(value in outputs for *_, outputs, _ in self.nodes):
            self.renamed[value] = name
        else:
            self.nodes.append((self.part, "Identity", [value], [name], {}))
        self.outputs.append(value_info(name, kind, shape, self.docs.get(name, "")))

    def weight(self, name: str, kind: int, shape: Sequence[int], location: str, offset: int) -> str:
        """Declare a tensor in the file `location` beside the graph and return its name."""
        where = {"location": location, "offset": str(offset), "length": str(length_of(kind, shape))}
        outside = [(13, pair(key, value)) for key, value in where.items()]
        self.tensors.append(message([*((1, size) for size in shape), (2, kind), (8, name), *outside, (14, 1)]))
        self.weights.append(name)
        return name

    def constant(self, value: Any) -> str:
        """Return the name of a constant tensor: int64 of Python's integers, float32 of floats, else of the array's type."""
        array = np.asarray(value)
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.constants:
            name = f"constant_{len(self.constants)}"
            kind = next(kind for kind, dtype in TYPES.items() if dtype == array.dtype)
            self.tensors.append(message([*((1, size) for size in array.shape), (2, kind), (8, name), (9, array.tobytes())]))
            self.constants[key] = name
        return self.constants[key]

    def __call__(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Add a node with one output and return its name. An input that is left out is ""."""
        return self.several(operator, 1, *inputs, **attributes)[0]

    def several(self, operator: str, outputs: int, *inputs: str, **attributes: Any) -> list[str]:
        """Add a node with several outputs and return their names."""
        while inputs and not inputs[-1]:  # OpenVINO takes a last input "" for a value of unknown rank
            inputs = inputs[:-1]
        names = [f"{operator}_{next(self.numbers)}" for _ in range(outputs)]
        self.nodes.append((self.part, operator, inputs, names, attributes))
        return names

    def encoded(self) -> bytes:
        """Return the graph as a protobuf message."""
        nodes = (
            node(part, operator, map(self.final_name, inputs), map(self.final_name, outputs), attributes)
            for part, operator, inputs, outputs, attributes in self.nodes
        )
        return message(
            [
                *((1, part) for part in nodes),
                (2, self.name),
                *((5, part) for part in (self.tensors if self.outer is None else [])),
                *([(10, self.doc)] if self.doc else []),
                *((11, part) for part in self.inputs),
                *((12, part) for part in self.outputs),
            ]
        )

    def final_name(self, value: str) -> str:
        """Return the name that a value has in the file."""
        return self.renamed.get(value, value)


class OnnxModel(NamedTuple):
    """A graph as a runtime takes it."""

    content: bytes
    """Of its file."""
    weights: Sequence[str]
    """The names of the tensors that lie in a file beside it."""


def model_of(graph: Graph, metadata: Mapping[str, str]) -> OnnxModel:
    """Return a graph with metadata that a runtime can read."""
    content = message(
        [
            (1, IR_VERSION),
            (2, "lmdist"),
            (3, __version__),
            *([(6, graph.doc)] if graph.doc else []),
            (7, graph.encoded()),
            (8, message([(1, ""), (2, OPSET)])),
            (8, message([(1, MICROSOFT), (2, 1)])),
            *((14, pair(key, value)) for key, value in metadata.items()),
        ]
    )
    return OnnxModel(content, graph.weights)


def node(part: str, operator: str, inputs: Iterable[str], outputs: Iterable[str], attributes: Mapping[str, Any]) -> bytes:
    """Return a node as a protobuf message; `part` and its first output are its name."""
    outputs = list(outputs)
    return message(
        [
            *((1, name) for name in inputs),
            *((2, name) for name in outputs),
            (3, f"{part}{outputs[0]}"),
            (4, operator),
            *((5, attribute(name, value)) for name, value in attributes.items()),
            (7, MICROSOFT if operator in MICROSOFT_OPERATORS else ""),
        ]
    )


def attribute(name: str, value: float | str | Sequence[int] | Graph) -> bytes:
    """Return an attribute of a node: a number, a string, integers, or a graph."""
    if isinstance(value, Graph):
        return message([(1, name), (6, value.encoded()), (20, 5)])
    if isinstance(value, float):
        return message([(1, name), (2, value), (20, 1)])
    if isinstance(value, int):
        return message([(1, name), (3, value), (20, 2)])
    if isinstance(value, str):
        return message([(1, name), (4, value), (20, 3)])
    return message([(1, name), *((8, number) for number in value), (20, 7)])


def value_info(name: str, kind: int, shape: Shape, doc: str) -> bytes:
    """Return the name, type and axes of an input or output, and a sentence about it, if there is one."""
    axes = message([(1, message([(1 if isinstance(axis, int) else 2, axis)])) for axis in shape])
    return message([(1, name), (2, message([(1, message([(1, kind), (2, axes)]))])), *([(3, doc)] if doc else [])])


def pair(key: str, value: str) -> bytes:
    """Return a string under a key."""
    return message([(1, key), (2, value)])


def message(fields: Iterable[tuple[int, int | float | str | bytes]]) -> bytes:
    """Return fields by their numbers, as protobuf writes them: a varint, a 32-bit float, or bytes with their length."""
    parts: list[bytes] = []
    for number, value in fields:
        if isinstance(value, float):
            parts += [varint(number << 3 | 5), struct.pack("<f", value)]
        elif isinstance(value, int):
            parts += [varint(number << 3), varint(value & (1 << 64) - 1)]
        else:
            data = value.encode() if isinstance(value, str) else value
            parts += [varint(number << 3 | 2), varint(len(data)), data]
    return b"".join(parts)


def varint(value: int) -> bytes:
    """Return an integer of at least 0 as a varint: 7 bits a byte, the lowest first."""
    result = bytearray()
    while value > 127:
        result.append(value & 127 | 128)
        value >>= 7
    result.append(value)
    return bytes(result)

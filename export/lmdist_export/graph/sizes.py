"""The sizes of a model and the layout of its weights' file: which tensors it has, and where each one lies.

Both follow from the sizes in a bundle's manifest, so nothing in a bundle decides where its weights are read. This module reads
no file.

Shapes: V vocabulary (V' rounded up to whole blocks), E embedding, H a layer's size, S the sum of the layers' sizes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmdist_export.graph.cell import layer_shapes
from lmdist_export.graph.onnx_file import FLOAT, FLOAT16, INT8, TYPES, UINT8, length_of

BLOCK = 256  # tokens whose probabilities are summed first: sampling then looks at V/256 sums and at 256 tokens
NBITS_BLOCK = 64  # 4-bit weights that share a scale: 128 is not faster, 32 is
ALIGNMENT = 4096  # of weights in their file, so that they can be memory-mapped


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model and the precision of its weights: all that decides a graph, the weights' values aside."""

    layer_sizes: list[int]
    vocabulary_size: int
    embedding_size: int
    tied: bool
    precision: str = "fp32"
    cutoffs: list[int] = field(default_factory=list)
    """The first id of each cluster of rarer tokens; none without an adaptive head."""

    @property
    def clusters(self) -> list[tuple[int, int]]:
        """Return the projection's size, a quarter of the one before, and the number of tokens of each cluster."""
        ends = [*self.cutoffs, self.vocabulary_size]
        return [(self.layer_sizes[-1] >> 2 * number, end - start) for number, (start, end) in enumerate(pairwise(ends), 1)]

    @property
    def state_size(self) -> int:
        """Return S: the layers' states lie side by side."""
        return sum(self.layer_sizes)

    @property
    def padded(self) -> int:
        """Return V': the vocabulary in whole blocks. The logits of the padding are -inf."""
        return math.ceil(self.vocabulary_size / BLOCK) * BLOCK

    @property
    def is_quantized(self) -> bool:
        """Return whether weights are integers with per-channel scales."""
        return self.precision in ("int8", "int4")


@dataclass(frozen=True)
class Weight:
    """A tensor in the file of weights: its type, its shape and its offset in bytes."""

    kind: int
    shape: tuple[int, ...]
    offset: int

    @property
    def length(self) -> int:
        """Return its bytes."""
        return length_of(self.kind, self.shape)

    @property
    def end(self) -> int:
        """Return the offset of the byte behind it."""
        return self.offset + self.length

    def read(self, content: NDArray[np.uint8]) -> NDArray[Any]:
        """Return the tensor as a view of the file's bytes."""
        return content[self.offset : self.end].view(TYPES[self.kind]).reshape(self.shape)


def weights(sizes: Sizes) -> dict[str, Weight]:
    """Return the weights in the order of their file.

    Quantized matrices are stored as their kernels take them: int8 as (inputs, outputs) with a scale for each output, 4 bits as
    MatMulNBits takes them. Others are (outputs, inputs). Gates are in ONNX's order (cell.py).
    """
    float_kind = FLOAT16 if sizes.precision == "fp16" else FLOAT
    tensors: dict[str, tuple[int, tuple[int, ...]]] = {}
    for name, shape in parameter_shapes(sizes).items():
        if len(shape) == 1:
            tensors[name] = FLOAT, shape
        elif sizes.precision == "int4" and name == "projection":
            blocks = math.ceil(shape[1] / NBITS_BLOCK)
            tensors[name] = UINT8, (shape[0], blocks, NBITS_BLOCK // 2)
            tensors[f"{name}.scale"] = FLOAT, (shape[0] * blocks,)
        elif sizes.is_quantized:
            tensors[name] = INT8, shape[::-1]
            tensors[f"{name}.scale"] = FLOAT, (shape[0],)
        else:
            tensors[name] = float_kind, shape
    embedding = sizes.vocabulary_size, sizes.embedding_size
    if sizes.is_quantized:
        tensors["embedding"] = UINT8, embedding
        tensors["embedding.scale"] = FLOAT, (sizes.vocabulary_size, 1)
    elif not sizes.tied:
        tensors["embedding"] = float_kind, embedding
    lengths = (math.ceil(length_of(*tensor) / ALIGNMENT) * ALIGNMENT for tensor in tensors.values())
    table = {
        name: Weight(*tensors[name], offset) for name, offset in zip(tensors, accumulate(lengths, initial=0), strict=False)
    }
    if "embedding" not in table:  # the rows of the projection, its padding aside
        table["embedding"] = Weight(float_kind, embedding, table["projection"].offset)
    return table


def parameter_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all parameters but the embedding, matrices as (outputs, inputs)."""
    last = sizes.layer_sizes[-1]
    outputs = sizes.cutoffs[0] + len(sizes.clusters) if sizes.cutoffs else sizes.padded
    shapes: dict[str, tuple[int, ...]] = {"projection": (outputs, last), "projection.bias": (outputs,)}
    for number, (length, num_tokens) in enumerate(sizes.clusters):
        shapes[f"cluster_{number}.narrow"] = length, last
        shapes[f"cluster_{number}.words"] = num_tokens, length
    for layer, (input_size, size) in enumerate(pairwise([sizes.embedding_size, *sizes.layer_sizes])):
        shapes |= {f"layer_{layer}.{name}": shape for name, shape in layer_shapes(input_size, size).items()}
    return shapes


def file_length(sizes: Sizes) -> int:
    """Return the bytes of the file of weights."""
    return max(weight.end for weight in weights(sizes).values())

"""The sizes of a model and the file of its weights: which tensors it has, and where each one lies.

Shapes: V vocabulary (V' rounded up to whole blocks), E embedding, H a layer's size, S the sum of the layers' sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from lmdist_export.graph.onnx_file import FLOAT, FLOAT16, INT8, UINT8

BLOCK = 256  # words whose probabilities are summed first, so that a draw looks at V/256 sums and then at 256 words
NBITS_BLOCK = 64  # 4-bit weights that share a scale: 128 is not faster, 32 is
ALIGNMENT = 4096  # of weights in their file, so that they can be mapped


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

"""Write a model's weights as a bundle's file, quantized if the precision says so, and beside it the graphs, which onnx checks.

This module knows neither what the graphs compute (lmdist_export/graph) nor what a precision costs (verify.py). `lmdist-export`
runs it.

Shapes: V vocabulary (V' rounded up to whole blocks), E embedding, H a layer's size, N rows, K columns.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from torch import Tensor, nn

from lmdist.model.language_model import LanguageModel
from lmdist_export.bundle import GENERATION_GRAPH, STEP_GRAPH, WEIGHTS
from lmdist_export.graph.cell import layer_weights
from lmdist_export.graph.graphs import generation_graph, step_graph
from lmdist_export.graph.network import Target
from lmdist_export.graph.onnx_file import FLOAT16, INT8, TYPES, UINT8
from lmdist_export.graph.sizes import NBITS_BLOCK, Sizes, file_length, weights
from lmdist_export.options import EVERY_FEATURE


def sizes_of(model: LanguageModel, precision: str) -> Sizes:
    """Return the sizes of a model whose weights are stored in `precision`."""
    projection = model.projection
    cutoffs = projection.cutoffs[:-1] if isinstance(projection, nn.AdaptiveLogSoftmaxWithLoss) else []
    settings = model.settings
    return Sizes(model.layer_sizes, model.vocabulary_size, settings.embedding_size, settings.tied, precision, cutoffs)


def write_graphs(model: LanguageModel, folder: Path, run: str, precision: str = "fp32") -> Sizes:
    """Write the weights of `model` and its graphs into `folder`; `run` is the name in their metadata."""
    sizes = sizes_of(model, precision)
    write_weights(model, folder / WEIGHTS, sizes)
    target = Target(WEIGHTS)
    (folder / STEP_GRAPH).write_bytes(step_graph(sizes, target, run).content)
    (folder / GENERATION_GRAPH).write_bytes(generation_graph(sizes, EVERY_FEATURE, target, run).content)
    for name in (STEP_GRAPH, GENERATION_GRAPH):
        onnx.checker.check_model(folder / name, full_check=True)
    return sizes


def write_weights(model: LanguageModel, path: Path, sizes: Sizes) -> None:
    """Write the file of weights by the table of graph/sizes.py."""
    table = weights(sizes)
    with path.open("wb") as file:
        file.truncate(file_length(sizes))  # the gaps between tensors too
        for name, values in float_weights(model, sizes).items():
            for part, stored in in_precision(name, values, table[name].kind).items():
                assert stored.shape == table[part].shape, (part, stored.shape, table[part].shape)
                file.seek(table[part].offset)
                file.write(np.ascontiguousarray(stored, TYPES[table[part].kind]).data)


def float_weights(model: LanguageModel, sizes: Sizes) -> dict[str, NDArray[np.float32]]:
    """Return the weights in fp32, matrices as (outputs, inputs)."""
    projection = model.projection
    found: dict[str, NDArray[np.float32]] = {}
    if isinstance(projection, nn.AdaptiveLogSoftmaxWithLoss):
        for number, (narrow, words) in enumerate(projection.tail):  # type: ignore[misc]
            found[f"cluster_{number}.narrow"] = array(narrow.weight)
            found[f"cluster_{number}.words"] = array(words.weight)
        found["projection"], found["projection.bias"] = array(projection.head.weight), array(projection.head.bias)
    else:
        padding = sizes.padded - sizes.vocabulary_size
        found["projection"] = np.pad(array(projection.weight), ((0, padding), (0, 0)))  # (V', H)
        # The padding has the probability 0.
        found["projection.bias"] = np.pad(array(projection.bias), (0, padding), constant_values=-np.inf)  # (V')
    for layer, module in enumerate(model.layers):
        parameters = {name: array(value) for name, value in module.named_parameters()}
        found |= {f"layer_{layer}.{name}": values for name, values in layer_weights(parameters).items()}
    if not sizes.tied or sizes.is_quantized:
        found["embedding"] = array(model.embedding.weight)  # (V, E)
    return found


def in_precision(name: str, values: NDArray[np.float32], kind: int) -> dict[str, NDArray[np.generic]]:
    """Return the tensors that store a weight as the type `kind`: itself, or integers and their scales."""
    if name == "embedding" and kind == UINT8:
        integers, scale = quantize_int8(values)
        # The matrix multiplication takes 127 for 1 (Network.quantize), so a row's scale is the value of its 127.
        return {name: (integers.astype(np.int16) + 128).astype(np.uint8), f"{name}.scale": 127 * scale[:, None]}
    if kind == UINT8:
        integers, scale = quantize_int4(values)
        return {name: integers, f"{name}.scale": scale}
    if kind == INT8:
        integers, scale = quantize_int8(values)
        return {name: integers.T, f"{name}.scale": scale}
    return {name: values.astype(np.float16) if kind == FLOAT16 else values}


def quantize_int8(rows: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return each row (N, K) as integers from -127 to 127, and its scale (N)."""
    scale = np.abs(rows).max(axis=1) / 127
    scale[scale == 0] = 1
    return np.round(rows / scale[:, None]).astype(np.int8), scale


def quantize_int4(rows: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Return each row (N, K) as MatMulNBits stores it: two integers a byte, in blocks of K, and the scale of each block.

    An integer is from 0 to 15, with the zero point 8. A scale's sign turns the largest value of its block into 0, because there
    is one more integer below 8 than above.
    """
    count = len(rows)
    blocks = math.ceil(rows.shape[1] / NBITS_BLOCK)
    padded = np.pad(rows, ((0, 0), (0, blocks * NBITS_BLOCK - rows.shape[1]))).reshape(count, blocks, NBITS_BLOCK)
    largest = np.take_along_axis(padded, np.abs(padded).argmax(axis=2, keepdims=True), axis=2)  # with its sign
    scale = np.where(largest == 0, 1, largest / -8).astype(np.float32)
    integers = np.clip(np.round(padded / scale) + 8, 0, 15).astype(np.uint8)
    return integers[..., 0::2] | np.left_shift(integers[..., 1::2], np.uint8(4)), scale.reshape(-1)


def array(parameter: Tensor) -> NDArray[np.float32]:
    """Return a parameter as an array of numpy."""
    return parameter.detach().float().numpy()

"""A checkpoint's weights become the file of weights of a bundle, and the graphs beside it, which onnx checks.

Where weights are stored with fewer bits, that is here. What the graphs are is said in graph.py, what their weights cost is
found by verify.py. `lmdist-export` (export.py) runs it.

Shapes: V vocabulary (V' rounded up to whole blocks), E embedding, H a layer's size.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from torch import Tensor, nn

from lmdist.model.language_model import LanguageModel
from lmdist_export.bundle import GENERATION, MODEL, WEIGHTS
from lmdist_export.graph.graphs import generation_graph, step_graph
from lmdist_export.graph.onnx_file import FLOAT16, INT8, TYPES, UINT8
from lmdist_export.graph.sizes import NBITS_BLOCK, Sizes, file_length, weights
from lmdist_export.options import EVERY_FEATURE


def sizes_of(model: LanguageModel, precision: str) -> Sizes:
    """The sizes of a model whose weights are to be stored in `precision`."""
    projection = model.projection
    cutoffs = projection.cutoffs[:-1] if isinstance(projection, nn.AdaptiveLogSoftmaxWithLoss) else []
    settings = model.settings
    return Sizes(model.layer_sizes, model.vocabulary_size, settings.embedding_size, settings.tied, precision, cutoffs)


def write_graphs(model: LanguageModel, folder: Path, run: str, precision: str = "fp32") -> Sizes:
    """Write the weights of `model` and the graphs that use them into `folder`; `run` is the name to remember."""
    sizes = sizes_of(model, precision)
    write_weights(model, folder / WEIGHTS, sizes)
    (folder / MODEL).write_bytes(step_graph(sizes, WEIGHTS, run))
    (folder / GENERATION).write_bytes(generation_graph(sizes, EVERY_FEATURE, WEIGHTS, run))
    for name in (MODEL, GENERATION):
        onnx.checker.check_model(folder / name, full_check=True)
    return sizes


def write_weights(model: LanguageModel, path: Path, sizes: Sizes) -> None:
    """Write the file of weights as the table of graph.py has it."""
    plain = plain_weights(model, sizes)
    table = weights(sizes)
    with path.open("wb") as file:
        file.truncate(file_length(sizes))  # also where nothing is written: between tensors
        for name, values in plain.items():
            for part, stored in in_precision(name, values, table[name].kind).items():
                assert stored.shape == table[part].shape, (part, stored.shape, table[part].shape)
                file.seek(table[part].offset)
                file.write(np.ascontiguousarray(stored, TYPES[table[part].kind]).data)


def plain_weights(model: LanguageModel, sizes: Sizes) -> dict[str, NDArray[np.float32]]:
    """The weights in fp32, matrices as (outputs, inputs), gates in ONNX's order."""
    projection = model.projection
    found: dict[str, NDArray[np.float32]] = {}
    if isinstance(projection, nn.AdaptiveLogSoftmaxWithLoss):
        for number, (narrow, words) in enumerate(projection.tail):  # type: ignore[misc]
            found[f"cluster_{number}.narrow"] = array(narrow.weight)
            found[f"cluster_{number}.words"] = array(words.weight)
        found["projection"], found["projection.bias"] = array(projection.head.weight), array(projection.head.bias)
    else:
        beyond = sizes.padded - sizes.vocabulary_size
        found["projection"] = np.pad(array(projection.weight), ((0, beyond), (0, 0)))  # (V', H)
        # What is no word has the probability 0.
        found["projection.bias"] = np.pad(array(projection.bias), (0, beyond), constant_values=-np.inf)  # (V')
    for layer, module in enumerate(model.layers):
        parameters = {name: input_output_forget_cell(array(value)) for name, value in module.named_parameters()}
        found[f"layer_{layer}.input"] = parameters["weight_ih_l0"]  # (4H, E)
        found[f"layer_{layer}.hidden"] = parameters["weight_hh_l0"]  # (4H, H)
        found[f"layer_{layer}.bias"] = parameters["bias_ih_l0"] + parameters["bias_hh_l0"]  # (4H)
    if not sizes.tied or sizes.whole:
        found["embedding"] = array(model.embedding.weight)  # (V, E)
    return found


def in_precision(name: str, values: NDArray[np.float32], kind: int) -> dict[str, NDArray[np.generic]]:
    """The tensors that hold a weight of the type `kind`: itself, or whole numbers and their scales."""
    if name == "embedding" and kind == UINT8:
        whole, scale = eight_bits(values)
        # A product takes 127 for 1 (graph.py), so that a row's scale is that of its 127.
        return {name: (whole.astype(np.int16) + 128).astype(np.uint8), f"{name}.scale": 127 * scale[:, None]}
    if kind == UINT8:
        whole, scale = four_bits(values)
        return {name: whole, f"{name}.scale": scale}
    if kind == INT8:
        whole, scale = eight_bits(values)
        return {name: whole.T, f"{name}.scale": scale}
    return {name: values.astype(np.float16) if kind == FLOAT16 else values}


def eight_bits(rows: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Each row (N, K) as whole numbers from -127 to 127, and its scale (N): what one of them is worth."""
    scale = np.abs(rows).max(axis=1) / 127
    scale[scale == 0] = 1
    return np.round(rows / scale[:, None]).astype(np.int8), scale


def four_bits(rows: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Each row (N, K) as MatMulNBits stores it: two numbers a byte, in blocks of K, and the scale of each block.

    A number is from 0 to 15 and 8 means zero. The scale has the sign that turns a block's largest number into 0, since there
    is one more below 8 than above.
    """
    count = len(rows)
    blocks = math.ceil(rows.shape[1] / NBITS_BLOCK)
    padded = np.pad(rows, ((0, 0), (0, blocks * NBITS_BLOCK - rows.shape[1]))).reshape(count, blocks, NBITS_BLOCK)
    largest = np.take_along_axis(padded, np.abs(padded).argmax(axis=2, keepdims=True), axis=2)  # with its sign
    scale = np.where(largest == 0, 1, largest / -8).astype(np.float32)
    whole = np.clip(np.round(padded / scale) + 8, 0, 15).astype(np.uint8)
    return whole[..., 0::2] | np.left_shift(whole[..., 1::2], np.uint8(4)), scale.reshape(-1)


def array(parameter: Tensor) -> NDArray[np.float32]:
    """A parameter as numpy sees it."""
    return parameter.detach().float().numpy()


def input_output_forget_cell(parameter: NDArray[np.float32]) -> NDArray[np.float32]:
    """Put the four gates (4H, ...) from torch's order, input forget cell output, into ONNX's."""
    input_gate, forget_gate, cell, output_gate = np.split(parameter, 4)
    return np.concatenate([input_gate, output_gate, forget_gate, cell])

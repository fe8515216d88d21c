"""From a bundle back to a model of torch: what weights.py writes, in any precision, so that training can start from it.

A quantized weight becomes the number that it stands for, and torch's two biases of a layer their sum and zeros. No graph is
opened. This module does not know what the model is for.

Shapes: V vocabulary (V' rounded up to whole blocks), H a layer's size, N rows, K columns.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lmdist.errors import DataError
from lmdist.model.language_model import LanguageModel
from lmdist.settings import ModelSettings
from lmdist_export.bundle import WEIGHTS, Bundle
from lmdist_export.graph.cell import torch_parameters
from lmdist_export.graph.onnx_file import FLOAT, FLOAT16, UINT8
from lmdist_export.graph.sizes import NBITS_BLOCK, Sizes, parameter_shapes, weights


def load_model(bundle: Bundle) -> LanguageModel:
    """Return the model of a bundle, on the CPU and in evaluation mode.

    Raise DataError for sizes that no model of lmdist has, and for numbers that are not finite.
    """
    sizes = bundle.sizes
    settings = ModelSettings(
        sizes.embedding_size,
        sizes.layer_sizes[0],
        len(sizes.layer_sizes),
        dropout=0.0,
        tied=sizes.tied,
        head="adaptive" if sizes.cutoffs else "full",
    )
    if settings.layer_sizes != sizes.layer_sizes:
        raise DataError(f"{bundle.name} is a model with layers of {sizes.layer_sizes}, which lmdist does not train")
    model = LanguageModel(settings, sizes.vocabulary_size)
    if isinstance(model.projection, nn.AdaptiveLogSoftmaxWithLoss) and model.projection.cutoffs[:-1] != sizes.cutoffs:
        raise DataError(f"{bundle.name} has an adaptive head with clusters from {sizes.cutoffs}, which lmdist does not train")
    found = torch_weights(float_weights(bundle), sizes)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if not found[name].isfinite().all():
                raise DataError(f"{Path(bundle.name) / WEIGHTS} holds numbers that are not finite")
            value.copy_(found[name])
    return model.eval()


def torch_weights(stored: dict[str, NDArray[np.float32]], sizes: Sizes) -> dict[str, Tensor]:
    """Return the parameters of torch's model by name, from the weights of a bundle."""
    named = {"embedding.weight": stored["embedding"]}
    if sizes.cutoffs:
        named |= {"projection.head.weight": stored["projection"], "projection.head.bias": stored["projection.bias"]}
        for number in range(len(sizes.cutoffs)):
            named[f"projection.tail.{number}.0.weight"] = stored[f"cluster_{number}.narrow"]
            named[f"projection.tail.{number}.1.weight"] = stored[f"cluster_{number}.words"]
    else:
        named["projection.weight"] = stored["projection"][: sizes.vocabulary_size]
        named["projection.bias"] = stored["projection.bias"][: sizes.vocabulary_size]
    for layer in range(len(sizes.layer_sizes)):
        prefix = f"layer_{layer}."
        own = {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}
        named |= {f"layers.{layer}.{name}": value for name, value in torch_parameters(own).items()}
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in named.items()}


def float_weights(bundle: Bundle) -> dict[str, NDArray[np.float32]]:
    """Return the weights of a bundle in fp32 by the names of graph/sizes.py, matrices as (outputs, inputs)."""
    table = weights(bundle.sizes)
    file = np.frombuffer(bundle.weights, np.uint8)
    stored = {name: weight.read(file) for name, weight in table.items()}
    found: dict[str, NDArray[np.float32]] = {}
    for name in [*parameter_shapes(bundle.sizes), "embedding"]:
        kind, values = table[name].kind, stored[name]
        if kind in (FLOAT, FLOAT16):
            found[name] = values.astype(np.float32)
        elif kind != UINT8:
            found[name] = values.T.astype(np.float32) * stored[f"{name}.scale"][:, None]
        elif name == "embedding":  # its scale is the value of 127
            found[name] = ((values.astype(np.float32) - 128) * (stored[f"{name}.scale"] / 127)).astype(np.float32)
        else:
            found[name] = dequantized_int4(values, stored[f"{name}.scale"])[:, : bundle.sizes.layer_sizes[-1]]
    return found


def dequantized_int4(values: NDArray[np.uint8], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the rows (N, K padded to whole blocks) that MatMulNBits stores as two integers a byte, 8 being zero."""
    integers = np.stack([values & 15, values >> 4], axis=-1).astype(np.float32)  # (N, blocks, NBITS_BLOCK / 2, 2)
    count, blocks = values.shape[:2]
    rows = (integers.reshape(count, blocks, NBITS_BLOCK) - 8) * scale.reshape(count, blocks, 1)
    return rows.reshape(count, -1).astype(np.float32)

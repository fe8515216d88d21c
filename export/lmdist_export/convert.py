"""A checkpoint's weights become the ONNX step graph: words and state in, logits and state out.

    tokens (B, T) --Gather--> LSTM --> LSTM --> ... --> Gemm --> logits (B, T, V)
                               ^ |      ^ |
    h, c (B, S) ----Split------' |------' |----Concat--> next_h, next_c (B, S)

The graph is built straight from the weights, because torch's exporters freeze its length or are deprecated. It does
not know whether it is right: verify.py finds out. `lmdist-export` (export.py) runs it.

Shapes: B rows, T words, V vocabulary, E embedding, H a layer's size, S the sum of the layers' sizes.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from lmdist.model import LanguageModel
from lmdist.vocabulary import END_ID, UNKNOWN_ID
from lmdist_export.bundle import GRAPH_FORMAT, GRAPH_VERSION

OPSET = 17  # has all that the graph needs; every onnxruntime since 1.12 reads it
IR_VERSION = 8  # the file format that came with that opset
PROTOBUF_LIMIT = 2**31 - 2**24  # protobuf ends at 2 GiB; 16 MiB are left for the nodes


def write_step_graph(model: LanguageModel, path: Path, run: str) -> None:
    """Write the step graph of `model` to `path`; weights beyond protobuf's limit lie in `path`.data beside it."""
    graph = step_graph(model, run)
    # Not ByteSize(): it fails beyond the limit.
    weights = sum(len(initializer.raw_data) for initializer in graph.graph.initializer)
    data = f"{path.name}.data"
    onnx.save_model(graph, path, save_as_external_data=weights > PROTOBUF_LIMIT, location=data)
    onnx.checker.check_model(path, full_check=True)


def step_graph(model: LanguageModel, run: str) -> onnx.ModelProto:
    """The step graph of `model` with all that a runtime must know in its metadata; `run` is the name to remember."""
    sizes = model.layer_sizes
    state_size = sum(sizes)
    weights = {
        "embedding": array(model.embedding.weight),  # (V, E)
        "projection_bias": array(model.projection.bias),  # (V)
        "state_sizes": np.array(sizes, dtype=np.int64),
        "vocabulary_size": np.array([model.vocabulary_size], dtype=np.int64),
        "rows_of_hidden": np.array([-1, sizes[-1]], dtype=np.int64),
        "axis_0": np.array([0], dtype=np.int64),
        "axis_1": np.array([1], dtype=np.int64),
    }
    projection = "embedding"
    if not model.settings.tied:
        projection = "projection"
        weights[projection] = array(model.projection.weight)  # (V, H)

    layers = range(len(sizes))
    nodes = [
        helper.make_node("Gather", ["embedding", "tokens"], ["embedded"]),  # (B, T, E)
        helper.make_node("Transpose", ["embedded"], ["inputs_0"], perm=[1, 0, 2]),  # (T, B, E)
        helper.make_node("Split", ["h", "state_sizes"], [f"h_{layer}" for layer in layers], axis=1),  # (B, H) each
        helper.make_node("Split", ["c", "state_sizes"], [f"c_{layer}" for layer in layers], axis=1),  # (B, H) each
    ]
    for layer, module in enumerate(model.layers):
        parameters = {name: input_output_forget_cell(array(value)) for name, value in module.named_parameters()}
        name = f"layer_{layer}"
        weights[f"{name}.W"] = parameters["weight_ih_l0"][None]  # (1, 4H, E)
        weights[f"{name}.R"] = parameters["weight_hh_l0"][None]  # (1, 4H, H)
        weights[f"{name}.B"] = np.concatenate([parameters["bias_ih_l0"], parameters["bias_hh_l0"]])[None]  # (1, 8H)
        nodes += [
            helper.make_node("Unsqueeze", [f"h_{layer}", "axis_0"], [f"{name}.h"]),  # (1, B, H)
            helper.make_node("Unsqueeze", [f"c_{layer}", "axis_0"], [f"{name}.c"]),  # (1, B, H)
            helper.make_node(
                "LSTM",
                [f"inputs_{layer}", f"{name}.W", f"{name}.R", f"{name}.B", "", f"{name}.h", f"{name}.c"],
                [f"{name}.Y", f"{name}.Y_h", f"{name}.Y_c"],  # (T, 1, B, H), (1, B, H), (1, B, H)
                name=name,
                hidden_size=sizes[layer],
            ),
            helper.make_node("Squeeze", [f"{name}.Y", "axis_1"], [f"inputs_{layer + 1}"]),  # (T, B, H)
            helper.make_node("Squeeze", [f"{name}.Y_h", "axis_0"], [f"next_h_{layer}"]),  # (B, H)
            helper.make_node("Squeeze", [f"{name}.Y_c", "axis_0"], [f"next_c_{layer}"]),  # (B, H)
        ]
    nodes += [
        helper.make_node("Concat", [f"next_h_{layer}" for layer in layers], ["next_h"], axis=1),  # (B, S)
        helper.make_node("Concat", [f"next_c_{layer}" for layer in layers], ["next_c"], axis=1),  # (B, S)
        helper.make_node("Transpose", [f"inputs_{len(sizes)}"], ["hidden"], perm=[1, 0, 2]),  # (B, T, H)
        # Gemm reads the tied matrix as it lies. MatMul would need a second, transposed copy of it.
        helper.make_node("Reshape", ["hidden", "rows_of_hidden"], ["hidden_rows"]),  # (B*T, H)
        helper.make_node("Gemm", ["hidden_rows", projection, "projection_bias"], ["logits_rows"], transB=1),  # (B*T, V)
        helper.make_node("Shape", ["tokens"], ["rows_and_words"]),
        helper.make_node("Concat", ["rows_and_words", "vocabulary_size"], ["logits_shape"], axis=0),
        helper.make_node("Reshape", ["logits_rows", "logits_shape"], ["logits"]),  # (B, T, V)
    ]
    state = ["batch", state_size]
    graph = helper.make_graph(
        nodes,
        "lmdist_step",
        inputs=[
            helper.make_tensor_value_info("tokens", TensorProto.INT64, ["batch", "time"]),
            helper.make_tensor_value_info("h", TensorProto.FLOAT, state),
            helper.make_tensor_value_info("c", TensorProto.FLOAT, state),
        ],
        outputs=[
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "time", model.vocabulary_size]),
            helper.make_tensor_value_info("next_h", TensorProto.FLOAT, state),
            helper.make_tensor_value_info("next_c", TensorProto.FLOAT, state),
        ],
        initializer=[numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    result = helper.make_model(
        graph, producer_name="lmdist", opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
    )
    metadata = {
        "format": GRAPH_FORMAT,
        "version": GRAPH_VERSION,
        "layer_sizes": sizes,
        "vocabulary_size": model.vocabulary_size,
        "embedding_size": model.settings.embedding_size,
        "tied": model.settings.tied,
        "eos_id": END_ID,
        "unknown_id": UNKNOWN_ID,
        "run": run,
    }
    helper.set_model_props(result, {name: json.dumps(value) for name, value in metadata.items()})
    return result


def array(parameter: Tensor) -> NDArray[np.float32]:
    """A parameter as numpy sees it."""
    return parameter.detach().float().numpy()


def input_output_forget_cell(parameter: NDArray[np.float32]) -> NDArray[np.float32]:
    """Put the four gates (4H, ...) from torch's order, input forget cell output, into ONNX's."""
    input_gate, forget_gate, cell, output_gate = np.split(parameter, 4)
    return np.concatenate([input_gate, output_gate, forget_gate, cell])

"""A checkpoint's weights become the ONNX step graph: words and state in, logits and state out.

The graph is built straight from the weights, by the table of graph.py, because torch's exporters freeze its length or are
deprecated. It does not know whether it is right: verify.py finds out. `lmdist-export` (export.py) runs it.

Shapes: V vocabulary, E embedding, H a layer's size, S the sum of the layers' sizes.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from lmdist.model import LanguageModel
from lmdist.vocabulary import END_ID, UNKNOWN_ID
from lmdist_export.graph import FORMAT, OPSET, VERSION, Sizes, constants, data_file, step_nodes, weight_shapes

IR_VERSION = 8  # the file format that came with that opset
PROTOBUF_LIMIT = 2**31 - 2**24  # protobuf ends at 2 GiB; 16 MiB are left for the nodes


def write_step_graph(model: LanguageModel, path: Path, run: str) -> None:
    """Write the step graph of `model` to `path`; weights beyond protobuf's limit lie in `path`.data beside it."""
    graph = step_graph(model, run)
    # Not ByteSize(): it fails beyond the limit.
    weights = sum(len(initializer.raw_data) for initializer in graph.graph.initializer)
    onnx.save_model(graph, path, save_as_external_data=weights > PROTOBUF_LIMIT, location=data_file(path).name)
    onnx.checker.check_model(path, full_check=True)


def step_graph(model: LanguageModel, run: str) -> onnx.ModelProto:
    """The step graph of `model` with all that a runtime must know in its metadata; `run` is the name to remember."""
    projection, cutoffs = model.projection, []
    weights = {"embedding": array(model.embedding.weight)}  # (V, E)
    if isinstance(projection, nn.AdaptiveLogSoftmaxWithLoss):
        cutoffs = projection.cutoffs[:-1]
        for number, (narrow, words) in enumerate(projection.tail):  # type: ignore[misc]
            weights[f"cluster_{number}.narrow"] = array(narrow.weight)
            weights[f"cluster_{number}.words"] = array(words.weight)
        projection = projection.head
    sizes = Sizes(model.layer_sizes, model.vocabulary_size, model.settings.embedding_size, model.settings.tied, cutoffs)
    weights["projection_bias"] = array(projection.bias)  # (V)
    if not sizes.tied:
        weights["projection"] = array(projection.weight)  # (V, H)
    for layer, module in enumerate(model.layers):
        parameters = {name: input_output_forget_cell(array(value)) for name, value in module.named_parameters()}
        weights[f"layer_{layer}.W"] = parameters["weight_ih_l0"][None]  # (1, 4H, E)
        weights[f"layer_{layer}.R"] = parameters["weight_hh_l0"][None]  # (1, 4H, H)
        weights[f"layer_{layer}.B"] = np.concatenate([parameters["bias_ih_l0"], parameters["bias_hh_l0"]])[None]  # (1, 8H)
    shapes = {name: value.shape for name, value in weights.items()}
    assert shapes == weight_shapes(sizes), shapes
    numbers = {name: np.array(value, np.int64) for name, value in constants(sizes).items()}
    nodes = [
        helper.make_node(node.operator, node.inputs, node.outputs, node.name, **node.attributes) for node in step_nodes(sizes)
    ]
    state = ["batch", sum(sizes.layer_sizes)]
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
        initializer=[numpy_helper.from_array(value, name) for name, value in (weights | numbers).items()],
    )
    result = helper.make_model(
        graph, producer_name="lmdist", opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
    )
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        **dataclasses.asdict(sizes),
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

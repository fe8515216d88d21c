"""`lmdist-export --layout sherpa-onnx`: the model as sherpa-onnx takes a language model for a speech recognizer.

    with-state-rnnlm.onnx    x (N, 1) int64, h0, c0 (L, N, H)  ->  log_softmax (N, V), next_h0, next_c0 (L, N, H)
    tokens.txt               a word and its id a line

This is the contract of the recurrent model that icefall (rnn_lm/export-onnx.py) exports with its state, and that sherpa-onnx's
streaming transducers take as `lm` in modified beam search (online-rnn-lm.cc):

* Inputs and outputs are found by position, not by name; icefall's names are kept for people.
* sherpa-onnx reads `num_layers`, `hidden_size` and `sos_id` of the metadata, as decimal numbers. From them it creates the first
  state, zeros, and feeds `sos_id` once. `model_type`, `eos_id`, `vocab_size` and `embedding_dim` are icefall's, for others. A
  text of lmdist begins and ends with `<eos>`, so `sos_id` and `eos_id` are the same.
* In each step it reads log_softmax[0, token] of a candidate, then feeds that token, as x (1, 1), with the state. `eos_id` is
  never read.
* Id 0 is its blank: neither it nor `<unk>` is ever read or fed, so it does no harm that both are lmdist's id 0.
* The ids of the transducer and of the model must be the same: its units are the words of tokens.txt, in that order.

x has one token a row, because icefall's own graph answers only for the first token of a row. sherpa-onnx's rescoring
(`lm_shallow_fusion=False`) feeds several tokens and takes the first number of the answer for their negative log-probability: a
graph that rejects two tokens turns a wrong number into an error. The model for whole sentences of offline recognizers
(`x, x_lens -> nll`) is another contract and not written.

This module is a second description of the network, beside lmdist_export/graph: in onnx.helper, because icefall's opset 13 has
the LSTM operator. It knows the cell (`LSTM`, `hidden_size`, a bias of 8H), so another cell changes this module too.

The contract knows one layer size: the state has the size of the largest layer, padded with zeros for smaller ones.

Shapes: N batch, V vocabulary, E embedding, H the largest layer's size, L layers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from lmdist import __version__
from lmdist.counted import counted
from lmdist.errors import DataError
from lmdist.model.language_model import LanguageModel
from lmdist.storage.atomic import atomic_folder
from lmdist.text.vocabulary import END_ID, Vocabulary
from lmdist_export.conversion.verify import TOLERANCES, max_error, random_state, torch_step
from lmdist_export.conversion.weights import array
from lmdist_export.graph import cell
from lmdist_export.graph.cell import STATE
from lmdist_export.sampling.runtime import open_session

MODEL = "with-state-rnnlm.onnx"  # icefall's are with-state-epoch-99-avg-1.onnx and the like
MODEL_DATA = f"{MODEL}.data"
TOKENS = "tokens.txt"
OPSET = 13  # icefall's own: whatever sherpa-onnx was built with reads it
IR_VERSION = 7  # the file format that came with that opset
PROTOBUF_LIMIT = 2**31 - 2**24  # protobuf ends at 2 GiB; 16 MiB are left for the nodes
ROWS = (1, 3)
TOKENS_READ = 20


def is_layout(folder: Path) -> bool:
    """Return whether a folder holds what this layout writes and nothing else, so that it can be replaced."""
    try:
        names = set(os.listdir(folder))
    except OSError:  # no folder, or one that may not be read
        return False
    return {MODEL, TOKENS} <= names <= {MODEL, MODEL_DATA, TOKENS}


def write(
    model: LanguageModel, vocabulary: Vocabulary, output: Path, origin: str, *, replace: bool = False
) -> dict[str, float]:
    """Write the folder, atomically, if its graph agrees with torch; return the max errors.

    Another one is replaced if `replace`. Raises MismatchError if the graph does not agree, and DataError for a word that
    tokens.txt cannot hold.
    """
    with atomic_folder(output, replace=replace) as folder:
        write_tokens(vocabulary, folder / TOKENS)
        graph = rnn_lm(model, origin)
        # Not ByteSize(): it fails beyond the limit.
        weights = sum(len(initializer.raw_data) for initializer in graph.graph.initializer)
        onnx.save_model(graph, folder / MODEL, save_as_external_data=weights > PROTOBUF_LIMIT, location=MODEL_DATA)
        onnx.checker.check_model(folder / MODEL, full_check=True)
        return verify(folder / MODEL, model)


def write_tokens(vocabulary: Vocabulary, path: Path) -> None:
    """Write a word and its id a line; raises DataError for a word with whitespace in it."""
    for word in vocabulary.words:
        if word.split() != [word]:
            raise DataError(f"the word {word!r} has whitespace in it, where {TOKENS} of sherpa-onnx ends a word")
    lines = (f"{word} {index}\n" for index, word in enumerate(vocabulary.words))
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def rnn_lm(model: LanguageModel, origin: str) -> onnx.ModelProto:
    """Return the graph of the contract with its metadata; `origin` becomes the `comment` of the metadata."""
    sizes, vocabulary_size = model.layer_sizes, model.vocabulary_size
    state = [len(sizes), "N", max(sizes)]
    nodes: list[onnx.NodeProto] = [
        helper.make_node("Transpose", ["x"], ["tokens"], perm=[1, 0]),  # (1, N)
        helper.make_node("Gather", ["embedding", "tokens"], ["embedded"]),  # (1, N, E)
        *layer_nodes(sizes),
        *head_nodes(model),
    ]
    for node in nodes:
        node.name = node.name or node.output[0]
    graph = helper.make_graph(
        nodes,
        "rnn_lm",
        inputs=[
            helper.make_tensor_value_info("x", TensorProto.INT64, ["N", 1]),
            *(helper.make_tensor_value_info(f"{part}0", TensorProto.FLOAT, state) for part in STATE),
        ],
        outputs=[
            helper.make_tensor_value_info("log_softmax", TensorProto.FLOAT, ["N", vocabulary_size]),
            *(helper.make_tensor_value_info(f"next_{part}0", TensorProto.FLOAT, state) for part in STATE),
        ],
        initializer=[numpy_helper.from_array(value, name) for name, value in (weights(model) | constants(model)).items()],
    )
    result = helper.make_model(
        graph,
        producer_name="lmdist",
        producer_version=__version__,
        doc_string="A language model for sherpa-onnx, by icefall's contract of rnn_lm: one token in, log-probabilities out.",
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    metadata = {
        "model_type": "rnnlm",
        "version": 1,
        "comment": origin,
        "sos_id": END_ID,
        "eos_id": END_ID,
        "vocab_size": vocabulary_size,
        "num_layers": len(sizes),
        "hidden_size": max(sizes),
        "embedding_dim": model.settings.embedding_size,
    }
    helper.set_model_props(result, {name: str(value) for name, value in metadata.items()})
    return result


def layer_nodes(sizes: list[int]) -> Iterator[onnx.NodeProto]:
    """Yield the nodes from embedded (1, N, E) to hidden (N, H), which split and concatenate the state by layers."""
    layers, inputs = range(len(sizes)), "embedded"
    for state in STATE:
        parts = [f"{state}_{layer}" for layer in layers]
        yield helper.make_node("Split", [f"{state}0", "one_each"], parts, axis=0)  # (1, N, H) each
    for layer, size in enumerate(sizes):
        name = f"layer_{layer}"
        before, after = [f"{part}_{layer}" for part in STATE], [f"next_{part}_{layer}" for part in STATE]
        is_smaller = size < max(sizes)
        if is_smaller:
            for state in before:
                yield helper.make_node("Slice", [state, "axis_0", f"{name}.size", "axis_2"], [f"{state}.used"])
        used = [f"{state}.used" if is_smaller else state for state in before]
        outputs = [f"{state}.used" if is_smaller else state for state in after]
        weights = [f"{name}.W", f"{name}.R", f"{name}.B"]
        yield helper.make_node("LSTM", [inputs, *weights, "", *used], ["", *outputs], name, hidden_size=size)
        inputs = outputs[0]  # (1, N, H): after one token the state h is all of the output
        if is_smaller:
            for state in after:
                yield helper.make_node("Pad", [f"{state}.used", f"{name}.rest"], [state])
    for state in STATE:
        parts = [f"next_{state}_{layer}" for layer in layers]
        yield helper.make_node("Concat", parts, [f"next_{state}0"], axis=0)  # (L, N, H)
    yield helper.make_node("Squeeze", [inputs, "axis_0"], ["hidden"])


def head_nodes(model: LanguageModel) -> Iterator[onnx.NodeProto]:
    """Yield the nodes from hidden (N, H) to log_softmax (N, V)."""
    if not isinstance(model.projection, nn.AdaptiveLogSoftmaxWithLoss):
        matrix = "embedding" if model.settings.tied else "projection"
        yield helper.make_node("Gemm", ["hidden", matrix, "projection_bias"], ["scores"], transB=1)
        yield helper.make_node("LogSoftmax", ["scores"], ["log_softmax"], axis=1)
        return
    # The probability of a rare token is that of its cluster times its own inside the cluster.
    clusters = range(model.projection.n_clusters)
    yield helper.make_node("Gemm", ["hidden", "projection", "projection_bias"], ["scores"], transB=1)
    yield helper.make_node("LogSoftmax", ["scores"], ["first"], axis=1)  # (N, frequent tokens + clusters)
    parts = ["frequent", *(f"cluster_{number}" for number in clusters)]
    yield helper.make_node("Split", ["first", "first_sizes"], parts, axis=1)
    for number in clusters:
        name = f"cluster_{number}"
        yield helper.make_node("Gemm", ["hidden", f"{name}.narrow"], [f"{name}.rows"], transB=1)
        yield helper.make_node("Gemm", [f"{name}.rows", f"{name}.wide"], [f"{name}.scores"], transB=1)
        yield helper.make_node("LogSoftmax", [f"{name}.scores"], [f"{name}.inside"], axis=1)
        yield helper.make_node("Add", [f"{name}.inside", name], [f"rare_{number}"])  # (N, tokens of the cluster)
    yield helper.make_node("Concat", ["frequent", *(f"rare_{number}" for number in clusters)], ["log_softmax"], axis=1)


def weights(model: LanguageModel) -> dict[str, NDArray[np.float32]]:
    """Return the parameters of the model, as the operators take them."""
    projection = model.projection
    found = {"embedding": array(model.embedding.weight)}  # (V, E)
    if isinstance(projection, nn.AdaptiveLogSoftmaxWithLoss):
        for number, (narrow, wide) in enumerate(projection.tail):  # type: ignore[misc]
            found[f"cluster_{number}.narrow"] = array(narrow.weight)
            found[f"cluster_{number}.wide"] = array(wide.weight)
        projection = projection.head
    found["projection_bias"] = array(projection.bias)  # (V)
    if not model.settings.tied:
        found["projection"] = array(projection.weight)  # (V, H)
    for layer, module in enumerate(model.layers):
        parameters = {name: cell.onnx_gates(array(value)) for name, value in module.named_parameters()}
        found[f"layer_{layer}.W"] = parameters["weight_ih_l0"][None]  # (1, 4H, E)
        found[f"layer_{layer}.R"] = parameters["weight_hh_l0"][None]  # (1, 4H, H)
        found[f"layer_{layer}.B"] = np.concatenate([parameters["bias_ih_l0"], parameters["bias_hh_l0"]])[None]  # (1, 8H)
    return found


def constants(model: LanguageModel) -> dict[str, NDArray[np.int64]]:
    """Return the constants of the graph."""
    sizes, projection = model.layer_sizes, model.projection
    numbers = {"axis_0": [0], "one_each": [1] * len(sizes)}
    for layer, size in enumerate(sizes):
        if size < max(sizes):
            numbers["axis_2"] = [2]
            numbers[f"layer_{layer}.size"] = [size]
            numbers[f"layer_{layer}.rest"] = [0, 0, 0, 0, 0, max(sizes) - size]  # zeros before each axis, then after each
    if isinstance(projection, nn.AdaptiveLogSoftmaxWithLoss):
        numbers["first_sizes"] = [projection.shortlist_size] + [1] * projection.n_clusters
    return {name: np.array(value, np.int64) for name, value in numbers.items()}


# --- against torch -------------------------------------------------------------------------------------------------


def verify(path: Path, model: LanguageModel) -> dict[str, float]:
    """Return the max errors against torch, token by token with the state fed back, or raise MismatchError."""
    session = open_session(path, "cpu", 0)
    random = np.random.default_rng(0)
    inputs, outputs = [f"{part}0" for part in STATE], [f"next_{part}0" for part in STATE]
    largest = dict.fromkeys(["log_softmax", *outputs], 0.0)
    for rows in ROWS:
        state = random_state(random, rows, sum(model.layer_sizes))
        fed = [stacked(part, model.layer_sizes) for part in state]
        for place in range(TOKENS_READ):
            token = random.integers(0, model.vocabulary_size, (rows, 1))
            # Outputs by position, as sherpa-onnx takes them.
            log_softmax, *fed = session.run(None, {"x": token, **dict(zip(inputs, fed, strict=True))})
            logits, state = torch_step(model, token, state)
            expected = torch.from_numpy(logits[:, 0]).log_softmax(1).numpy()
            if not np.isfinite(expected).all():
                raise DataError("the logits of the model are not finite, so these are not the weights of a trained model")
            pairs = {"log_softmax": (log_softmax, expected)}
            for name, found, part in zip(outputs, fed, state, strict=True):
                pairs[name] = found, stacked(part, model.layer_sizes)
            for name, (found, expected) in pairs.items():
                where = f"{name} for {counted(rows, 'row')}, token {place + 1}"
                largest[name] = max(largest[name], max_error(where, found, expected, TOLERANCES["fp32"]))
    return largest


def stacked(state: NDArray[np.float32], sizes: list[int]) -> NDArray[np.float32]:
    """Return the layers' states side by side (N, S) as a layer after the other (L, N, H), smaller ones padded with zeros."""
    ends = [0, *accumulate(sizes)]
    parts = [state[:, start:end] for start, end in pairwise(ends)]
    return np.stack([np.pad(part, ((0, 0), (0, max(sizes) - part.shape[1]))) for part in parts])


def rows_of(output: Path, errors: dict[str, float], origin: str) -> dict[str, str]:
    """Return the rows of the table of what was written, and of how sherpa-onnx takes it."""
    megabytes = sum(file.stat().st_size for file in output.iterdir()) / 1e6
    return {
        "written": f"{output / MODEL} and {TOKENS}  ({megabytes:,.1f} MB)",
        "created from": origin,
        "max error": ", ".join(f"{name} {value:.1e}" for name, value in errors.items())
        + f"  (allowed: {TOLERANCES['fp32']:.0e})",
        "next": "sherpa_onnx.OnlineRecognizer.from_transducer(tokens=..., encoder=..., decoder=..., joiner=...,",
        "": f'    decoding_method="modified_beam_search", lm="{output / MODEL}", lm_scale=0.5)',
        "units": f"a transducer whose ids are those of {output / TOKENS}; id 0 is its blank",
    }

"""The graphs' files: names, types, axes and metadata, by onnx's own checker, and the layout of their weights."""

from __future__ import annotations

import dataclasses
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from lmdist import __version__
from lmdist_export import PRECISIONS
from lmdist_export.bundle import GENERATION_GRAPH, STEP_GRAPH, WEIGHTS
from lmdist_export.graph import onnx_file
from lmdist_export.graph.graphs import generation_graph, score_graph, step_graph, token_graph
from lmdist_export.graph.network import Target
from lmdist_export.graph.sizes import Sizes, file_length, weights
from lmdist_export.graph.value_docs import DOCS
from lmdist_export.options import EVERY_FEATURE, GRAPH, Features
from support.onnx_models import described, metadata_of
from support.small_bundles import TIED, bare_bundle

VOCABULARY_SIZE = 23
PAGE = Path(__file__).parents[2] / "docs" / "bundle.md"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a small bundle that has not been verified."""
    return bare_bundle(tmp_path / "bare", TIED, vocabulary_size=VOCABULARY_SIZE).folder


STATE = (TensorProto.FLOAT, ["batch", 12 + 12 + 8])
PADDED = 256
METADATA = {
    "version": 2,
    "layer_sizes": [12, 12, 8],
    "vocabulary_size": VOCABULARY_SIZE,
    "embedding_size": 8,
    "tied": True,
    "precision": "fp32",
    "cutoffs": [],
    "eos_id": 1,
    "unknown_id": 0,
    "run": "small",
}


def test_names_types_axes_and_metadata_of_the_step_graph(folder: Path) -> None:
    model = onnx.load(folder / STEP_GRAPH, load_external_data=False)
    assert described(model.graph.input) == {"tokens": (TensorProto.INT64, ["batch", "time"]), "h": STATE, "c": STATE}
    assert described(model.graph.output) == {
        "logits": (TensorProto.FLOAT, ["batch", "time", VOCABULARY_SIZE]),
        "next_h": STATE,
        "next_c": STATE,
    }
    assert metadata_of(model) == METADATA | {"format": "lmdist step graph"}
    assert {(entry.domain, entry.version) for entry in model.opset_import} == {("", 17), ("com.microsoft", 1)}
    assert {node.domain for node in model.graph.node} == {""}  # fp32 needs nothing of onnxruntime's own


def test_names_types_axes_and_metadata_of_the_generation_graph(folder: Path) -> None:
    model = onnx.load(folder / GENERATION_GRAPH, load_external_data=False)
    number, of_words = (TensorProto.FLOAT, []), (TensorProto.FLOAT, ["batch", PADDED])
    assert described(model.graph.input) == {
        "prompt": (TensorProto.INT64, ["batch", "prompt_words"]),
        "lengths": (TensorProto.INT64, ["batch"]),
        "h": STATE,
        "c": STATE,
        "uniform": (TensorProto.FLOAT, ["new_words", "batch", 1]),
        "bias": (TensorProto.FLOAT, [PADDED]),
        "stops": (TensorProto.INT64, ["stop_words"]),
        "going": (TensorProto.BOOL, ["batch"]),
        "counts": of_words,
        "in_prompt": (TensorProto.BOOL, ["batch", PADDED]),
        "row_bias": (TensorProto.FLOAT, ["rows", PADDED]),
        "inverse_temperature": number,
        "top_k": (TensorProto.INT64, [1]),
        **{name: number for name in GRAPH if name not in ("temperature", "top_k", "cache_weight")},
    }
    assert described(model.graph.output) == {
        "words": (TensorProto.INT64, ["made_words", "batch"]),
        "mass": (TensorProto.FLOAT, ["made_words", "batch"]),
        "next_going": (TensorProto.BOOL, ["batch"]),
        "next_h": STATE,
        "next_c": STATE,
        "next_counts": of_words,
    }
    features = dataclasses.asdict(EVERY_FEATURE)
    del features["cached"]  # no graph in a file has the cache
    assert metadata_of(model) == METADATA | {"format": "lmdist generation graph", "features": features}


def test_a_tied_matrix_is_stored_once(folder: Path) -> None:
    model = onnx.load(folder / STEP_GRAPH, load_external_data=False)
    places = {
        value.name: {entry.key: entry.value for entry in value.external_data}
        for value in model.graph.initializer
        if value.external_data
    }
    assert places["embedding"]["offset"] == places["projection"]["offset"]
    others = [place["offset"] for name, place in places.items() if name != "embedding"]
    assert len(set(others)) == len(others)
    # Each place begins on a whole page, so that little is left between them.
    stored = sum(int(place["length"]) for name, place in places.items() if name != "embedding")
    assert stored <= (folder / WEIGHTS).stat().st_size < stored + 4096 * len(others)


def all_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Return the nodes of a graph, and of those inside of it."""
    nodes = list(graph.node)
    return nodes + [inner for node in nodes for entry in node.attribute if entry.HasField("g") for inner in all_nodes(entry.g)]


@pytest.mark.parametrize("name", [STEP_GRAPH, GENERATION_GRAPH])
def test_a_graph_says_what_its_parts_are(folder: Path, name: str) -> None:
    model = onnx.load(folder / name, load_external_data=False)
    assert (model.producer_name, model.producer_version) == ("lmdist", __version__)
    assert model.doc_string.endswith(".")
    assert all(value.doc_string for value in (*model.graph.input, *model.graph.output))
    names = [node.name for node in all_nodes(model.graph)]
    assert len(set(names)) == len(names)
    parts = {name.rpartition("/")[0] for name in names}
    inside = {"embedding", *(f"layer_{layer}" for layer in range(3))}
    loop = {f"token/{part}" for part in (*inside, "projection", "penalties", "sampling")}
    assert parts - {"", "token", "prefill"} == (
        {*inside, "projection"} if name == STEP_GRAPH else {f"prefill/{part}" for part in inside} | loop
    )


def test_each_value_of_the_two_graphs_is_described_there_and_on_the_page(folder: Path) -> None:
    graphs = [onnx.load(folder / name, load_external_data=False).graph for name in (STEP_GRAPH, GENERATION_GRAPH)]
    names = {value.name for graph in graphs for value in (*graph.input, *graph.output)}
    assert set(DOCS) == names | {"cache_weight"}, "the cache has nodes in no file"
    rows = re.findall(r"^\| (?:in|out) \| (.+?) \|", PAGE.read_text().partition("## Metadata")[0], re.MULTILINE)
    assert {name for row in rows for name in re.findall("`(.+?)`", row)} == names


@pytest.mark.parametrize("name", [STEP_GRAPH, GENERATION_GRAPH])
def test_what_openvino_asks_of_a_graph(folder: Path, name: str) -> None:
    """No node has a last input that is left out, and no Scan refers to values outside but weights and constants."""
    graph = onnx.load(folder / name, load_external_data=False).graph
    nodes = all_nodes(graph)
    assert all(node.input[-1] for node in nodes if node.input)
    tensors = {tensor.name for tensor in graph.initializer}
    scans = [entry.g for node in nodes if node.op_type == "Scan" for entry in node.attribute if entry.HasField("g")]
    assert len(scans) == 3, "one for each layer"
    for body in scans:
        known = {value.name for value in body.input} | {output for node in body.node for output in node.output}
        assert {given for node in body.node for given in node.input} <= known | tensors


EVERY_SIZE = [
    Sizes([12], 23, 12, tied=True),
    Sizes([7, 9, 5], 300, 5, tied=True),
    Sizes([70], 513, 3, tied=False),
    Sizes([64, 32], 512, 20, tied=False),
    Sizes([20, 17], 40, 6, tied=False, cutoffs=[20]),
    Sizes([64], 700, 8, tied=False, cutoffs=[100, 256, 600]),
]
SOME_FEATURES = [
    Features(),
    EVERY_FEATURE,
    Features(greedy=True),
    Features(greedy=True, adjusted=True),
    Features(top_p=True),
    Features(min_p=True, adjusted=True),
    Features(top_p=True, min_p=True),
    Features(top_k=True),
    Features(typical_p=True, min_p=True),
]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_graphs_are_what_onnx_expects(precision: str, tmp_path: Path) -> None:
    """onnx's checker infers all types and shapes and compares them with the declared ones."""
    path = tmp_path / "graph.onnx"
    for sizes in EVERY_SIZE:
        sizes = dataclasses.replace(sizes, precision=precision)
        with (tmp_path / WEIGHTS).open("wb") as file:
            file.truncate(file_length(sizes))
        # The same on another processor; quantized weights run on CPUs only.
        for target in (Target(WEIGHTS), Target(WEIGHTS, cuda=not sizes.is_quantized, int8_saturates=sizes.is_quantized)):
            graphs = [step_graph(sizes, target, "small"), score_graph(sizes, target)]
            graphs += [generation_graph(sizes, features, target, "small") for features in SOME_FEATURES]
            graphs += [token_graph(sizes, features, target) for features in SOME_FEATURES]
            for graph in graphs:
                path.write_bytes(graph.content)
                onnx.checker.check_model(path, full_check=True)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("sizes", EVERY_SIZE, ids=lambda sizes: f"{sizes.layer_sizes}")
def test_weights_have_places_of_their_own(sizes: Sizes, precision: str) -> None:
    sizes = dataclasses.replace(sizes, precision=precision)
    table = weights(sizes)
    taken = sorted(
        (weight.offset, weight.offset + int(np.prod(weight.shape)) * onnx_file.TYPES[weight.kind].itemsize)
        for name, weight in table.items()
        if name != "embedding" or sizes.is_quantized or not sizes.tied
    )
    assert all(end <= start for (_, end), (start, _) in pairwise(taken))
    assert all(start % 4096 == 0 for start, _ in taken)
    assert taken[-1][1] == file_length(sizes)

"""lmdist-export: the bundle answers as torch does in every precision, or nothing is written."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import AttributeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from torch.nn import functional

from lmdist.errors import DataError, MissingInputError, UsageError
from lmdist.model.language_model import LanguageModel
from lmdist.settings import ModelSettings
from lmdist.storage.checksums import verify_checksums
from lmdist_export import PRECISIONS, export
from lmdist_export.bundle import GENERATION, MODEL, WEIGHTS, Bundle
from lmdist_export.conversion import verify
from lmdist_export.conversion.verify import torch_step
from lmdist_export.conversion.weights import quantize_int4, quantize_int8, write_graphs
from lmdist_export.graph import cell, onnx_file
from lmdist_export.graph.graphs import generation_graph, score_graph, step_graph, word_graph
from lmdist_export.graph.network import Target
from lmdist_export.graph.onnx_file import Graph, attribute, message, model_bytes
from lmdist_export.graph.sizes import NBITS_BLOCK, Sizes, file_length, weights
from lmdist_export.options import EVERY_FEATURE, GRAPH, Features, GenerationConfig
from lmdist_export.sampling.sampler import Sampler
from support.small_bundles import (
    ADAPTIVE,
    SINGLE,
    TIED,
    UNTIED,
    WORDS,
    bare_bundle,
    command,
    edit_json,
    in_fresh_process,
    make_bundle,
    make_data,
    make_model,
    make_run,
)

VOCABULARY_SIZE = 23
OF_MLFLOW = {"MLmodel", "served_model.py", "requirements.txt", "python_env.yaml"}
FILES = {MODEL, GENERATION, WEIGHTS, "vocab.txt", "text.json", "generation_config.json", "manifest.json", *OF_MLFLOW}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle"))


def bare(settings: ModelSettings, folder: Path, precision: str = "fp32") -> Bundle:
    """A bundle of a model of few words that nothing has compared yet."""
    return bare_bundle(folder / "bare", settings, precision, VOCABULARY_SIZE)


def failure(arguments: list[object], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and message of an export that fails; the message is one line of its own, and no traceback."""
    with pytest.raises(SystemExit) as stop:
        export.main([str(argument) for argument in arguments])
    assert isinstance(stop.value.code, int)
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return stop.value.code, error.splitlines()[-1]


# --- what the graphs answer ----------------------------------------------------------------------------------------


def rounded(model: LanguageModel, precision: str) -> LanguageModel:
    """The model with its weights as they are stored."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = parameter.numpy()
            if precision == "fp16" and values.ndim == 2:
                values = values.astype(np.float16)
            elif precision == "int4" and name == "projection.weight":
                values = dequantize_int4(*quantize_int4(values), values.shape[1])
            elif precision in ("int8", "int4") and values.ndim == 2:
                integers, scale = quantize_int8(values)
                values = integers * scale[:, None]
            parameter.copy_(torch.from_numpy(values))
    return model


def dequantize_int4(integers: NDArray[np.uint8], scale: NDArray[np.float32], inputs: int) -> NDArray[np.float32]:
    """The values of `quantize_int4`, as the documentation of MatMulNBits has them: the low half byte first."""
    numbers = np.stack([integers & 15, integers >> 4], axis=-1).reshape(*integers.shape[:2], -1).astype(np.float32) - 8
    return (numbers * scale.reshape(*integers.shape[:2], 1)).reshape(len(integers), -1)[:, :inputs]


# Rows of more than one block of 4-bit numbers.
WIDE = ModelSettings(embedding_size=6, hidden_size=150, num_layers=1, dropout=0.0, tied=False)
# What is left beside the weights: of fp32 the order of sums, of the others that outputs of layers are rounded too.
ANSWERS = [
    *((settings, "fp32", 1e-5) for settings in (TIED, UNTIED, SINGLE, ADAPTIVE)),
    *((settings, "fp16", 1e-5) for settings in (TIED, UNTIED, ADAPTIVE)),
    *((settings, "int8", 0.02) for settings in (TIED, UNTIED, ADAPTIVE, WIDE)),
    *((settings, "int4", 0.02) for settings in (UNTIED, WIDE)),
]
NAMES = {id(TIED): "tied", id(UNTIED): "untied", id(SINGLE): "single", id(ADAPTIVE): "adaptive", id(WIDE): "wide"}


@pytest.mark.parametrize(("settings", "precision", "allowed"), ANSWERS, ids=lambda value: NAMES.get(id(value), str(value)))
def test_the_graph_answers_as_torch_does(settings: ModelSettings, precision: str, allowed: float, tmp_path: Path) -> None:
    sampler = Sampler(bare(settings, tmp_path, precision), threads=1)
    model = rounded(make_model(settings, VOCABULARY_SIZE), precision)
    random = np.random.default_rng(1)
    # Over many words an LSTM makes much of little.
    for rows, length in [(1, 1), (9, 1), (50, 1)] if sampler.sizes.is_quantized else [(1, 1), (2, 3), (7, 11), (1, 40), (9, 1)]:
        tokens = random.integers(0, VOCABULARY_SIZE, (rows, length))
        state = tuple(random.uniform(-1, 1, (2, rows, sum(model.layer_sizes))).astype(np.float32))
        logits, after = sampler.step(tokens, state)
        expected, expected_after = torch_step(model, tokens, state)
        assert logits.shape == expected.shape
        np.testing.assert_allclose(logits, expected, atol=allowed * max(1, np.abs(expected).max()))
        np.testing.assert_allclose(after, expected_after, atol=2 * allowed)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_verification_passes_what_is_right(precision: str, tmp_path: Path) -> None:
    differences = verify.check_values(Sampler(bare(TIED, tmp_path, precision), threads=1), make_model(TIED, VOCABULARY_SIZE))
    allowed = {"fp32": 1e-5, "fp16": 1e-2, "int8": 0.05, "int4": 0.3}[precision]
    assert set(differences) == {"logits", "next_h", "next_c", "step_by_step"}
    assert all(0 <= value < allowed for value in differences.values())
    assert differences["step_by_step"] < 1e-5
    assert (differences["logits"] > 1e-5) == (precision != "fp32")  # it is measured


@given(rows=st.integers(1, 5), inputs=st.integers(1, 200), seed=st.integers(0, 2**32), digits=st.integers(-3, 3))
def test_few_bits_are_half_a_unit_off_at_most(rows: int, inputs: int, seed: int, digits: int) -> None:
    random = np.random.default_rng(seed)
    values = (random.normal(size=(rows, inputs)) * 10.0**digits).astype(np.float32)
    values[random.random((rows, inputs)) < 0.1] = 0
    integers, scale = quantize_int8(values)
    assert np.abs(integers).max() <= 127
    assert (np.abs(integers * scale[:, None] - values) <= 0.5001 * scale[:, None]).all()
    integers, scale = quantize_int4(values)
    assert integers.shape == (rows, -(-inputs // NBITS_BLOCK), NBITS_BLOCK // 2)
    units = np.repeat(scale.reshape(rows, -1), NBITS_BLOCK, axis=1)[:, :inputs]  # with the sign of what is -8 of them
    off = np.abs(dequantize_int4(integers, scale, inputs) - values)
    # There is one more below zero than above: what is as large as the largest on the other side is a whole unit off.
    assert (off <= 1.0001 * np.abs(units)).all()
    assert (off <= 0.5001 * np.abs(units))[values / units <= 7.5].all()


def test_rows_of_zeros_stay_zeros() -> None:
    nothing = np.zeros((2, 70), np.float32)
    integers, scale = quantize_int8(nothing)
    assert not (integers * scale[:, None]).any()
    assert not dequantize_int4(*quantize_int4(nothing), 70).any()


# --- the files of the graphs ---------------------------------------------------------------------------------------


def described(values: Iterable[ValueInfoProto]) -> dict[str, tuple[int, list[object]]]:
    """Type and axes of what goes into a graph or comes out of it."""
    return {
        value.name: (
            value.type.tensor_type.elem_type,
            [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim],
        )
        for value in values
    }


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


def facts(model: onnx.ModelProto) -> dict[str, object]:
    """The metadata of a graph."""
    return {entry.key: json.loads(entry.value) for entry in model.metadata_props}


def test_names_types_axes_and_metadata_of_the_step_graph(tmp_path: Path) -> None:
    model = onnx.load(bare(TIED, tmp_path).folder / MODEL, load_external_data=False)
    assert described(model.graph.input) == {"tokens": (TensorProto.INT64, ["batch", "time"]), "h": STATE, "c": STATE}
    assert described(model.graph.output) == {
        "logits": (TensorProto.FLOAT, ["batch", "time", VOCABULARY_SIZE]),
        "next_h": STATE,
        "next_c": STATE,
    }
    assert facts(model) == METADATA | {"format": "lmdist step graph"}
    assert {(entry.domain, entry.version) for entry in model.opset_import} == {("", 17), ("com.microsoft", 1)}
    assert {node.domain for node in model.graph.node} == {""}  # fp32 needs nothing of onnxruntime's own


def test_names_types_axes_and_metadata_of_the_generation_graph(tmp_path: Path) -> None:
    model = onnx.load(bare(TIED, tmp_path).folder / GENERATION, load_external_data=False)
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
        **{name: number for name in GRAPH if name not in ("temperature", "top_k")},
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
    assert facts(model) == METADATA | {"format": "lmdist generation graph", "features": features}


def test_a_tied_matrix_is_stored_once(tmp_path: Path) -> None:
    model = onnx.load(bare(TIED, tmp_path).folder / MODEL, load_external_data=False)
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
    assert stored <= (tmp_path / "bare" / WEIGHTS).stat().st_size < stored + 4096 * len(others)


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
    """onnx's checker infers all types and shapes anew and compares them with those that are declared."""
    path = tmp_path / "graph.onnx"
    for sizes in EVERY_SIZE:
        sizes = dataclasses.replace(sizes, precision=precision)
        with (tmp_path / WEIGHTS).open("wb") as file:
            file.truncate(file_length(sizes))
        # The same on a processor of another kind: whole numbers run on no other.
        for target in (Target(WEIGHTS), Target(WEIGHTS, cuda=not sizes.is_quantized, int8_saturates=sizes.is_quantized)):
            graphs = [step_graph(sizes, target, "small"), score_graph(sizes, target)]
            graphs += [generation_graph(sizes, features, target, "small") for features in SOME_FEATURES]
            graphs += [word_graph(sizes, features, target) for features in SOME_FEATURES]
            for graph in graphs:
                path.write_bytes(graph)
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


# --- the writer of ONNX's format -----------------------------------------------------------------------------------


@given(value=st.integers(-(2**63), 2**63 - 1) | st.integers(-300, 300))
def test_whole_numbers_are_those_of_protobuf(value: int) -> None:
    assert message([(3, value)]) == (AttributeProto(i=value).SerializeToString() or message([(3, 0)]))
    assert AttributeProto.FromString(attribute("a", value)) == helper.make_attribute("a", value)
    numbers = [value, 0, -value // 3]
    assert AttributeProto.FromString(attribute("a", numbers)) == helper.make_attribute("a", numbers)


@given(value=st.integers(-(2**24), 2**24).map(lambda number: number / 64), text=st.text(max_size=300))
def test_numbers_and_texts_are_those_of_protobuf(value: float, text: str) -> None:
    assert AttributeProto.FromString(attribute("a", value)) == helper.make_attribute("a", value)
    assert AttributeProto.FromString(message([(1, text), (4, text.encode())])) == AttributeProto(name=text, s=text.encode())


@settings(max_examples=50)
@given(
    shape=st.lists(st.integers(0, 4), max_size=3),
    kind=st.sampled_from(sorted(onnx_file.TYPES)),
    texts=st.dictionaries(st.text(max_size=5), st.text(max_size=200), max_size=3),
)
def test_what_is_written_is_what_onnx_reads(shape: list[int], kind: int, texts: dict[str, str]) -> None:
    values = np.random.default_rng(0).integers(0, 2, shape).astype(onnx_file.TYPES[kind])
    g = Graph("example")
    x = g.input("x", kind, ["rows", 3])
    name = g.constant(values)
    assert g.constant(values.copy()) == name  # what is the same is there once
    outer = g("Add", x, name)
    body = g.subgraph("inside")
    body.output(body("Add", outer, body.constant(values)), "inner", kind, [])
    g.output(g("If", x, then_branch=body, else_branch=body), "y", kind, ["rows", 3])
    model = onnx.load_model_from_string(model_bytes(g, texts))
    [stored] = model.graph.initializer
    found = numpy_helper.to_array(stored)
    assert (found.dtype, found.shape) == (values.dtype, values.shape)
    assert np.array_equal(found, values)
    assert {entry.key: entry.value for entry in model.metadata_props} == texts
    assert described(model.graph.input) == {"x": (kind, ["rows", 3])}
    assert described(model.graph.output) == {"y": (kind, ["rows", 3])}
    add, branch, _ = model.graph.node
    assert (add.op_type, list(add.input), add.domain) == ("Add", ["x", name], "")
    inside = {entry.name: entry.g for entry in branch.attribute}["then_branch"]
    assert list(inside.node[0].input) == [add.output[0], name]
    assert not inside.initializer


# --- what verification finds ---------------------------------------------------------------------------------------


def test_a_wrong_graph_is_not_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def torchs_own_order(parameter: NDArray[np.float32]) -> NDArray[np.float32]:
        return parameter

    monkeypatch.setattr(cell, "onnx_gates", torchs_own_order)
    code, message = failure([run, "-o", tmp_path / "bundle"], capsys)
    assert code == 1
    assert re.search(r"nothing was written: logits for 1 rows of 1 words: the largest difference .* allowed is", message)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_graph_leaves_the_bundle_that_is_there(
    run: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(bundle, tmp_path / "bundle")
    monkeypatch.setattr(
        "lmdist_export.conversion.weights.array", lambda parameter: parameter.detach().numpy() * np.float32(1.01)
    )
    code, _ = failure([run, "-o", tmp_path / "bundle", "--overwrite"], capsys)
    assert code == 1
    assert Bundle.load(tmp_path / "bundle").manifest == Bundle.load(bundle).manifest
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("name", weights(Sizes([10, 10], VOCABULARY_SIZE, 6, tied=False)))
def test_one_wrong_number_is_found(name: str, tmp_path: Path) -> None:
    made = bare(UNTIED, tmp_path)
    model = make_model(UNTIED, VOCABULARY_SIZE)
    weight = weights(made.sizes)[name]
    count = int(np.prod((VOCABULARY_SIZE, *weight.shape[1:]) if name.startswith("projection") else weight.shape))
    content = (made.folder / WEIGHTS).read_bytes()
    for place in (0, count // 2, count - 1):
        numbers = np.frombuffer(content, np.float32).copy()
        numbers[weight.offset // 4 + place] += 0.3
        (made.folder / WEIGHTS).write_bytes(numbers.tobytes())
        with pytest.raises(verify.MismatchError):
            verify.check_values(Sampler(made, threads=1), model)
    (made.folder / WEIGHTS).write_bytes(content)
    verify.check_values(Sampler(made, threads=1), model)


def test_a_difference_that_is_no_number_is_a_mismatch() -> None:
    with pytest.raises(verify.MismatchError, match="nan"):
        verify.difference("logits", np.array([np.nan]), np.array([1.0]), 1e-4)


def test_a_model_whose_logits_are_no_numbers_is_refused(tmp_path: Path) -> None:
    made, model = bare(SINGLE, tmp_path), make_model(SINGLE, VOCABULARY_SIZE)
    with torch.no_grad():
        model.get_parameter("projection.weight").fill_(3e38)
    with pytest.raises(DataError, match="the logits of the model are not finite"):
        verify.check_values(Sampler(dataclasses.replace(made, sizes=write_graphs(model, made.folder, "small"))), model)


def test_perplexity_is_that_of_cross_entropy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(TIED, VOCABULARY_SIZE)
    monkeypatch.setattr(verify, "HELD_OUT_ROWS", 1)
    monkeypatch.setattr(verify, "HELD_OUT_WORDS", 150)  # more than one piece of 64
    tokens = np.random.default_rng(2).integers(0, VOCABULARY_SIZE, 400)
    measured = verify.check_perplexity(Sampler(bare(TIED, tmp_path)), model, "valid", tokens, 0.0)
    inputs = torch.tensor([[1, *tokens[:149]]])
    with torch.no_grad():
        hidden, _ = model(inputs, model.initial_state(1))
        logits = model.logits(hidden)
        expected = functional.cross_entropy(logits[0], torch.from_numpy(tokens[:150])).exp().item()
    assert measured["tokens"] == 150
    assert measured["torch"] == pytest.approx(expected, rel=1e-5)
    assert measured["onnxruntime"] == pytest.approx(expected, rel=1e-5)
    assert measured["loss_percent"] == pytest.approx(0, abs=1e-3)
    assert measured["top_1_agreement"] == 1
    assert 0 < measured["largest_logit_difference"] < 1e-4


def test_what_a_precision_costs_is_measured(tmp_path: Path) -> None:
    model, sampler = make_model(TIED, VOCABULARY_SIZE), Sampler(bare(TIED, tmp_path, "int4"), threads=1)
    tokens = np.random.default_rng(2).integers(0, VOCABULARY_SIZE, 500)
    measured = verify.check_perplexity(sampler, model, "valid", tokens, 10.0)
    logits, expected = [], []
    ours = theirs = sampler.initial_state(16)
    for inputs, targets in verify.pieces(tokens, 16, 64):
        (of_ours, ours), (of_torch, theirs) = sampler.step(inputs, ours), torch_step(model, inputs, theirs)
        there = targets >= 0
        logits.append(of_ours[there])
        expected.append(of_torch[there])
    found, right = np.concatenate(logits), np.concatenate(expected)
    assert len(found) == 500
    assert measured["largest_logit_difference"] == pytest.approx(np.abs(found - right).max(), rel=1e-4)
    assert measured["top_1_agreement"] == (found.argmax(axis=1) == right.argmax(axis=1)).mean()
    assert measured["loss_percent"] == pytest.approx(100 * (measured["onnxruntime"] / measured["torch"] - 1))
    with pytest.raises(UsageError, match=rf"precision int4 costs {measured['loss_percent']:.2f} % .* allowed is -20 %"):
        verify.check_perplexity(sampler, model, "valid", tokens, -20.0)


def test_perplexity_of_uneven_streams_counts_each_word_once(tmp_path: Path) -> None:
    counted = [targets[targets >= 0] for _, targets in verify.pieces(np.arange(101), rows=16, window=3)]
    assert sorted(np.concatenate(counted)) == list(range(101))


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command_writes_a_bundle_and_says_what_is_next(run: Path, tmp_path: Path) -> None:
    result = command("lmdist_export.export", run, "-o", tmp_path / "deep/bundle")
    assert result.returncode == 0, result.stderr
    assert f'lmdist-generate {tmp_path / "deep/bundle"} --prompt "..."' in result.stdout
    assert "step 7" in result.stderr
    names = {path.name for path in (tmp_path / "deep/bundle").iterdir()}
    assert names == FILES


def test_the_manifest_says_what_the_bundle_is(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    model = make_model(TIED, len(WORDS) + 2)
    assert (manifest["format"], manifest["version"]) == ("lmdist bundle", 2)
    assert manifest["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert manifest["sizes"] == {
        "layer_sizes": [12, 12, 8],
        "vocabulary_size": len(WORDS) + 2,
        "embedding_size": 8,
        "tied": True,
        "precision": "fp32",
        "cutoffs": [],
    }
    assert (manifest["run"], manifest["step"], manifest["tolerance"]) == ("small", 7, 1e-4)
    assert set(manifest["differences"]) == {"logits", "next_h", "next_c", "step_by_step"}
    assert all(0 <= value < 1e-5 for value in manifest["differences"].values())
    held_out = manifest["held_out"]
    assert (held_out["split"], held_out["tokens"], held_out["top_1_agreement"]) == ("valid", 600, 1)
    assert held_out["torch"] == pytest.approx(held_out["onnxruntime"], rel=1e-5)
    assert set(manifest["versions"]) == {"lmdist", "torch", "onnx", "onnxruntime"}
    assert set(manifest["files"]) == FILES - {"generation_config.json", "manifest.json", *OF_MLFLOW}
    verify_checksums(bundle, manifest["files"])
    loaded = Bundle.load(bundle)
    assert dataclasses.asdict(loaded.sizes) == manifest["sizes"]
    assert loaded.generation == GenerationConfig()
    written = json.loads((bundle / "generation_config.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(dataclasses.asdict(GenerationConfig())))
    assert written == written | {
        "bos_token_id": 1,
        "eos_token_id": 1,
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "typical_p": 1.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "no_repeat_ngram_size": 0,
        "min_new_tokens": 0,
        "max_new_tokens": 200,
        "num_beams": 1,
        "length_penalty": 1.0,
        "suppress_tokens": [0],
        "bad_words_ids": [],
        "sequence_bias": [],
    }


def test_each_precision_is_exported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for precision in PRECISIONS:
        output = tmp_path / precision
        export.main([str(run), "-o", str(output), "--precision", precision])
        loaded = Bundle.load(output)
        assert loaded.sizes.precision == loaded.manifest["sizes"]["precision"] == precision
        assert loaded.manifest["tolerance"] == {"fp32": 1e-4, "fp16": 1e-2}.get(precision)
        assert loaded.manifest["held_out"]["loss_percent"] < {"int8": 1, "int4": 3}.get(precision, 0.1)
        assert f"MB, {precision}, " in capsys.readouterr().out
        sampler = Sampler(loaded, threads=1)
        words, _ = sampler.generate(sampler.start([[1]]).seeded(0), loaded.generation, 5)
        assert words.shape == (5, 1)


def test_a_precision_that_costs_too_much(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_large(rows: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        integers, scale = quantize_int8(rows)
        return integers, 2 * scale

    monkeypatch.setattr("lmdist_export.conversion.weights.quantize_int8", too_large)
    output = tmp_path / "bundle"
    code, message = failure([run, "-o", output, "--precision", "int8"], capsys)
    found = re.search(
        r"precision int8 costs ([\d.]+) % of perplexity on held-out text \(.*\); allowed is 1 %\. "
        r"Take --precision fp16, or allow it by --max-perplexity-loss (\d+)",
        message,
    )
    assert code == 64
    assert found, message
    assert 1 < float(found[1]) <= float(found[2])
    assert list(tmp_path.iterdir()) == []
    export.main([str(run), "-o", str(output), "--precision", "int8", "--max-perplexity-loss", found[2]])
    assert Bundle.load(output).manifest["held_out"]["loss_percent"] == pytest.approx(float(found[1]), abs=0.01)
    code, _ = failure([run, "-o", tmp_path / "other", "--precision", "int8", "--max-perplexity-loss", "0.5"], capsys)
    assert (code, (tmp_path / "other").exists()) == (64, False)


def test_precisions_that_are_none(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for precision in ("int8", "int4", "auto"):
        code, message = failure([run, "-o", tmp_path / "bundle", "--precision", precision, "--data", "none"], capsys)
        assert (code, "needs held-out text" in message) == (64, True)
    adaptive = make_run(tmp_path / "adaptive", ADAPTIVE, words=[f"word{number}" for number in range(40)])
    code, message = failure([adaptive, "-o", tmp_path / "bundle", "--precision", "int4"], capsys)
    assert (code, "adaptive head: take int8" in message) == (64, True)
    assert failure([run, "-o", tmp_path / "bundle", "--precision", "int2"], capsys)[0] == 64
    assert [path.name for path in tmp_path.iterdir()] == ["adaptive"]
    export.main([str(run), "-o", str(tmp_path / "bundle"), "--precision", "fp16", "--data", "none"])
    assert Bundle.load(tmp_path / "bundle").manifest["held_out"] is None


@pytest.mark.parametrize("fastest", ["fp32", "int8", "int4"])
def test_auto_takes_the_fastest(
    fastest: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def speed(folder: Path) -> float:
        precision = Bundle.load(folder).sizes.precision
        seen.append(precision)
        return 2_000.0 if precision == fastest else 1_000.0

    monkeypatch.setattr(export, "words_a_second", speed)
    export.main([str(run), "-o", str(tmp_path / "bundle"), "--precision", "auto"])
    said = capsys.readouterr()
    assert seen == ["fp32", "int8", "int4"]
    assert f"lmdist-export: {fastest}: 2,000 words/s" in said.err
    assert f"MB, {fastest}, " in said.out
    assert Bundle.load(tmp_path / "bundle").sizes.precision == fastest
    assert {path.name for path in (tmp_path / "bundle").iterdir()} == FILES


def test_auto_passes_over_what_costs_too_much_or_cannot_be(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export.main([str(run), "-o", str(tmp_path / "bundle"), "--precision", "auto", "--max-perplexity-loss=-90"])
    said = capsys.readouterr().err
    assert "without int8: precision int8 costs" in said
    assert "without int4: precision int4 costs" in said
    assert re.search(r"fp32: [\d,]+ words/s", said)  # by the real clock
    assert Bundle.load(tmp_path / "bundle").sizes.precision == "fp32"
    assert {path.name for path in (tmp_path / "bundle").iterdir()} == FILES
    adaptive = make_run(tmp_path / "adaptive", ADAPTIVE, words=[f"word{number}" for number in range(40)])
    export.main([str(adaptive), "-o", str(tmp_path / "other"), "--precision", "auto"])
    assert "without int4: " in capsys.readouterr().err
    assert Bundle.load(tmp_path / "other").sizes.precision in ("fp32", "int8")


def test_held_out_text_that_is_gone(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved = shutil.copytree(run, tmp_path / "small")
    manifest = moved / "checkpoints/step-000000007/manifest.json"
    recipe = json.loads(manifest.read_text(encoding="utf-8"))["recipe"]
    edit_json(manifest, recipe=recipe | {"data": recipe["data"] | {"folder": str(tmp_path / "gone")}})
    code, message = failure([moved, "-o", tmp_path / "bundle"], capsys)
    assert code == 66
    assert str(tmp_path / "gone") in message
    assert "--data FOLDER" in message
    export.main([str(moved), "-o", str(tmp_path / "without"), "--data", "none"])
    assert Bundle.load(tmp_path / "without").manifest["held_out"] is None
    assert "--data none" in capsys.readouterr().out
    export.main([str(moved), "-o", str(tmp_path / "with"), "--data", str(run.parent.parent / "data")])
    assert Bundle.load(tmp_path / "with").manifest["held_out"]["tokens"] == 600


def test_held_out_text_of_another_vocabulary(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = make_data(tmp_path / "other", words=WORDS[::-1])
    code, message = failure([run, "-o", tmp_path / "bundle", "--data", other], capsys)
    assert (code, "another vocabulary" in message) == (65, True)
    assert not (tmp_path / "bundle").exists()


def test_an_output_that_is_there(run: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(bundle, tmp_path / "bundle")
    code, message = failure([run, "-o", tmp_path / "bundle"], capsys)
    assert (code, "--overwrite" in message) == (64, True)
    (tmp_path / "bundle/left-over").touch()
    export.main([str(run), "-o", str(tmp_path / "bundle"), "--overwrite"])
    assert not (tmp_path / "bundle/left-over").exists()
    (tmp_path / "papers").mkdir()
    code, message = failure([run, "-o", tmp_path / "papers", "--overwrite"], capsys)
    assert (code, "only bundles" in message) == (64, True)
    (tmp_path / "file").touch()
    code, message = failure([run, "-o", tmp_path / "file/bundle"], capsys)
    assert (code, "nothing can be written" in message) == (64, True)


def test_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert failure([tmp_path / "none", "-o", tmp_path / "bundle"], capsys)[0] == 66
    assert failure([tmp_path, "-o", tmp_path / "bundle"], capsys)[0] == 66
    assert failure(["-o", tmp_path / "bundle"], capsys)[0] == 64


# --- reading a bundle ----------------------------------------------------------------------------------------------


def test_a_changed_file_is_refused(bundle: Path, tmp_path: Path) -> None:
    for name in (MODEL, GENERATION, WEIGHTS, "vocab.txt", "text.json"):
        copy = shutil.copytree(bundle, tmp_path / name)
        with (copy / name).open("ab") as file:
            file.write(b" ")
        with pytest.raises(DataError, match=f"{name} is damaged"):
            Bundle.load(copy)
        (copy / name).unlink()
        with pytest.raises(DataError, match=f"{name} is missing"):
            Bundle.load(copy)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"version": 1}, "version 1; this lmdist reads 'lmdist bundle', version 2"),
        ({"format": "a cake"}, "'a cake'"),
        ({"format": "lmdist checkpoint"}, "lmdist-export"),
        ({"files": {}}, "names no sha256 for its model.onnx"),
        ({"files": None}, "files is None; an object is expected"),
        ({"files": {"model.onnx": {}}}, r"files\.'model\.onnx'\.bytes is missing"),
    ],
)
def test_a_changed_manifest_is_refused(bundle: Path, tmp_path: Path, values: dict[str, object], message: str) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    edit_json(copy / "manifest.json", **values)
    with pytest.raises(DataError, match=message):
        Bundle.load(copy)


def test_a_folder_that_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="is not there"):
        Bundle.load(tmp_path / "none")
    with pytest.raises(MissingInputError, match="is not a bundle"):
        Bundle.load(tmp_path)
    (tmp_path / "manifest.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="is not JSON"):
        Bundle.load(tmp_path)


def test_generation_config_may_be_edited(bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    values: dict[str, Any] = {"temperature": 1, "top_k": 5, "suppress_tokens": [], "bad_words_ids": [[3, 4], [5]]}
    edit_json(copy / "generation_config.json", **values, sequence_bias=[[[5], 1.5], [[6], -2]])
    found = Bundle.load(copy).generation
    assert (found.temperature, found.top_k, found.suppress_tokens) == (1, 5, ())
    assert (list(found.bad_words_ids), [tuple(pair) for pair in found.sequence_bias]) == (
        [[3, 4], [5]],
        [([5], 1.5), ([6], -2)],
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperatur": 1.0}, "'temperatur' is not known here; known are .*temperature"),
        ({"temperature": "hot"}, "temperature is 'hot'; a number"),
        ({"temperature": True}, "temperature is True"),
        ({"temperature": -1.0}, "temperature is -1.0; it must be"),
        ({"top_k": 1.5}, "top_k is 1.5; an integer"),
        ({"top_p": 0}, "top_p is 0; it must be"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 10**15}, "max_new_tokens is 1000000000000000; it must be at most 1,000,000"),
        ({"suppress_tokens": 0}, "suppress_tokens is 0; a list"),
        ({"suppress_tokens": [99]}, "99 is not the id of a token"),
        ({"suppress_tokens": ["<unk>"]}, r"suppress_tokens\[0\] is '<unk>'; an integer"),
        ({"suppress_tokens": list(range(len(WORDS) + 2))}, "leaves no token"),
        ({"min_p": 1.5}, "min_p is 1.5; it must be from 0"),
        ({"typical_p": 0.0}, "typical_p is 0.0; it must be above 0"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; it must be from 1e-06"),
        ({"repetition_penalty": 1e-7}, "repetition_penalty is 1e-07; it must be from 1e-06 to 1,000,000"),
        ({"presence_penalty": 1e7}, "presence_penalty is 10000000.0; it must be from -1,000,000 to 1,000,000"),
        ({"frequency_penalty": -1e18}, "it must be from -1,000,000 to 1,000,000"),
        ({"sequence_bias": [[[5], 1e7]]}, "it must be tokens and numbers, at most 1,000,000"),
        ({"min_new_tokens": 201}, "min_new_tokens is 201; it must be from 0 to max_new_tokens, 200"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1"),
        ({"num_beams": 0}, "num_beams is 0"),
        ({"num_beams": 10**9}, "num_beams is 1000000000; it must be from 1"),
        ({"bad_words_ids": [[5], []]}, "sequences of at least one token"),
        ({"bad_words_ids": [5]}, r"bad_words_ids\[0\] is 5; a list"),
        ({"bad_words_ids": [[5, 99]]}, "99 is not the id of a token"),
        ({"sequence_bias": [[[5, 6], 1.0]]}, "tokens one by one"),
        ({"sequence_bias": [[[5], "much"]]}, r"sequence_bias\[0\]\[1\] is 'much'; a number"),
        ({"sequence_bias": [[[5]]]}, r"sequence_bias\[0\] is \[\[5\]\]; a list of 2 is expected"),
        ({"sequence_bias": [[[99], 1.0]]}, "99 is not the id of a token"),
        ({"eos_token_id": -1}, "-1 is not the id of a token"),
    ],
)
def test_generation_config_with_a_wrong_value(bundle: Path, tmp_path: Path, values: dict[str, object], message: str) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    edit_json(copy / "generation_config.json", **values)
    with pytest.raises(DataError, match=message):
        Bundle.load(copy)


def documents_examples() -> list[str]:
    """The programs in docs/bundle.md."""
    document = (Path(__file__).parents[2] / "docs/bundle.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", document, re.DOTALL)


@pytest.mark.parametrize("example", documents_examples(), ids=lambda example: re.findall(r"\w+\.onnx", example)[0])
def test_the_documents_examples_run(example: str, bundle: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", example], cwd=bundle.parent, capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert result.returncode == 0, result.stderr
    written = result.stdout.split()
    assert len(written) == 50
    assert set(written) <= {*WORDS, "<eos>"}


def documents_tables(title: str) -> list[list[str]]:
    """The rows of the first table under a title of docs/bundle.md, of each its cells."""
    document = (Path(__file__).parents[2] / "docs/bundle.md").read_text(encoding="utf-8")
    table = document.split(f"\n## {title}")[1].split("\n|", 1)[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


@pytest.mark.parametrize("file", [MODEL, GENERATION])
def test_the_documents_tables_are_right(file: str, bundle: Path) -> None:
    """Each name, its type and its axes."""
    model = onnx.load(bundle / file, load_external_data=False)
    sizes = {"V": len(WORDS) + 2, "V'": PADDED, "S": 12 + 12 + 8, "1": 1}
    kinds = {"int64": TensorProto.INT64, "float32": TensorProto.FLOAT, "bool": TensorProto.BOOL}
    said: dict[str, dict[str, tuple[int, list[object]]]] = {"in": {}, "out": {}}
    title = {MODEL: "The step graph", GENERATION: "The generation graph"}[file]
    for place, names, kind, axes, *_ in documents_tables(title):
        cells = [cell.strip() for cell in axes.split(",") if cell.strip()]
        shape: list[object] = [cell.strip("`") if cell.startswith("`") else sizes[cell] for cell in cells]
        for name in re.findall(r"`(\w+)`", names):
            said[place][name] = kinds[kind], shape
    assert said == {"in": described(model.graph.input), "out": described(model.graph.output)}


def test_the_document_names_all_metadata_and_all_fields(bundle: Path) -> None:
    for file in (MODEL, GENERATION):
        keys = {key for row in documents_tables("Metadata") for key in re.findall(r"`(\w+)`", row[0])}
        assert keys - ({"features"} if file == MODEL else set()) == set(facts(onnx.load(bundle / file)))
    fields = [row for row in documents_tables("generation_config.json") for _ in re.findall(r"`(\w+)`", row[0])]
    names = [name for row in documents_tables("generation_config.json") for name in re.findall(r"`(\w+)`", row[0])]
    written = json.loads((bundle / "generation_config.json").read_text(encoding="utf-8"))
    assert {name: json.loads(row[1]) for name, row in zip(names, fields, strict=True)} == written
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    assert {key for row in documents_tables("manifest.json") for key in re.findall(r"`(\w+)`", row[0])} == set(manifest)


def test_help_is_light() -> None:
    result = in_fresh_process("export", ["--help"], {"torch", "onnx", "numpy", "onnxruntime", "nltk"})
    assert result.stderr == "set()\n"
    assert "--overwrite" in result.stdout

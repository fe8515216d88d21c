"""lmdist-export: the graph answers as torch does, or nothing is written."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional

from lmdist.errors import DataError, MissingInputError
from lmdist.files import check_sums
from lmdist.model import LanguageModel
from lmdist.settings import ModelSettings
from lmdist_export import convert, export, verify
from lmdist_export.bundle import Bundle, GenerationConfig
from lmdist_export.sampler import StepGraph
from small_bundles import (
    ADAPTIVE,
    SINGLE,
    TIED,
    UNTIED,
    WORDS,
    command,
    edit_json,
    make_bundle,
    make_data,
    make_model,
    make_run,
)

VOCABULARY_SIZE = 23


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle"))


def graph_of(model: LanguageModel, path: Path) -> StepGraph:
    convert.write_step_graph(model, path, "small")
    return StepGraph(path)


def failure(arguments: list[object], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and message of an export that fails; the message is one line of its own, and no traceback."""
    with pytest.raises(SystemExit) as stop:
        export.main([str(argument) for argument in arguments])
    assert isinstance(stop.value.code, int)
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return stop.value.code, error.splitlines()[-1]


# --- the graph -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [TIED, UNTIED, SINGLE, ADAPTIVE], ids=["tied", "untied", "single", "adaptive"])
def test_the_graph_answers_as_torch_does(settings: ModelSettings, tmp_path: Path) -> None:
    model = make_model(settings, VOCABULARY_SIZE)
    graph = graph_of(model, tmp_path / "model.onnx")
    random = np.random.default_rng(1)
    for rows, length in [(1, 1), (2, 3), (7, 11), (1, 40), (9, 1)]:
        tokens = random.integers(0, VOCABULARY_SIZE, (rows, length))
        h, c = random.normal(size=(2, rows, sum(model.layer_sizes))).astype(np.float32)
        logits, state = graph.step(tokens, (h, c))
        with torch.no_grad():
            hidden, expected_state = model(torch.from_numpy(tokens), (torch.from_numpy(h), torch.from_numpy(c)))
            expected = model.logits(hidden)
        np.testing.assert_allclose(logits, expected.numpy(), atol=1e-5)
        np.testing.assert_allclose(state[0], expected_state[0].numpy(), atol=1e-5)
        np.testing.assert_allclose(state[1], expected_state[1].numpy(), atol=1e-5)


def test_names_types_axes_and_metadata_are_those_of_the_document(tmp_path: Path) -> None:
    graph_of(make_model(TIED, VOCABULARY_SIZE), tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")

    def described(values: object) -> dict[str, tuple[int, list[object]]]:
        return {
            value.name: (
                value.type.tensor_type.elem_type,
                [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim],
            )
            for value in values  # pyright: ignore[reportGeneralTypeIssues]
        }

    state = (onnx.TensorProto.FLOAT, ["batch", 12 + 12 + 8])
    assert described(model.graph.input) == {
        "tokens": (onnx.TensorProto.INT64, ["batch", "time"]),
        "h": state,
        "c": state,
    }
    assert described(model.graph.output) == {
        "logits": (onnx.TensorProto.FLOAT, ["batch", "time", VOCABULARY_SIZE]),
        "next_h": state,
        "next_c": state,
    }
    assert {entry.key: json.loads(entry.value) for entry in model.metadata_props} == {
        "format": "lmdist step graph",
        "version": 1,
        "layer_sizes": [12, 12, 8],
        "vocabulary_size": VOCABULARY_SIZE,
        "embedding_size": 8,
        "tied": True,
        "cutoffs": [],
        "eos_id": 1,
        "unknown_id": 0,
        "run": "small",
    }
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]


@pytest.mark.parametrize("cutoffs", [[0], [5, 5], [9, 5], [5, 23], [5, 9, 12], [-1, 5]])
def test_clusters_that_no_model_has_are_refused(tmp_path: Path, cutoffs: list[int]) -> None:
    path = tmp_path / "model.onnx"
    graph_of(make_model(ADAPTIVE, VOCABULARY_SIZE), path)
    model = onnx.load(path)
    for entry in model.metadata_props:
        if entry.key == "cutoffs":
            entry.value = json.dumps(cutoffs)
    onnx.save(model, path)
    with pytest.raises(DataError, match=r"clusters that no model has|its nodes are others"):
        StepGraph(path)


@pytest.mark.parametrize(("settings", "matrices"), [(SINGLE, 1), (UNTIED, 2)], ids=["tied", "untied"])
def test_a_tied_matrix_is_stored_once(settings: ModelSettings, matrices: int) -> None:
    graph = convert.step_graph(make_model(settings, VOCABULARY_SIZE), "small").graph
    assert sum(VOCABULARY_SIZE in value.dims and len(value.dims) == 2 for value in graph.initializer) == matrices


def test_weights_beyond_protobufs_limit_lie_beside_the_graph(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "PROTOBUF_LIMIT", 100)
    export.main([str(run), "-o", str(tmp_path / "big")])
    assert (tmp_path / "big/model.onnx.data").stat().st_size > 1024  # what is smaller stays in the graph
    manifest = Bundle.load(tmp_path / "big").manifest
    assert "model.onnx.data" in manifest["files"]
    assert manifest["differences"]["logits"] < 1e-5


# --- what verification finds ---------------------------------------------------------------------------------------


def test_a_wrong_graph_is_not_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def torchs_own_order(parameter: NDArray[np.float32]) -> NDArray[np.float32]:
        return parameter

    monkeypatch.setattr(convert, "input_output_forget_cell", torchs_own_order)
    code, message = failure([run, "-o", tmp_path / "bundle"], capsys)
    assert code == 1
    assert re.search(r"nothing was written: logits for 1 rows of 1 words: the largest difference .* allowed is", message)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_graph_leaves_the_bundle_that_is_there(
    run: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(bundle, tmp_path / "bundle")
    monkeypatch.setattr(convert, "array", lambda parameter: parameter.detach().numpy() * np.float32(1.01))
    code, _ = failure([run, "-o", tmp_path / "bundle", "--overwrite"], capsys)
    assert code == 1
    assert Bundle.load(tmp_path / "bundle").manifest == Bundle.load(bundle).manifest
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("part", ["embedding", "projection_bias", "layer_1.R", "layer_0.B"])
def test_one_wrong_number_is_found(part: str, tmp_path: Path) -> None:
    model = make_model(UNTIED, VOCABULARY_SIZE)
    graph = convert.step_graph(model, "small")
    weight = next(value for value in graph.graph.initializer if value.name == part)
    changed = onnx.numpy_helper.to_array(weight).copy()
    changed.reshape(-1)[:: changed.size // 7] += 0.1
    weight.CopyFrom(onnx.numpy_helper.from_array(changed, part))
    onnx.save_model(graph, tmp_path / "model.onnx")
    with pytest.raises(verify.MismatchError):
        verify.check_values(StepGraph(tmp_path / "model.onnx"), model)


def test_a_difference_that_is_no_number_is_a_mismatch() -> None:
    with pytest.raises(verify.MismatchError, match="nan"):
        verify.difference("logits", np.array([np.nan]), np.array([1.0]))


def test_a_model_whose_logits_are_no_numbers_is_refused(tmp_path: Path) -> None:
    model = make_model(SINGLE, VOCABULARY_SIZE)
    with torch.no_grad():
        model.get_parameter("projection.weight").fill_(3e38)
    with pytest.raises(DataError, match="the logits of the model are not finite"):
        verify.check_values(graph_of(model, tmp_path / "model.onnx"), model)


def test_perplexity_is_that_of_cross_entropy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(TIED, VOCABULARY_SIZE)
    monkeypatch.setattr(verify, "HELD_OUT_ROWS", 1)
    monkeypatch.setattr(verify, "HELD_OUT_WORDS", 150)  # more than one piece of 64
    tokens = np.random.default_rng(2).integers(0, VOCABULARY_SIZE, 400)
    measured = verify.check_perplexity(graph_of(model, tmp_path / "model.onnx"), model, "valid", tokens)
    inputs = torch.tensor([[1, *tokens[:149]]])
    with torch.no_grad():
        hidden, _ = model(inputs, model.initial_state(1))
        logits = model.logits(hidden)
        expected = functional.cross_entropy(logits[0], torch.from_numpy(tokens[:150])).exp().item()
    assert measured["tokens"] == 150
    assert measured["torch"] == pytest.approx(expected, rel=1e-5)
    assert measured["onnxruntime"] == pytest.approx(expected, rel=1e-5)


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
    assert names == {"model.onnx", "vocab.txt", "text.json", "generation_config.json", "manifest.json"}


def test_the_manifest_says_what_the_bundle_is(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    model = make_model(TIED, len(WORDS) + 2)
    assert (manifest["format"], manifest["version"], manifest["precision"]) == ("lmdist bundle", 1, "fp32")
    assert manifest["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert (manifest["vocabulary_size"], manifest["layer_sizes"]) == (len(WORDS) + 2, [12, 12, 8])
    assert (manifest["run"], manifest["step"]) == ("small", 7)
    assert set(manifest["differences"]) == {"logits", "next_h", "next_c", "step_by_step"}
    assert all(0 <= value < 1e-5 for value in manifest["differences"].values())
    assert manifest["held_out"]["tokens"] == 600
    assert manifest["held_out"]["torch"] == pytest.approx(manifest["held_out"]["onnxruntime"], rel=1e-5)
    assert set(manifest["versions"]) == {"lmdist", "torch", "onnx", "onnxruntime"}
    check_sums(bundle, manifest["files"])
    assert json.loads((bundle / "generation_config.json").read_text(encoding="utf-8")) == {
        "bos_token_id": 1,
        "eos_token_id": 1,
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "max_new_tokens": 200,
        "suppress_tokens": [0],
    }


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
    for name in ("model.onnx", "vocab.txt", "text.json"):
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
        ({"version": 2}, "version 2"),
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
    edit_json(copy / "generation_config.json", temperature=1, top_k=5, suppress_tokens=[])
    assert Bundle.load(copy).generation == GenerationConfig(temperature=1, top_k=5, suppress_tokens=())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperatur": 1.0}, "'temperatur' is not known here; known are .*temperature"),
        ({"temperature": "hot"}, "temperature is 'hot'; a number"),
        ({"temperature": True}, "temperature is True"),
        ({"temperature": -1.0}, "temperature is -1.0; it must be"),
        ({"top_k": 1.5}, "top_k is 1.5; a whole number"),
        ({"top_p": 0}, "top_p is 0; it must be"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 10**15}, "max_new_tokens is 1000000000000000; it must be at most 1,000,000"),
        ({"suppress_tokens": 0}, "suppress_tokens is 0; a list"),
        ({"suppress_tokens": [99]}, "99 is no word's id"),
        ({"suppress_tokens": ["<unk>"]}, r"suppress_tokens\[0\] is '<unk>'; a whole number"),
        ({"suppress_tokens": list(range(len(WORDS) + 2))}, "leaves no word"),
        ({"eos_token_id": -1}, "-1 is no word's id"),
    ],
)
def test_generation_config_with_a_wrong_value(bundle: Path, tmp_path: Path, values: dict[str, object], message: str) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    edit_json(copy / "generation_config.json", **values)
    with pytest.raises(DataError, match=message):
        Bundle.load(copy)


def test_the_documents_example_runs(bundle: Path) -> None:
    document = (Path(__file__).parent.parent / "docs/bundle.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    result = subprocess.run(
        [sys.executable, "-c", example], cwd=bundle.parent, capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert result.returncode == 0, result.stderr
    written = result.stdout.split()
    assert len(written) == 50
    assert set(written) <= {*WORDS, "<eos>"}


def test_help_is_light() -> None:
    code = (
        "import sys; from lmdist_export import export\n"
        "try: export.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print({'torch', 'onnx', 'numpy', 'onnxruntime', 'nltk'} & set(sys.modules), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stderr == "set()\n"
    assert "--overwrite" in result.stdout

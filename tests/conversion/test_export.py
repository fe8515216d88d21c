"""lmdist-export: a bundle that agrees with torch in every precision, or nothing."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from lmdist.storage.checksums import verify_checksums
from lmdist.storage.held import HeldFolder
from lmdist_export import PRECISIONS, export
from lmdist_export.bundle import GENERATION_GRAPH, STEP_GRAPH, WEIGHTS, Bundle
from lmdist_export.conversion import exporting
from lmdist_export.conversion.weights import quantize_int8
from lmdist_export.graph import cell
from lmdist_export.options import EXPORTED
from lmdist_export.sampling.sampler import Sampler
from support import failures
from support.small_bundles import (
    ADAPTIVE,
    TIED,
    WORDS,
    command,
    edit_json,
    in_fresh_process,
    make_bundle,
    make_data,
    make_model,
    make_run,
)

OF_MLFLOW = {"MLmodel", "served_model.py", "requirements.txt", "python_env.yaml"}
FILES = {STEP_GRAPH, GENERATION_GRAPH, WEIGHTS, "vocab.txt", "text.json", "generation_config.json", "manifest.json", *OF_MLFLOW}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle"))


def failure(arguments: list[object], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and message of an export that fails; the message is one line of its own, and no traceback."""
    return failures.last_line(export.main, capsys, *arguments)


def test_the_command_writes_a_bundle_and_prints_the_next_command(run: Path, tmp_path: Path) -> None:
    result = command("lmdist_export.export", run, "-o", tmp_path / "deep/bundle")
    assert result.returncode == 0, result.stderr
    assert f"lmdist-generate {tmp_path / 'deep/bundle'}" in result.stdout
    assert "step 7" in result.stderr
    names = {path.name for path in (tmp_path / "deep/bundle").iterdir()}
    assert names == FILES


def test_the_manifest_describes_the_bundle(bundle: Path) -> None:
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
    verify_checksums(HeldFolder(bundle), manifest["files"])
    loaded = Bundle.load(bundle)
    assert dataclasses.asdict(loaded.sizes) == manifest["sizes"]
    assert loaded.generation == EXPORTED
    written = json.loads((bundle / "generation_config.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(dataclasses.asdict(EXPORTED)))
    assert written == written | {
        "bos_token_id": 1,
        "eos_token_id": 1,
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 0,
        "top_p": 0.9,
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
        r"Use --precision fp16, or allow it by --max-perplexity-loss (\d+)",
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


def test_unknown_precisions(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for precision in ("int8", "int4", "auto"):
        code, message = failure([run, "-o", tmp_path / "bundle", "--precision", precision, "--data", "none"], capsys)
        assert (code, "needs held-out text" in message) == (64, True)
    adaptive = make_run(tmp_path / "adaptive", ADAPTIVE, words=[f"word{number}" for number in range(40)])
    code, message = failure([adaptive, "-o", tmp_path / "bundle", "--precision", "int4"], capsys)
    assert (code, "adaptive head: use int8" in message) == (64, True)
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

    monkeypatch.setattr(exporting, "tokens_per_second", speed)
    export.main([str(run), "-o", str(tmp_path / "bundle"), "--precision", "auto"])
    output = capsys.readouterr()
    assert seen == ["fp32", "int8", "int4"]
    assert f"lmdist-export: {fastest}: 2,000 tokens/s" in output.err
    assert f"MB, {fastest}, " in output.out
    assert Bundle.load(tmp_path / "bundle").sizes.precision == fastest
    assert {path.name for path in (tmp_path / "bundle").iterdir()} == FILES


def test_auto_skips_precisions_that_cost_too_much_or_fail(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export.main([str(run), "-o", str(tmp_path / "bundle"), "--precision", "auto", "--max-perplexity-loss=-90"])
    output = capsys.readouterr().err
    assert "without int8: precision int8 costs" in output
    assert "without int4: precision int4 costs" in output
    assert re.search(r"fp32: [\d,]+ tokens/s", output)  # by the real clock
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


def test_an_output_that_exists(run: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    assert (code, f"{tmp_path / 'file'} is not a folder" in message) == (64, True)


def test_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert failure([tmp_path / "none", "-o", tmp_path / "bundle"], capsys)[0] == 66
    assert failure([tmp_path, "-o", tmp_path / "bundle"], capsys)[0] == 66
    assert failure(["-o", tmp_path / "bundle"], capsys)[0] == 64


OF_AN_OUTPUT = (
    "--precision int8",
    "--data none",
    "--layout web",
    "--max-perplexity-loss 2.0",
    "--onnxruntime-web .",
    "--overwrite",
)


@pytest.mark.parametrize("flag", OF_AN_OUTPUT)
@pytest.mark.parametrize("asked", [("--vectors", "a.vec"), ("--register", "a")])
def test_a_flag_that_changes_nothing_is_not_ignored(
    asked: tuple[str, str], flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, message = failure([tmp_path / "run", *asked, *flag.split()], capsys)
    assert (code, f"{flag}: without -o nothing is written that it could change" in message) == (64, True), message


def test_vectors_beside_a_bundle_are_of_the_checkpoint_that_was_read_once(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read = []
    load = exporting.TrainedModel.load
    monkeypatch.setattr(exporting.TrainedModel, "load", lambda path: read.append(path) or load(path))
    export.main([str(run), "--vectors", str(tmp_path / "a.vec"), "-o", str(tmp_path / "bundle"), "--data", "none"])
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines() if line][:2] == ["vectors", "bundle"]
    assert (tmp_path / "a.vec").read_text().startswith(f"{len(WORDS) + 2} 8\n")
    assert Bundle.load(tmp_path / "bundle")
    assert read == [run]


def test_a_wrong_graph_is_not_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def torchs_own_order(parameter: NDArray[np.float32]) -> NDArray[np.float32]:
        return parameter

    monkeypatch.setattr(cell, "onnx_gates", torchs_own_order)
    code, message = failure([run, "-o", tmp_path / "bundle"], capsys)
    assert code == 1
    assert re.search(r"nothing was written: logits for 1 row of 1 token: the max error .* allowed is", message)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_graph_leaves_the_existing_bundle(
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


def test_a_full_memory_is_one_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(exporting, "check_values", lambda *_: np.empty(1 << 50))
    code, message = failure([run, "-o", tmp_path / "bundle", "--data", "none"], capsys)
    assert code == 64
    assert "this machine's memory is full: end what else uses it" in message
    assert list(tmp_path.iterdir()) == []


def test_help_is_light() -> None:
    result = in_fresh_process("export", ["--help"], {"torch", "onnx", "numpy", "onnxruntime", "nltk"})
    assert result.stderr == "set()\n"
    assert "--overwrite" in result.stdout

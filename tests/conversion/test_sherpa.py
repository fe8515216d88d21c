"""lmdist-export --layout sherpa-onnx: the contract by onnxruntime, and sherpa-onnx itself, which decodes with the model."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from lmdist.model.language_model import LanguageModel
from lmdist.settings import ModelSettings, PrepareSettings
from lmdist.text.prepare import prepare
from lmdist.training.checkpoints.read import open_checkpoint
from lmdist_export import export
from lmdist_export.conversion import sherpa
from lmdist_export.graph import cell
from lmdist_export.sampling.runtime import open_session
from support import failures
from support.small_bundles import ADAPTIVE, SINGLE, TIED, UNTIED, WORDS, command, make_bundle, make_run, run_of_data

ROOT = Path(__file__).parents[2]
STEP = "checkpoints/step-000000007"
EVERY_SHAPE = pytest.mark.parametrize(
    "settings", [TIED, UNTIED, SINGLE, ADAPTIVE], ids=["tied, layers of two sizes", "untied", "single", "adaptive"]
)


def export_sherpa(folder: Path, settings: ModelSettings) -> tuple[Path, LanguageModel]:
    """The folder, exported as a user exports it, and the model it came from."""
    run = make_run(folder, settings)
    export.main([str(run), "-o", str(folder / "sherpa"), "--layout", "sherpa-onnx"])
    return folder / "sherpa", open_checkpoint(run / STEP).model()


def log_probabilities(model: LanguageModel, words: list[int]) -> NDArray[np.float32]:
    """Of all words (T + 1, V), before the first of `words` and after each, by torch."""
    with torch.no_grad():
        hidden, _ = model(torch.tensor([[1, *words]]), model.initial_state(1))
        return model.logits(hidden)[0].log_softmax(1).numpy()


def failure(arguments: list[object], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and message of an export that fails."""
    return failures.last_line(export.main, capsys, *arguments, "--layout", "sherpa-onnx")


# --- the contract --------------------------------------------------------------------------------------------------


@EVERY_SHAPE
def test_log_probabilities_token_by_token_are_torchs(settings: ModelSettings, tmp_path: Path) -> None:
    folder, model = export_sherpa(tmp_path, settings)
    session = open_session(folder / "with-state-rnnlm.onnx", "cpu", 1)
    metadata = session.get_modelmeta().custom_metadata_map
    words = [int(word) for word in np.random.default_rng(3).integers(0, model.vocabulary_size, 30)]
    # What sherpa-onnx does: zeros by the metadata's sizes, the word of sos_id, then token by token with the state fed back.
    h = c = np.zeros((int(metadata["num_layers"]), 1, int(metadata["hidden_size"])), np.float32)
    found = []
    for word in [int(metadata["sos_id"]), *words]:
        log_softmax, h, c = session.run(None, {"x": np.array([[word]]), "h0": h, "c0": c})
        found.append(log_softmax[0])
    np.testing.assert_allclose(found, log_probabilities(model, words), atol=1e-4, rtol=1e-5)
    np.testing.assert_allclose(np.exp(found).sum(axis=1), 1, atol=1e-5)


def test_names_types_axes_and_metadata_are_icefalls(tmp_path: Path) -> None:
    folder, _ = export_sherpa(tmp_path, TIED)
    session = open_session(folder / "with-state-rnnlm.onnx", "cpu", 1)
    state, size = ["N", 12], len(WORDS) + 2
    assert [(value.name, value.type, value.shape) for value in session.get_inputs()] == [
        ("x", "tensor(int64)", ["N", 1]),
        ("h0", "tensor(float)", [3, *state]),
        ("c0", "tensor(float)", [3, *state]),
    ]
    assert [(value.name, value.type, value.shape) for value in session.get_outputs()] == [
        ("log_softmax", "tensor(float)", ["N", size]),
        ("next_h0", "tensor(float)", [3, *state]),
        ("next_c0", "tensor(float)", [3, *state]),
    ]
    assert session.get_modelmeta().custom_metadata_map == {
        "model_type": "rnnlm",
        "version": "1",
        "comment": "small, step 7",
        "sos_id": "1",
        "eos_id": "1",
        "vocab_size": str(size),
        "num_layers": "3",
        "hidden_size": "12",
        "embedding_dim": "8",
    }
    lines = (folder / "tokens.txt").read_text(encoding="utf-8").splitlines()
    assert lines == [f"{word} {number}" for number, word in enumerate(["<unk>", "<eos>", *WORDS])]


def test_rows_do_not_mix(tmp_path: Path) -> None:
    folder, _ = export_sherpa(tmp_path, TIED)
    session = open_session(folder / "with-state-rnnlm.onnx", "cpu", 1)
    h, c = np.random.default_rng(4).normal(size=(2, 3, 5, 12)).astype(np.float32)
    words = np.array([[3], [1], [4], [1], [5]])
    together = session.run(None, {"x": words, "h0": h, "c0": c})
    for row in range(5):
        here = slice(row, row + 1)
        alone = session.run(None, {"x": words[here], "h0": h[:, here], "c0": c[:, here]})
        np.testing.assert_allclose(together[0][here], alone[0], atol=1e-5)
        np.testing.assert_allclose(together[1][:, here], alone[1], atol=1e-5)
        np.testing.assert_allclose(together[2][:, here], alone[2], atol=1e-5)


# --- sherpa-onnx itself --------------------------------------------------------------------------------------------

# It ends the process where a model is not what it expects, and brings an onnxruntime of its own: so it has its own process.
RECOGNIZE = """
import json, sys
import numpy as np
import sherpa_onnx
options = json.loads(sys.argv[1])
recognizer = sherpa_onnx.OnlineRecognizer.from_transducer(
    decoding_method="modified_beam_search", max_active_paths=64, model_type="lstm", num_threads=1, **options
)
stream = recognizer.create_stream()
stream.accept_waveform(16000, np.zeros(8000, np.float32))
while recognizer.is_ready(stream):
    recognizer.decode_stream(stream)
print(json.dumps([recognizer.tokens(stream), recognizer.lm_probs(stream)]))
"""


NEEDS_SHERPA = pytest.mark.skipif(importlib.util.find_spec("sherpa_onnx") is None, reason="sherpa-onnx is not installed")


def recognized(folder: Path, model: LanguageModel, names: list[str], tokens: Path, heard: NDArray[np.int64]) -> None:
    """Have sherpa-onnx decode what is heard, and compare it with the likeliest of all sequences (6, 2) by torch."""
    transducer = write_transducer(folder.parent / "transducer", heard, len(names))

    def score(sentence: tuple[int, ...]) -> float:
        return float(log_probabilities(model, list(sentence))[range(6), sentence].sum())

    most_likely = max(itertools.product(*heard.tolist()), key=score)
    options = transducer | {"tokens": str(tokens), "lm": str(folder / "with-state-rnnlm.onnx"), "lm_scale": 0.7}
    done = subprocess.run([sys.executable, "-c", RECOGNIZE, json.dumps(options)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "initializer" not in done.stderr  # nothing in the graph that onnxruntime would complain of
    found, scores = json.loads(done.stdout.splitlines()[-1])
    assert found == [names[token] for token in most_likely]
    assert scores == pytest.approx(log_probabilities(model, list(most_likely))[range(6), most_likely], abs=1e-4)


@NEEDS_SHERPA
@EVERY_SHAPE
def test_sherpa_onnx_chooses_the_words_that_the_model_holds_likely(settings: ModelSettings, tmp_path: Path) -> None:
    folder, model = export_sherpa(tmp_path, settings)
    words = ["<unk>", "<eos>", *WORDS]
    # In each of six moments the transducer hears one of two words and cannot tell which.
    heard = np.random.default_rng(5).permutation(np.arange(2, len(words)))[:12].reshape(6, 2)
    recognized(folder, model, words, folder / "tokens.txt", heard)


@NEEDS_SHERPA
def test_a_recognizers_own_pieces(tmp_path: Path) -> None:
    """Its BPE-500 model, as icefall trains one: the model for it has its ids, and it decodes with its own tokens.txt."""
    sentencepiece: Any = pytest.importorskip("sentencepiece")
    text = tmp_path / "transcripts.txt"
    text.write_text("".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md")).upper())
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "bpe"), model_type="bpe", vocab_size=500, character_coverage=1.0,
        user_defined_symbols=["<blk>", "<sos/eos>"], unk_id=2, bos_id=-1, eos_id=-1, num_threads=1, minloglevel=9,
    )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "bpe.model"))
    names = [processor.id_to_piece(token) for token in range(500)]
    tokens = tmp_path / "tokens.txt"
    tokens.write_text("".join(f"{name} {token}\n" for token, name in enumerate(names)), encoding="utf-8")
    settings = PrepareSettings(train=str(text), tokenizer=str(tmp_path / "bpe.model"), lines=True)
    prepare(settings, tmp_path / "data")
    run = run_of_data(tmp_path, tmp_path / "data", UNTIED)
    export.main([str(run), "-o", str(tmp_path / "sherpa"), "--layout", "sherpa-onnx"])
    spoken = [token for token in processor.encode("THE WORDS OF A MODEL ARE READ FROM A FILE") if token > 2]
    others = np.random.default_rng(5).permutation(np.setdiff1d(np.arange(3, 500), spoken))
    shown = [name.replace("▁", " ") for name in names]  # as sherpa-onnx shows them
    recognized(
        tmp_path / "sherpa", open_checkpoint(run / STEP).model(), shown, tokens, np.stack([spoken[:6], others[:6]], axis=1)
    )


@NEEDS_SHERPA
def test_sherpa_onnxs_rescoring_fails_and_is_not_wrong(tmp_path: Path) -> None:
    folder, _ = export_sherpa(tmp_path, SINGLE)
    transducer = write_transducer(tmp_path / "transducer", np.arange(2, 14).reshape(6, 2), len(WORDS) + 2)
    files = {"tokens": str(folder / "tokens.txt"), "lm": str(folder / "with-state-rnnlm.onnx")}
    options = json.dumps(transducer | files | {"lm_shallow_fusion": False})
    done = subprocess.run([sys.executable, "-c", RECOGNIZE, options], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "invalid dimensions for input: x" in done.stderr


def write_transducer(folder: Path, heard: NDArray[np.int64], words: int) -> dict[str, str]:
    """A streaming transducer that hears the words of heard[t] in moment t, (T, 2), whatever the sound; the options for it."""
    folder.mkdir()
    scores = np.full((1, len(heard), words), -40, np.float32)  # (1, T, V)
    np.put_along_axis(scores[0], heard, 0, axis=1)
    state, encoded = [1, "N", 4], ["N", words]

    def value(name: str, shape: list[int | str], kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    def save(name: str, graph: onnx.GraphProto, **metadata: object) -> str:
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
        helper.set_model_props(model, {key: str(item) for key, item in metadata.items()})
        onnx.checker.check_model(model)
        onnx.save_model(model, folder / f"{name}.onnx")
        return str(folder / f"{name}.onnx")

    encoder = helper.make_graph(
        [
            helper.make_node("Constant", [], ["encoder_out"], value=numpy_helper.from_array(scores)),
            helper.make_node("Identity", ["h"], ["next_h"]),
            helper.make_node("Identity", ["c"], ["next_c"]),
        ],
        "encoder",
        [value("x", ["N", 9, 80]), value("h", state), value("c", state)],
        [value("encoder_out", [1, len(heard), words]), value("next_h", state), value("next_c", state)],
    )
    decoder = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "y"], ["rows"]),
            helper.make_node("Squeeze", ["rows", "axis"], ["decoder_out"]),
        ],
        "decoder",
        [value("y", ["N", 1], TensorProto.INT64)],
        [value("decoder_out", encoded)],
        [
            numpy_helper.from_array(np.zeros((words, words), np.float32), "table"),
            numpy_helper.from_array(np.array([1]), "axis"),
        ],
    )
    joiner = helper.make_graph(
        [helper.make_node("Add", ["encoder_out", "decoder_out"], ["logit"])],
        "joiner",
        [value("encoder_out", encoded), value("decoder_out", encoded)],
        [value("logit", encoded)],
    )
    # Of half a second of sound the first 9 frames are one piece, and there is no second.
    sizes = {"num_encoder_layers": 1, "T": 9, "decode_chunk_len": 1000, "rnn_hidden_size": 4, "d_model": 4}
    return {
        "encoder": save("encoder", encoder, model_type="lstm", **sizes),
        "decoder": save("decoder", decoder, vocab_size=words, context_size=1),
        "joiner": save("joiner", joiner, joiner_dim=words),
    }


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command_prints_what_it_wrote_and_how_to_use_it(tmp_path: Path) -> None:
    run = make_run(tmp_path, UNTIED)
    done = command("lmdist_export.export", run, "-o", tmp_path / "deep/sherpa", "--layout", "sherpa-onnx")
    assert done.returncode == 0, done.stderr
    assert "small, step 7" in done.stderr
    assert f'lm="{tmp_path / "deep/sherpa/with-state-rnnlm.onnx"}"' in done.stdout
    assert "log_softmax" in done.stdout
    assert {path.name for path in (tmp_path / "deep/sherpa").iterdir()} == {"with-state-rnnlm.onnx", "tokens.txt"}


def test_only_a_folder_of_this_layout_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = make_bundle(tmp_path, SINGLE)
    run = tmp_path / "runs/small"
    ours = tmp_path / "sherpa"
    export.main([str(run), "-o", str(ours), "--layout", "sherpa-onnx"])
    code, message = failure([run, "-o", ours], capsys)
    assert (code, "--overwrite" in message) == (64, True)
    before = os.stat(ours).st_ino
    export.main([str(run), "-o", str(ours), "--layout", "sherpa-onnx", "--overwrite"])
    assert os.stat(ours).st_ino != before
    (ours / "notes.txt").touch()
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for other in (ours, bundle, tmp_path / "file", tmp_path / "empty"):
        code, message = failure([run, "-o", other, "--overwrite"], capsys)
        assert (code, "--overwrite replaces only" in message) == (64, True)
    assert (ours / "notes.txt").exists()
    with pytest.raises(SystemExit) as stop:
        export.main([str(run), "-o", str(ours), "--overwrite"])
    assert stop.value.code == 64


def test_a_wrong_graph_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, UNTIED)
    monkeypatch.setattr(cell, "onnx_gates", lambda parameter: parameter)
    code, message = failure([run, "-o", tmp_path / "out/sherpa"], capsys)
    assert code == 1
    assert "nothing was written: log_softmax for 1 row, token 1: the max error" in message
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("part", ["embedding", "projection_bias", "layer_1.R", "layer_0.B"])
def test_one_wrong_number_is_found(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = sherpa.weights

    def wrong(model: LanguageModel) -> dict[str, NDArray[np.float32]]:
        found = right(model)
        changed = found[part].copy()
        changed.reshape(-1)[:: changed.size // 7] += 0.1
        return found | {part: changed}

    monkeypatch.setattr(sherpa, "weights", wrong)
    with pytest.raises(SystemExit) as stop:
        export.main([str(make_run(tmp_path, UNTIED)), "-o", str(tmp_path / "sherpa"), "--layout", "sherpa-onnx"])
    assert stop.value.code == 1


def test_weights_beyond_protobufs_limit_lie_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sherpa, "PROTOBUF_LIMIT", 100)
    folder, _ = export_sherpa(tmp_path, TIED)
    assert (folder / "with-state-rnnlm.onnx.data").stat().st_size > 1024
    assert sherpa.is_layout(folder)


def test_a_word_with_a_blank_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, SINGLE, words=["good", "good bye"])
    code, message = failure([run, "-o", tmp_path / "sherpa"], capsys)
    assert (code, "'good bye' has whitespace in it" in message) == (65, True)
    assert not (tmp_path / "sherpa").exists()


@pytest.mark.parametrize("flag", [("--data", "data"), ("--precision", "int8"), ("--max-perplexity-loss", "2.0")])
def test_a_flag_of_bundles_is_not_ignored_in_silence(
    flag: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, message = failure([tmp_path / "run", "-o", tmp_path / "sherpa", *flag], capsys)
    assert (code, " ".join(flag) in message, "leave it out" in message) == (64, True, True)


def test_held_out_text_is_not_needed(tmp_path: Path) -> None:
    run = make_run(tmp_path, SINGLE)
    shutil.rmtree(tmp_path / "data")
    export.main([str(run), "-o", str(tmp_path / "sherpa"), "--layout", "sherpa-onnx"])
    assert sherpa.is_layout(tmp_path / "sherpa")

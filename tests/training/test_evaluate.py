"""lmdist-evaluate: perplexity equals that of one pass in torch, for any window and number of ranks."""

from __future__ import annotations

import gc
import json
import math
import os
import re
import shutil
import subprocess
import sys
import weakref
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from corpora import chain, write_data_folder
from lmdist import config
from lmdist.settings import PrepareSettings, Recipe
from lmdist.storage.reading import read_json
from lmdist.text.prepare import prepare
from lmdist.tracking import sync
from lmdist.tracking.metadata import read_metadata
from lmdist.tracking.run_folder import read_metrics
from lmdist.tracking.store import Store
from lmdist.training import measuring
from lmdist.training.checkpoints.read import Checkpoint, open_checkpoint
from lmdist.training.checkpoints.retain import find_checkpoint
from lmdist.training.distributed import World
from lmdist.training.evaluate import json_numbers, main
from lmdist.training.measuring import evaluate, unigram_nats
from servers import free_port
from support.jobs import losses, train_here

ONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run, and its data folder."""
    folder = tmp_path_factory.mktemp("evaluate")
    splits = {"train": chain(1503, 30), "valid": chain(103, 30, seed=1), "test": chain(99, 30, seed=2)}
    data = write_data_folder(folder / "data", splits, 30)
    run = folder / "run"
    address = "https://reader:geheim@host/a.csv?sig=abcdef"
    train_here(f"--data.folder={data}", f"--run_folder={run}", "--training.epochs=4", f"--prepare.train={address}")
    return run, data


@pytest.fixture
def command(capsys):
    """Return a function that runs lmdist-evaluate in this process, checks its exit code and returns stdout and stderr."""

    def run(*arguments: object, code: int = 0) -> Any:
        with pytest.raises(SystemExit) if code else nullcontext() as ended:
            main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        assert code == (ended.value.code if ended else 0), output.err
        return output

    return run


@pytest.mark.slow
def test_the_test_perplexity_is_added_to_the_run_and_to_mlflow(trained, command, tmp_path, monkeypatch, empty_store):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{shutil.copy(empty_store, tmp_path / 'store.db')}")
    run, _ = trained
    sync.upload(run)
    step = read_json(find_checkpoint(run) / "manifest.json")["progress"]["step"]

    def added() -> list[dict[str, float]]:
        return [row for row in read_metrics(run / "metrics.jsonl") if "test/perplexity" in row]

    before = len(added())
    command(run, "--split=valid")
    (tmp_path / "test").write_text("w3 w4\n")
    command(run, f"--file={tmp_path / 'test'}")
    assert len(added()) == before, "another text's perplexity is not the run's"
    printed = json.loads(command(run, "--json", "--streams=3").out)
    assert "lmdist-sync" not in command(run, "--streams=3").err
    (row,) = added()[before:]
    assert (row["step"], row["test/perplexity"], row["test/streams"]) == (step, printed["perplexity"], 3)
    found = Store(f"sqlite:///{tmp_path}/store.db").get_run(read_metadata(run)["run_id"])
    assert found
    assert found.data.metrics["test/perplexity"] == printed["perplexity"]
    assert found.data.metrics["test/unknown_rate"] == printed["unknown_rate"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    refused = command(run, "--streams=2")
    assert "perplexity" in refused.out
    assert f"MLflow does not get the figures (ConnectionRefusedError: Connection refused); lmdist-sync {run}" in refused.err


def test_perplexity_is_that_of_one_pass_over_all_tokens(trained):
    run, data = trained
    model = open_checkpoint(find_checkpoint(run)).model()
    tokens = torch.from_numpy(np.fromfile(data / "test.bin", "<u2").astype(np.int64))
    inputs = torch.cat([torch.tensor([1]), tokens[:-1]])
    with torch.no_grad():
        hidden, _ = model(inputs[None], model.initial_state(1))
        expected = functional.cross_entropy(model.projection(hidden)[0], tokens).item()
    in_pod = {**os.environ, "WORLD_SIZE": "4", "RANK": "3"}  # of a training job, where this is one process all the same
    command = [sys.executable, "-m", "lmdist.training.evaluate", run, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=in_pod)
    figures = json.loads(done.stdout)
    assert figures["nats_per_token"] == pytest.approx(expected, abs=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
    assert figures["tokens"] == figures["words"] == 99  # the second is the name of before
    assert figures["perplexity"] < figures["unigram_perplexity"]
    assert not figures.keys() & {"perplexity_per_word", "bits_per_byte", "original_words"}, "a folder of before has no counts"
    assert not losses(run, "valid/bits_per_byte")


@pytest.mark.parametrize("window", [1, 7, 200])
def test_the_window_changes_nothing(trained, window):
    run, data = trained
    model = open_checkpoint(find_checkpoint(run)).model()
    tokens = np.fromfile(data / "test.bin", "<u2")
    nats = evaluate(model, tokens, 1, window, ONE)
    assert nats.count == 99
    assert nats.mean() == pytest.approx(evaluate(model, tokens, 1, 99, ONE).mean(), abs=1e-6)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_share_the_streams_out(trained, size):
    """What the ranks measure adds up to what one rank measures, also where they have unequal shares."""
    run, data = trained
    model = open_checkpoint(find_checkpoint(run)).model()
    tokens = np.fromfile(data / "valid.bin", "<u2")
    parts = [evaluate(model, tokens, 10, 7, World(rank, size, torch.device("cpu"))) for rank in range(size)]
    whole = evaluate(model, tokens, 10, 7, ONE)
    assert sum(part.count for part in parts) == whole.count == 103
    assert sum(part.sum.item() for part in parts) == pytest.approx(whole.sum.item(), rel=1e-6)


def test_the_validation_in_training_is_the_same_figure(trained, command):
    run, _ = trained
    figures = json.loads(command(run, "--split=valid", "--streams=10", "--json").out)
    assert figures["nats_per_token"] == pytest.approx(min(losses(run, "valid/loss")), abs=1e-5)


def test_a_file_is_tokenized_as_the_training_text_was(trained, tmp_path, command):
    run, _ = trained
    text = tmp_path / "text.txt"
    text.write_text("w3 w4 zebra\nw5\n")
    figures = json.loads(command(run, f"--file={text}", "--json").out)
    assert figures["words"] == 6  # with an end mark after each of the lines
    assert figures["unknown_rate"] == pytest.approx(1 / 6)
    assert "unigram_perplexity" not in figures
    assert (figures["documents"], figures["skipped"]) == (2, {})
    assert (figures["original_words"], figures["bytes"]) == (6, 15)
    assert figures["perplexity_per_word"] == pytest.approx(figures["perplexity"])
    assert figures["bits_per_byte"] == pytest.approx(6 * figures["nats_per_token"] / math.log(2) / 15)
    text.write_text("id;w\n" + "1;w3 w4\n" * 3)
    text = text.rename(tmp_path / "text.csv")
    assert "--text-column" in command(run, f"--file={text}", code=65).err
    assert re.search("skipped +2 duplicate", command(run, f"--file={text}", "--text-column=w").out)


def test_no_credentials_are_shown_or_kept(trained, command):
    run, _ = trained
    files = [path.read_bytes() for path in run.rglob("*") if path.is_file()]
    assert any(b"https://host/a.csv?..." in data for data in files)
    assert not any(secret in data for data in files for secret in (b"reader", b"geheim", b"abcdef"))
    assert (
        config.named_settings(Recipe(prepare=PrepareSettings(train="s3://k:geheim@b/*.csv")))["prepare.train"] == "s3://b/*.csv"
    )
    pytest.importorskip("fsspec").filesystem("memory").pipe("/reader:geheim@texts/a.txt", b"w3 w4\n")
    output = command(run, "--file=memory://reader:geheim@texts/a.txt", "--json")
    assert json.loads(output.out)["text"] == "memory://texts/a.txt"
    assert "geheim" not in output.out + output.err


def test_figures_of_the_original_text_compare_whatever_the_tokenizer(tmp_path, command, capsys):
    """Printed and logged with each validation, and the same by lmdist-evaluate on the split and on a file with its text."""
    lines = [f"The cat, number {number}, isn't {number * 7}!" for number in range(60)]
    paths = {split: tmp_path / f"{split}.txt" for split in ("train", "valid", "test")}
    for number, path in enumerate(paths.values()):
        path.write_text("\n".join(lines[number::3]) + "\n")
    words, size = (sum(len(line.split()) + 1 for line in lines[2::3]), sum(len(line) + 1 for line in lines[2::3]))
    tokens = {}
    for tokenizer in ("wordpunct", "characters"):
        run, data = tmp_path / tokenizer, tmp_path / f"data-{tokenizer}"
        given: dict[str, Any] = {split: str(path) for split, path in paths.items()}
        prepare(PrepareSettings(**given, lines=True, tokenizer=tokenizer, min_count=1), data)
        train_here(f"--data.folder={data}", f"--run_folder={run}", "--training.epochs=1", "--data.valid_batch=1")
        [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("valid step ")]
        facts = read_json(data / "meta.json")["splits"]["valid"]
        nats = losses(run, "valid/loss")[-1] * facts["tokens"]
        assert losses(run, "valid/perplexity_per_word") == [pytest.approx(math.exp(nats / facts["original_words"]))]
        assert losses(run, "valid/bits_per_byte") == [pytest.approx(nats / math.log(2) / facts["bytes"])]
        assert f"bits/byte {losses(run, 'valid/bits_per_byte')[0]:.4f}" in line
        tested = json.loads(command(run, "--json").out)
        tokens[tokenizer] = tested["words"]
        assert (tested["original_words"], tested["bytes"]) == (words, size)
        assert losses(run, "test/perplexity_per_word") == [pytest.approx(tested["perplexity_per_word"])]
        assert losses(run, "test/bits_per_byte") == [pytest.approx(tested["bits_per_byte"])]
        on_file = json.loads(command(run, f"--file={paths['test']}", "--lines", "--json").out)
        assert {name: on_file[name] for name in tested.keys() & on_file.keys() - {"text", "tokens_per_second"}} == {
            name: tested[name] for name in tested.keys() & on_file.keys() - {"text", "tokens_per_second"}
        }
    assert tokens["wordpunct"] < tokens["characters"]


@pytest.mark.parametrize("damage", [{"original_words": "7"}, {"original_words": 0, "bytes": 9}, {"bytes": 9}])
def test_damaged_counts_are_one_line(trained, tmp_path, command, damage):
    run, data = trained
    copy = shutil.copytree(data, tmp_path / "data")
    meta = read_json(copy / "meta.json")
    meta["splits"]["test"] |= damage
    (copy / "meta.json").write_text(json.dumps(meta))
    assert "meta.json" in command(run, f"--data={copy}", code=65).err


def test_json_has_null_where_a_perplexity_is_no_number():
    assert json_numbers({"perplexities": [math.inf, 2.0], "skipped": {"a": 1}}) == {
        "perplexities": [None, 2.0],
        "skipped": {"a": 1},
    }


def test_a_full_memory_is_one_line(trained, command, monkeypatch):
    monkeypatch.setattr(measuring, "evaluate", lambda *_: torch.empty(1 << 50))
    assert "this machine's memory is full: lower --streams or --cache (" in command(trained[0], code=64).err


def test_an_ensemble_has_one_model_in_memory_at_a_time(trained, command, monkeypatch):
    build, built = Checkpoint.model, []

    def model(checkpoint):
        gc.collect()
        assert not any(former() for former in built), "the model before is still there"
        built.append(weakref.ref(found := build(checkpoint)))
        return found

    monkeypatch.setattr(Checkpoint, "model", model)
    command(trained[0], trained[0], trained[0])
    assert len(built) == 3


def test_unigram_model():
    train_tokens, tokens = np.array([0, 1, 1, 2], dtype=np.uint16), np.array([1, 3], dtype=np.uint16)
    assert unigram_nats(train_tokens, tokens, 4) == pytest.approx(-(math.log(3 / 8) + math.log(1 / 8)) / 2)


def test_mistakes(trained, tmp_path, command):
    run, _ = trained
    assert "nowhere does not exist" in command("nowhere", code=66).err
    assert "holds no checkpoint" in command(tmp_path, code=66).err
    assert "give one or the other" in command(run, "--file=x", "--split=test", code=64).err
    assert "x.txt" in command(run, "--file=x.txt", code=66).err
    assert "--streams" in command(run, "--streams=0", code=64).err
    other = write_data_folder(tmp_path / "other", {"train": chain(451, 31), "test": chain(99, 31)}, 31)
    assert "another vocabulary" in command(run, f"--data={other}", code=65).err


def test_the_data_folder_is_asked_for_where_it_is_elsewhere(trained, command):
    run, data = trained
    moved = data.rename(data.with_name("moved"))
    try:
        error = command(run, code=66).err
        assert f"the data folder {data}, which the model was trained on, does not exist here: give its place by --data" in error
        assert "lmdist-prepare" not in error
        assert "perplexity" in command(run, f"--data={moved}").out
    finally:
        moved.rename(data)
    without_test = write_data_folder(data.with_name("without"), {"train": chain(451, 30), "valid": chain(99, 30)}, 30)
    assert "has no test split: give --split train or valid, or --file" in command(run, f"--data={without_test}", code=66).err


def test_damaged_checkpoints_are_rejected_in_one_line(trained, tmp_path, command):
    run, _ = trained
    whole = find_checkpoint(run)
    for name in ("model.safetensors", "vocab.txt", "manifest.json"):
        broken = tmp_path / f"broken-{name}"
        broken.mkdir()
        for file in whole.iterdir():
            (broken / file.name).write_bytes(file.read_bytes()[: -9 if file.name == name else None])
        output = command(broken, code=65)
        assert name in output.err
        assert len(output.err.splitlines()) == 1

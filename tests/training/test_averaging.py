"""Averages of the parameters: the mean that the papers say, resumed bit for bit, and what is evaluated and exported.

And what else follows from validations: the end of a run that no longer improves.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from corpora import chain, write_data_folder
from lmdist.errors import DataError, UsageError
from lmdist.storage.held import HeldFolder
from lmdist.storage.reading import read_json, write_json
from lmdist.training import evaluate, loop, measuring
from lmdist.training.averaging import is_nonmonotone
from lmdist.training.checkpoints.read import open_checkpoint, read_tensors
from lmdist.training.checkpoints.retain import find_checkpoint, newest_checkpoint
from lmdist_export import export
from lmdist_export.bundle import Bundle
from lmdist_export.sampling.sampler import Sampler
from support.jobs import SMALL, losses, small_data, train, train_here
from support.small_bundles import edit_json

# A rate so high that validation soon gets worse, which is what begins the mean of nt-asgd.
AVERAGES = {
    "ema": ["--averaging.name=ema", "--averaging.decay=0.6"],
    "nt-asgd": "--averaging.name=nt-asgd --averaging.nonmonotone_interval=1 --optimizer.name=sgd --optimizer.learning_rate=40 "
    "--schedule.name=constant".split(),
}
STEPS = 14


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return small_data(tmp_path_factory.mktemp("averaging") / "data")


def flags(data: Path, run: Path, name: str, *more: str, steps: int = STEPS) -> list[str]:
    """Return the flags of a run of `STEPS` steps with an average, validated every second step."""
    run_flags = [f"--data.folder={data}", f"--run_folder={run}", "--training.validate_every=2", f"--training.steps={steps}"]
    return [*run_flags, *AVERAGES[name], *more]


def tensors(run: Path, step: int = STEPS) -> dict[str, dict[str, torch.Tensor]]:
    """Return the tensors of each file of a checkpoint."""
    folder = run / "checkpoints" / f"step-{step:09d}"
    return {path.name: read_tensors(HeldFolder(folder), path.name) for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("name", AVERAGES)
def test_the_average_is_that_of_the_definition(data, tmp_path, name):
    """From the parameters after each step, which the run has saved."""
    run = tmp_path / "run"
    train_here(*flags(data, run, name, "--checkpoint.every_steps=1", "--checkpoint.keep=99"))
    began = read_json(run / "checkpoints" / f"step-{STEPS:09d}" / "manifest.json")["progress"]["averaged_from"]
    validations = losses(run, "valid/loss")
    if name == "ema":
        assert began == 0
    else:
        first = next(n for n in range(1, 7) if is_nonmonotone(validations[: n + 1], 1))
        assert began == 2 * (first + 1) < STEPS - 2, "too late to show anything"
        assert "averaged.safetensors" not in tensors(run, began - 1)
    expected = None
    for step in range(began + 1, STEPS + 1):
        count = step - began - 1
        found = tensors(run, step)
        weight = 1 / (count + 1) if name == "nt-asgd" else 1 - min(0.6, (1 + count) / (10 + count))
        if expected is None:
            expected = found["model.safetensors"] if name == "nt-asgd" else found["averaged.safetensors"]
        for key, value in found["model.safetensors"].items():
            if count:
                expected[key] = expected[key] + weight * (value - expected[key])
            torch.testing.assert_close(found["averaged.safetensors"][key], expected[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", AVERAGES)
def test_resumed_is_the_same_bit_for_bit(data, tmp_path, name):
    """From any step: before an average begins, as it begins, and later."""
    more = ["--model.dropout=0.3", "--checkpoint.every_steps=1", "--checkpoint.keep=99"]
    train_here(*flags(data, tmp_path / "whole", name, *more))
    whole = tensors(tmp_path / "whole")
    assert whole.keys() == {"model.safetensors", "averaged.safetensors", "training.safetensors"}
    for stop in (1, 4, 6, 9, 10):
        run = shutil.copytree(tmp_path / "whole", tmp_path / f"stopped-{stop}")
        for step in range(stop + 1, STEPS + 1):
            shutil.rmtree(run / "checkpoints" / f"step-{step:09d}")
        train_here(*flags(data, run, name, *more, "--resume=auto"))
        for file, values in tensors(run).items():
            for key, value in values.items():
                assert torch.equal(whole[file][key], value), (stop, file, key)
        assert losses(run, "valid/loss") == losses(tmp_path / "whole", "valid/loss")


def test_resumed_is_the_same_with_a_cycle_an_average_and_patience_at_once(data, tmp_path):
    """The run ends where validation has stalled, a part of which was before the stop."""
    more = ["--schedule.name=one-cycle", "--optimizer.learning_rate=0.5", "--training.patience=2"]
    more += ["--model.dropout=0.3", "--data.window_spread=3", "--checkpoint.every_steps=1", "--checkpoint.keep=99"]
    train_here(*flags(data, tmp_path / "whole", "ema", *more, steps=60))
    validations = losses(tmp_path / "whole", "valid/loss")
    best, last = int(np.argmin(validations)), 2 * len(validations)
    assert len(validations) == best + 3
    assert 6 < last < 60
    whole = tensors(tmp_path / "whole", last)
    for stop in (3, last - 1):
        run = shutil.copytree(tmp_path / "whole", tmp_path / f"stopped-{stop}")
        for step in range(stop + 1, last + 1):
            shutil.rmtree(run / "checkpoints" / f"step-{step:09d}")
        train_here(*flags(data, run, "ema", *more, "--resume=auto", steps=60))
        assert losses(run, "valid/loss") == validations
        for file, values in tensors(run, last).items():
            for key, value in values.items():
                assert torch.equal(whole[file][key], value), (stop, file, key)


def test_the_number_of_ranks_changes_nothing(data, tmp_path):
    for ranks in (1, 2):
        run_flags = flags(data, tmp_path / str(ranks), "ema", "--model.dropout=0")
        train(ranks, *SMALL, *run_flags, cwd=tmp_path)
    one, two = tensors(tmp_path / "1"), tensors(tmp_path / "2")
    for key, value in one["averaged.safetensors"].items():
        torch.testing.assert_close(two["averaged.safetensors"][key], value, rtol=0, atol=1e-5)
    np.testing.assert_allclose(losses(tmp_path / "2", "valid/loss"), losses(tmp_path / "1", "valid/loss"), atol=1e-5)


@pytest.mark.parametrize("name", AVERAGES)
def test_what_is_validated_is_what_is_evaluated_and_exported(data, tmp_path, capsys, name):
    run = tmp_path / "run"
    train_here(*flags(data, run, name))
    newest = newest_checkpoint(run / "checkpoints")
    assert newest is not None
    evaluate.main([str(newest), "--split=valid", "--streams=10", "--json"])
    output = capsys.readouterr()
    assert f"average of the parameters by {name}" in output.err
    figures = json.loads(output.out.splitlines()[-1])
    assert figures["nats_per_token"] == pytest.approx(losses(run, "valid/loss")[-1], abs=1e-5)

    model = open_checkpoint(newest).model()
    parts = tensors(run)
    assert torch.equal(model.embedding.weight, parts["averaged.safetensors"]["embedding.weight"])
    assert not torch.allclose(model.embedding.weight, parts["model.safetensors"]["embedding.weight"], atol=1e-4)
    export.main([str(newest), "-o", str(tmp_path / "bundle"), "--precision=fp32"])
    tokens = np.arange(2, 12)[None]  # (1, T)
    scores, _ = Sampler(Bundle.load(tmp_path / "bundle"), threads=1).score(tokens[:, :-1], tokens[:, 1:])
    with torch.no_grad():
        hidden, _ = model(torch.from_numpy(tokens[:, :-1]), model.initial_state(1))
        expected = model.logits(hidden)[0].log_softmax(-1)[range(9), tokens[0, 1:]]
    np.testing.assert_allclose(scores[0], expected, atol=1e-4)


def old_run(data: Path, run: Path, **progress: float) -> list[str]:
    """Train 4 steps, leave out of the checkpoint what is younger than the first ones, and return the flags to resume with.

    `progress` replaces figures of the checkpoint's.
    """
    plain = [f"--data.folder={data}", f"--run_folder={run}", "--resume=auto"]
    train_here(*plain, "--training.steps=4")
    manifest = run / "checkpoints" / "step-000000004" / "manifest.json"
    before = read_json(manifest)
    del before["recipe"]["averaging"], before["recipe"]["training"]["patience"]
    del before["progress"]["validations"], before["progress"]["averaged_from"]
    for model in (before["model"], before["recipe"]["model"]):
        for name in ("dropout_input", "dropout_hidden", "dropout_output", "dropout_embedding", "weight_dropout"):
            del model[name]
    before["progress"] |= progress
    del before["sha256"]
    write_json(manifest, before)
    return plain


def test_an_old_checkpoint_is_evaluated_and_exported(data, tmp_path, capsys):
    old_run(data, tmp_path / "run")
    evaluate.main([str(tmp_path / "run"), "--split=valid", "--streams=10", "--json"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["nats_per_token"] == pytest.approx(losses(tmp_path / "run", "valid/loss")[-1], abs=1e-5)
    export.main([str(tmp_path / "run"), "-o", str(tmp_path / "bundle"), "--precision=fp32"])
    assert Bundle.load(tmp_path / "bundle")


def test_an_average_begins_in_a_run_without_one(data, tmp_path):
    """Also of a checkpoint from before there were averages, and it is left out again."""
    run = tmp_path / "run"
    plain = old_run(data, run)
    train_here(*plain, "--training.steps=8", "--averaging.name=ema")
    assert open_checkpoint(run / "checkpoints" / "step-000000008").manifest["progress"]["averaged_from"] == 4
    train_here(*plain, "--training.steps=9")
    assert "averaged.safetensors" not in tensors(run, 9)


@pytest.mark.parametrize(
    ("from_step", "removed", "message"),
    [(99, False, "averaged_from is 99, after step"), (0, True, "averaged.safetensors is missing"), (-1, False, "negative")],
)
def test_damaged_averages_are_rejected(data, tmp_path, from_step, removed, message):
    run = tmp_path / "run"
    train_here(*flags(data, run, "ema", steps=2))
    folder = find_checkpoint(run)
    progress = read_json(folder / "manifest.json")["progress"]
    edit_json(folder / "manifest.json", progress=progress | {"averaged_from": from_step})
    if removed:
        (folder / "averaged.safetensors").unlink()
    with pytest.raises(DataError, match=message):
        open_checkpoint(folder).model()


@given(validations=st.lists(st.integers(0, 9), max_size=12), interval=st.integers(1, 6))
def test_nonmonotone_is_the_rule_of_the_authors_code(validations, interval):
    """https://github.com/salesforce/awd-lstm-lm, main.py: the list there lacks the newest validation."""
    for end in range(1, len(validations) + 1):
        *best_val_loss, val_loss = validations[:end]
        theirs = len(best_val_loss) > interval and val_loss > min(best_val_loss[:-interval])
        assert is_nonmonotone(validations[:end], interval) == theirs


def test_without_a_better_validation_a_run_ends_and_the_best_checkpoint_is_taken(data, tmp_path):
    """With exit code 0, and as finished; more patience continues it."""
    run = tmp_path / "run"
    run_flags = [*SMALL, f"--data.folder={data}", f"--run_folder={run}", "--training.validate_every=2", "--training.steps=60"]
    run_flags += ["--optimizer.name=sgd", "--optimizer.learning_rate=60", "--schedule.name=constant", "--training.patience=3"]
    done = train(1, *run_flags, cwd=tmp_path)
    validations = losses(run, "valid/loss")
    best = int(np.argmin(validations))
    assert len(validations) == best + 4 < 30
    assert "ended before step 60: 3 validations without a better one" in done.stderr
    assert (run / "finished.toml").exists()
    assert find_checkpoint(run).name == f"step-{2 * (best + 1):09d}"
    before = shutil.copytree(run, tmp_path / "before")
    train(1, *run_flags, "--resume=auto", cwd=tmp_path)
    assert losses(run) == losses(before), "it was over"
    train(1, *run_flags, "--resume=auto", "--training.patience=4", cwd=tmp_path)
    assert len(losses(run)) > len(losses(before))


def test_patience_counts_from_the_best_validation_of_an_old_checkpoint(data, tmp_path):
    run = tmp_path / "run"
    plain = old_run(data, run, best_valid_nats=0.5)
    before = len(losses(run, "valid/loss"))
    train_here(*plain, "--training.steps=30", "--training.validate_every=2", "--training.patience=2")
    validations = losses(run, "valid/loss")[before:]
    assert len(validations) == 2
    assert 0.5 < validations[1] < validations[0], "better than the one before, and not the best"


@pytest.mark.parametrize("setting", ["training.patience=3", "averaging.name=nt-asgd", "schedule.name=plateau"])
def test_what_acts_on_validations_needs_them(tmp_path, setting):
    data = write_data_folder(tmp_path / "data", {"train": chain(451, 30)}, 30)
    with pytest.raises(UsageError, match=f"{setting.split('=')[0]}.* needs validations, and .* has no valid split"):
        train_here(f"--data.folder={data}", f"--run_folder={tmp_path / 'run'}", f"--{setting}")


def test_the_time_is_estimated_after_the_first_steps(data, tmp_path, capsys):
    train_here(f"--data.folder={data}", f"--run_folder={tmp_path / 'run'}", "--training.steps=30")
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("  time ")]
    assert re.search(r"about \d+s for 10 more steps of \d", line)


def test_no_time_is_estimated_of_no_steps_nor_of_validations(data, tmp_path, capsys, monkeypatch):
    plain = [f"--data.folder={data}", "--training.validate_every=10", "--training.patience=9"]
    train_here(*plain, f"--run_folder={tmp_path / 'short'}", "--training.steps=20")
    assert "  time " not in capsys.readouterr().err

    seconds_more = iter([1.0])

    def slow_validation(*arguments):
        time.sleep(next(seconds_more, 0))
        return measuring.evaluate(*arguments)

    monkeypatch.setattr(loop, "evaluate", slow_validation)
    train_here(*plain, f"--run_folder={tmp_path / 'run'}", "--training.steps=21")
    [each] = re.findall(r"for at most 1 more step of (\S+) s", capsys.readouterr().err)
    assert float(each) < 1 / 15, "the validation after step 10 counts as steps"

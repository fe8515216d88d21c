"""What a job reads it reads once: a data folder that is replaced, removed or overwritten while it trains; what may change."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from corpora import chain, write_data_folder
from lmdist.errors import DataError, UsageError
from lmdist.training.checkpoints.read import open_checkpoint
from lmdist.training.checkpoints.retain import newest_checkpoint
from lmdist.training.data import DataFolder
from support.jobs import SMALL, losses, small_data, start, train, train_here, wait_for_steps

JOB = [*SMALL, "--data.folder=data", "--run_folder=run", "--training.validate_every=1000", "--checkpoint.every_steps=50"]


@pytest.fixture
def data(tmp_path):
    return small_data(tmp_path / "data")


def newest(run: Path) -> Path:
    found = newest_checkpoint(run / "checkpoints")
    assert found is not None
    return found


def test_a_data_folder_that_is_replaced_changes_nothing(data, tmp_path):
    """The job ends with checkpoints of its own words, and cannot be resumed with others."""
    outputs = [tmp_path / "stdout", tmp_path / "stderr"]
    (job,) = start(1, *JOB, "--training.steps=1000", cwd=tmp_path, outputs=outputs)
    wait_for_steps(tmp_path / "run", 5)
    shutil.rmtree(data)
    write_data_folder(data, {"train": chain(451, 40), "valid": chain(103, 40, seed=1)}, 40)
    job.join(240)
    assert job.exitcode == 0, outputs[1].read_text()
    manifest = open_checkpoint(newest(tmp_path / "run")).manifest
    assert manifest["progress"]["step"] == 1000
    assert manifest["data"]["vocabulary_size"] == manifest["vocabulary_size"] == 30
    assert len((newest(tmp_path / "run") / "vocab.txt").read_text().splitlines()) == 30

    line = train(1, *JOB, "--training.steps=1001", "--resume=auto", cwd=tmp_path, code=64).stderr.splitlines()[-1]
    assert "data has another vocab.txt and train.bin than when the run began" in line


def test_a_token_file_that_is_overwritten_ends_the_job(data, tmp_path):
    outputs = [tmp_path / "stdout", tmp_path / "stderr"]
    (job,) = start(1, *JOB, "--training.steps=1000000", cwd=tmp_path, outputs=outputs)
    wait_for_steps(tmp_path / "run", 5)
    with (data / "train.bin").open("r+b") as file:
        file.write(b"\x02\x00" * 50)
    job.join(240)
    assert job.exitcode == 65
    assert "data/train.bin was overwritten while the job read it" in outputs[1].read_text()


def test_a_token_file_in_use_may_be_touched_and_replaced_but_not_changed(data):
    folder = DataFolder(data)
    before = folder.tokens("train")[:].tolist()
    content = (data / "train.bin").read_bytes()
    os.utime(data / "train.bin")
    folder.check_unchanged()
    (data / "other").write_bytes(np.frombuffer(content, "<u2")[::-1].tobytes())
    (data / "other").replace(data / "train.bin")
    folder.check_unchanged()  # the file that it holds open is as it was
    again = DataFolder(data)
    again.tokens("train")
    (data / "train.bin").write_bytes(content[2:] + content[:2])
    with pytest.raises(DataError, match=r"train\.bin was overwritten"):
        again.check_unchanged()
    folder.check_unchanged()
    assert len(before) == 451


@pytest.mark.parametrize("section", ["dropout", "rate"])
def test_what_acts_on_single_steps_may_change_when_a_run_is_resumed(data, tmp_path, monkeypatch, capsys, section):
    monkeypatch.chdir(tmp_path)
    flags = ["--data.folder=data", "--schedule.name=constant", "--resume=auto"]
    old, new, line = {
        "dropout": (
            ["--model.dropout=0.1"],
            ["--model.dropout=0.5", "--model.weight_dropout=0.2"],
            "model.dropout 0.1 -> 0.5, model.weight_dropout 0.0 -> 0.2",
        ),
        "rate": ([], ["--optimizer.learning_rate=0.01"], "optimizer.learning_rate 0.02 -> 0.01"),
    }[section]
    train_here(*flags, *old, "--run_folder=run", "--training.steps=4")
    shutil.copytree("run", "as-before")
    capsys.readouterr()
    train_here(*flags, *new, "--run_folder=run", "--training.steps=8")
    assert f"changed since step 4: {line}" in capsys.readouterr().err.splitlines()[5]
    train_here(*flags, *old, "--run_folder=as-before", "--training.steps=8")
    assert "changed" not in capsys.readouterr().err
    changed, as_before = losses(Path("run")), losses(Path("as-before"))
    acts_from = 4 if section == "dropout" else 5  # a rate acts after the loss of its first step
    assert changed[:acts_from] == as_before[:acts_from]
    assert changed[acts_from] != as_before[acts_from]


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("--model.hidden_size=25", "model.hidden_size: the run has 24"),
        ("--model.tied=false", "model.tied: the run has True"),
        ("--data.window=6", "data.window: the run has 7"),
        ("--optimizer.name=sgd", "optimizer.name: the run has adamw"),
        ("--seed=2", "seed: the run has 1"),
    ],
)
def test_what_the_steps_before_depend_on_may_not(data, tmp_path, monkeypatch, flag, name):
    monkeypatch.chdir(tmp_path)
    train_here("--data.folder=data", "--training.steps=2")
    with pytest.raises(UsageError, match=name):
        train_here("--data.folder=data", "--training.steps=4", "--resume=auto", flag)

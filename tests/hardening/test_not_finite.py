"""Numbers that are not finite: never saved, never resumed from, and never the end of a run that says that it is done."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from lmdist import config
from lmdist.errors import UsageError
from lmdist.storage.checksums import OWN_CHECKSUM
from lmdist.storage.reading import read_json, write_json
from lmdist.training.checkpoints.read import read_manifest
from lmdist.training.checkpoints.retain import newest_checkpoint
from lmdist.training.distributed import World
from lmdist.training.loop import check_savable
from lmdist.training.metrics import NatsTotal
from lmdist.training.run import set_up
from support.jobs import SMALL, fingerprint, small_data, train, train_here
from support.mutations import with_correct_checksums
from support.small_bundles import edit_json, make_run


def spoil(checkpoint: Path, file: str, value: float) -> None:
    """Have a tensor of a checkpoint hold a number that is not finite, as the first versions could save it."""
    tensors = safetensors.numpy.load_file(checkpoint / file)
    name = max(tensors, key=lambda name: tensors[name].size)
    tensors[name].flat[3] = value
    safetensors.numpy.save_file(tensors, checkpoint / file)
    with_correct_checksums(checkpoint, "manifest.json")
    manifest = read_json(checkpoint / "manifest.json")
    del manifest[OWN_CHECKSUM]
    write_json(checkpoint / "manifest.json", manifest)


def test_a_checkpoint_that_is_not_finite_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small_data(tmp_path / "data")
    flags = ["--data.folder=data", "--resume=auto", "--checkpoint.every_steps=2", "--schedule.name=constant"]
    train_here(*flags, "--run_folder=whole", "--training.steps=6")
    train_here(*flags, "--run_folder=run", "--training.steps=4")
    older, newest = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    spoil(newest, "model.safetensors", np.nan)
    capsys.readouterr()
    train_here(*flags, "--run_folder=run", "--training.steps=6")
    message = capsys.readouterr().err
    assert message.count(f"warning: skipping a damaged checkpoint: run/checkpoints/{newest.name}/model.safetensors: ") == 1
    assert "holds numbers that are not finite" in message
    assert f"resuming after step {int(older.name[5:])}" in message
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")
    checkpoints = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    spoil(checkpoints[-1], "training.safetensors", np.inf)
    assert newest_checkpoint(tmp_path / "run" / "checkpoints") == checkpoints[-2]
    for checkpoint in checkpoints[:-1]:
        spoil(checkpoint, "model.safetensors", -np.inf)
    done = train(1, *SMALL, *flags, "--run_folder=run", "--training.steps=8", cwd=tmp_path, code=65)
    assert "has no checkpoint that can be read, and the run had made progress" in done.stderr.splitlines()[-1]


def test_no_state_is_saved_from_which_no_run_resumes(tmp_path: Path) -> None:
    """The square of a gradient may be too large for fp32 where gradient, parameters and loss are not."""
    data = small_data(tmp_path / "data")
    recipe = config.load([*SMALL, f"--data.folder={data}", f"--run_folder={tmp_path / 'run'}", "--optimizer.name=adamw"])
    world = World(0, 1, torch.device("cpu"))
    run = set_up(recipe, world)
    run.training_step.forward_backward(run.batches.batch(0, slice(0, 8)), 0, NatsTotal(world))
    run.training_step.clip_and_update(0.1)
    check_savable(run, run.training_step.state)
    h, c = run.training_step.state
    with pytest.raises(UsageError, match="the state of the LSTM is nan at step 0: the training has diverged"):
        check_savable(run, (h, c.fill_(torch.inf)))
    next(iter(run.training_step.optimizer.state.values()))["exp_avg_sq"][0] = torch.inf
    with pytest.raises(UsageError, match="the state of the optimizer is nan at step 0: the training has diverged"):
        check_savable(run, (h, h))


def test_a_run_without_a_valid_split_is_not_done_with_parameters_that_are_not_finite(tmp_path: Path) -> None:
    """The last update makes them so, after the last loss."""
    small_data(tmp_path / "data")
    (tmp_path / "data" / "valid.bin").unlink()
    meta = read_json(tmp_path / "data" / "meta.json")
    for part in ("splits", "files"):
        meta[part] = {name: facts for name, facts in meta[part].items() if not name.startswith("valid")}
    write_json(tmp_path / "data" / "meta.json", meta)
    flags = "--optimizer.name=sgd --optimizer.learning_rate=1e12 --optimizer.weight_decay=1e12 --optimizer.clip=0".split()
    flags += ["--data.folder=data", "--run_folder=run", "--training.steps=1", "--schedule.name=constant"]
    message = train(1, *SMALL, *flags, cwd=tmp_path, code=64).stderr
    assert "the training has diverged" in message.splitlines()[-1]
    assert "done:" not in message
    assert not (tmp_path / "run" / "finished.toml").exists()
    assert not list(tmp_path.glob("run/checkpoints/step-*"))


def test_large_finite_numbers_of_a_progress_can_be_read_again(tmp_path: Path) -> None:
    """Nats of a model that is about to diverge."""
    checkpoint = make_run(tmp_path) / "checkpoints" / "step-000000007"
    progress = read_manifest(checkpoint)["progress"]
    for nats in (1e27, 1e308):
        edit_json(checkpoint / "manifest.json", progress=progress | {"nats": nats})
        assert read_manifest(checkpoint)["progress"]["nats"] == nats
    assert json.loads((checkpoint / "manifest.json").read_text())["progress"]["nats"] == 1e308

"""Several ranks: the same figures as one, and none at all from ranks that would train different models."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from corpora import chain, write_data_folder
from lmdist import config
from lmdist.model.language_model import LanguageModel
from lmdist.storage.held import HeldFolder
from lmdist.training import loop, report
from lmdist.training.checkpoints import write
from lmdist.training.checkpoints.read import read_tensors
from lmdist.training.data import DataFolder, training_batches
from support.jobs import SMALL, losses, small_data, train

VOCABULARY_SIZE = 500
EMBEDDING_SIZE = 16
UNTIED = [*SMALL, "--model.tied=false", "--model.dropout=0", "--training.steps=12", "--schedule.name=constant"]
PLAIN_SGD = ["--optimizer.name=sgd", "--optimizer.learning_rate=1", "--optimizer.weight_decay=0"]


@pytest.fixture
def data(tmp_path):
    """A batch of 8 x 7 tokens reads a tenth of the vocabulary."""
    return write_data_folder(tmp_path / "data", {"train": chain(5_000, VOCABULARY_SIZE)}, VOCABULARY_SIZE)


def tensors(run: Path, step: int = 12) -> dict[str, torch.Tensor]:
    """Return the parameters and the optimizer's tensors in a checkpoint of a run."""
    files = HeldFolder(run / f"checkpoints/step-{step:09d}")
    return read_tensors(files, "model.safetensors") | read_tensors(files, "training.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "accumulation"),
    [(PLAIN_SGD, 2), (["--optimizer.name=adam", "--optimizer.clip=0.05"], 1)],
    ids=["sgd, in parts", "adam, clipped"],
)
def test_untied_embeddings_are_the_same_on_any_number_of_ranks(data, tmp_path, optimizer, accumulation):
    flags = [*UNTIED, f"--data.folder={data}", *optimizer]
    train(1, *flags, "--run_folder=1", cwd=tmp_path)
    for ranks in (2, 4):
        train(ranks, *flags, f"--training.accumulation={accumulation}", f"--run_folder={ranks}", cwd=tmp_path)
        for key in ("train/loss", "train/gradient_norm"):
            one, many = (losses(tmp_path / run, key) for run in ("1", str(ranks)))
            assert len(one) == 12
            np.testing.assert_allclose(many, one, rtol=0, atol=1e-5, err_msg=key)
        for name, value in tensors(tmp_path / "1").items():
            torch.testing.assert_close(tensors(tmp_path / str(ranks))[name], value, rtol=0, atol=1e-5, msg=name)


@pytest.mark.slow
def test_four_ranks_resume_bit_for_bit(data, tmp_path):
    """On more than two ranks a sum depends on how the gradients are laid out, and on how many rows are exchanged."""
    flags = [*UNTIED, f"--data.folder={data}", "--model.dropout=0.3", "--model.hidden_size=160"]
    train(4, *flags, "--run_folder=whole", cwd=tmp_path)
    train(4, *flags, "--training.steps=5", "--run_folder=parts", cwd=tmp_path)
    train(4, *flags, "--run_folder=parts", "--resume=auto", cwd=tmp_path)
    for name, value in tensors(tmp_path / "whole").items():
        assert torch.equal(tensors(tmp_path / "parts")[name], value), name


def test_plain_sgd_changes_the_rows_of_the_tokens_that_some_rank_has_read(data, tmp_path):
    flags = [*UNTIED, f"--data.folder={data}", *PLAIN_SGD, "--training.steps=1"]
    train(2, *flags, "--run_folder=run", cwd=tmp_path)
    recipe = config.load(flags)
    torch.manual_seed(recipe.seed)
    before = LanguageModel(recipe.model, VOCABULARY_SIZE).embedding.weight
    batch = training_batches(DataFolder(data), recipe.data, recipe.seed).batch(0, slice(0, 8))
    changed = (tensors(tmp_path / "run", 1)["embedding.weight"] != before).any(1).nonzero().flatten()
    assert changed.tolist() == batch.inputs.unique().tolist()
    assert len(changed) < VOCABULARY_SIZE / 5


@pytest.mark.slow
def test_ranks_that_would_train_different_models_say_so_once(data, tmp_path):
    flags = [*UNTIED, f"--data.folder={data}", "--run_folder=run", "--seed={rank}", "--optimizer.weight_decay=0.{rank}"]
    done = train(2, *flags, cwd=tmp_path, code=64)
    assert done.stderr.splitlines() == [
        "lmdist.train: error: the ranks would not train one model: seed 0 on rank 0 and 1 on rank 1, "
        "optimizer.weight_decay 0.0 on rank 0 and 0.1 on rank 1; start all of them with the same"
    ]
    assert not list(tmp_path.glob("run/checkpoints/*"))


@pytest.mark.slow
def test_ranks_that_read_different_texts_say_so(data, tmp_path):
    write_data_folder(tmp_path / "data1", {"train": chain(5_000, VOCABULARY_SIZE, seed=2)}, VOCABULARY_SIZE)
    data.rename(tmp_path / "data0")
    done = train(2, *UNTIED, "--data.folder=data{rank}", "--run_folder=run", cwd=tmp_path, code=64)
    assert "one model: data " in done.stderr


@pytest.mark.slow
def test_whether_a_run_is_resumed_is_for_rank_0_to_say(data, tmp_path):
    """A launcher adds `--resume auto` to what it restarts, and that of a machine that starts late has not done so."""
    flags = [*UNTIED, f"--data.folder={data}", "--run_folder=run"]
    train(2, *flags, "--training.steps=4", cwd=tmp_path)
    for folder, first, second in (("restarts", "auto", "never"), ("starts", "never", "auto")):
        (tmp_path / folder).mkdir()
        for rank, resume in enumerate((first, second)):
            (tmp_path / folder / f"{rank}.toml").write_text(f'resume = "{resume}"\n')
    done = train(2, "--config=starts/{rank}.toml", *flags, "--training.steps=6", cwd=tmp_path, code=64)
    assert "--resume auto continues it" in done.stderr
    train(2, "--config=restarts/{rank}.toml", *flags, "--training.steps=6", cwd=tmp_path)
    assert len(losses(tmp_path / "run")) == 6


TIMEOUT_SECONDS = 2


def delay(module: ModuleType, name: str) -> None:
    """Have a function take longer than one rank waits for another in a step."""
    function = getattr(module, name)

    def delayed(*values, **options):
        time.sleep(TIMEOUT_SECONDS + 1)
        return function(*values, **options)

    setattr(module, name, delayed)


def delay_what_one_rank_does_alone() -> None:
    if os.environ["RANK"] == "1":
        delay(loop, "evaluate")  # its streams of the validation
    else:
        delay(report, "sample")
        delay(write, "write_checkpoint")  # for which the next save waits


@pytest.mark.slow
def test_what_one_rank_does_between_steps_may_take_longer_than_the_timeout_of_a_step(tmp_path):
    small_data(tmp_path / "data")
    flags = [*SMALL, "--data.folder=data", "--run_folder=run", "--training.steps=3", "--checkpoint.every_steps=1"]
    flags += [f"--training.timeout_seconds={TIMEOUT_SECONDS}", "--sample.final_words=0"]
    train(2, *flags, cwd=tmp_path, before=delay_what_one_rank_does_alone)
    assert len(losses(tmp_path / "run", "valid/loss")) == 1

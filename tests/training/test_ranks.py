"""Several ranks against one: the embedding's gradient, of which the ranks exchange the rows of their tokens only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed import ReduceOp

from corpora import chain, write_data_folder
from lmdist.training.checkpoints.read import read_tensors
from support.jobs import SMALL, losses, train

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
    folder = run / f"checkpoints/step-{step:09d}"
    return read_tensors(folder / "model.safetensors") | read_tensors(folder / "training.safetensors")


@pytest.mark.parametrize(
    ("optimizer", "accumulation"), [(PLAIN_SGD, 2), (["--optimizer.name=adam", "--optimizer.clip=0.05"], 1)], ids=["sgd", "adam"]
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

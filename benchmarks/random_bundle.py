"""A bundle with random weights, for benchmarks that measure speed and not quality."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from corpora import write_data_folder
from lmdist import config
from lmdist.model.language_model import LanguageModel
from lmdist.settings import ModelSettings, Recipe
from lmdist.training.checkpoints.format import Progress
from lmdist.training.checkpoints.write import take_snapshot, write_checkpoint
from lmdist.training.data import DataFolder


def make_bundle(folder: Path, embedding_size: int, hidden_size: int, vocabulary_size: int) -> Path:
    """Write a checkpoint of two layers, runs/random, export it, and return its bundle."""
    data = DataFolder(write_data_folder(folder / "data", {"train": np.zeros(1)}, vocabulary_size))
    torch.manual_seed(0)
    settings = ModelSettings(embedding_size=embedding_size, hidden_size=hidden_size, num_layers=2, dropout=0.0, tied=False)
    model = LanguageModel(settings, vocabulary_size)
    taken = take_snapshot(Progress(1), model, torch.optim.SGD(model.parameters()), None)
    saved = write_checkpoint(folder / "runs" / "random" / "checkpoints", taken, config.as_dict(Recipe(model=settings)), data)
    command = [sys.executable, "-m", "lmdist_export.export", str(saved), "-o", str(folder / "bundle"), "--data", "none"]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "bundle"

"""The files of a checkpoint, and what its manifest holds.

    runs/NAME/checkpoints/step-000001000/
        model.safetensors       the parameters
        averaged.safetensors    their average over the steps, where the recipe has one: what is evaluated and exported
        training.safetensors    the optimizer's tensors, and the LSTM state of all streams
        vocab.txt  text.json    the vocabulary and the tokenizer, copied from the data folder
        manifest.json           the model's shape, progress, recipe, facts of the data, a sha256 for each file and its own

A checkpoint is enough by itself to evaluate and to export. Nothing in it is pickled, so loading it runs no code.
"""

from __future__ import annotations

import dataclasses
from typing import TypedDict, get_type_hints

import torch

from lmdist.settings import OptimizerSettings
from lmdist.storage.checksums import FileFacts
from lmdist.text.data_folder import TEXT, VOCABULARY, token_file

FORMAT = "lmdist checkpoint"
VERSION = 1
MODEL, TRAINING, MANIFEST = "model.safetensors", "training.safetensors", "manifest.json"
AVERAGED = "averaged.safetensors"
"""Is there if `Progress.averaged_from` is set."""
FILES = (MODEL, TRAINING, VOCABULARY, TEXT)
"""The files that a manifest must name."""

MANIFEST_SCHEMA = {
    "model": {},
    "vocabulary_size": int,
    "progress": {"step": int},
    "recipe": {
        "seed": int,
        "optimizer": {"name": get_type_hints(OptimizerSettings)["name"]},
        "model": {},
        "data": {},
        "training": {},
    },
    "data": {"files": {token_file("train"): FileFacts}},
    "files": dict[str, FileFacts],
}
"""The schema of manifest.json. The objects that are settings are checked by their own classes."""
FIRST_KEYS = {"format", "version", "lmdist", "torch", *MANIFEST_SCHEMA}
"""The keys of the first manifests, which had no checksum of their own."""
LOSS_SCALE = torch.GradScaler("cpu").state_dict().keys()
"""The keys of `Progress.loss_scale`."""


class StartedFrom(TypedDict):
    """What a run began with, and where it was taken from (starting_point.py)."""

    base: str
    """The run, checkpoint, bundle or registered model as it was named; empty where there was none."""
    run: str
    step: int
    """The run that the base's weights are of, and the step."""
    run_id: str
    """The id of that run in MLflow, if it has one."""
    sha256: str
    """Of the file of the base's weights."""
    words_shared: int
    words_new: int
    words_left: int
    """Words that have the base's rows, that the base has not, and of the base that the data have not."""
    vectors: str
    """The file of word vectors; empty where there was none."""
    vectors_words: int
    vectors_taken: int
    vectors_by_lowercase: int
    """Words that were looked for in it, that it has, and that it has in another spelling."""


class Planned(TypedDict):
    """How many steps a run has, where training.minutes decides it (budget.py)."""

    step: int
    """Steps done when it was decided: the next one is the first of this total."""
    total_steps: int
    minutes: float
    """What training.minutes was."""


@dataclasses.dataclass
class Progress:
    """Where a run stands. With the tensors, this is all that a resumed run needs."""

    step: int = 0
    """Steps done, and so the number of the next global batch."""
    tokens: int = 0
    """Tokens trained on, over all ranks."""
    seconds: float = 0.0
    """Time spent in training steps."""
    elapsed_seconds: float = 0.0
    """Time since the run began, with all that is between steps, in all its processes."""
    plan: tuple[Planned, ...] = ()
    """The totals of steps that were decided, in order."""
    nats: float = 0.0
    """Summed nats of the tokens since the last line of metrics, over all ranks."""
    counted: int = 0
    """The number of those tokens."""
    valid_nats: float | None = None
    """Nats per token of the validation after this step, if there was one."""
    best_valid_nats: float | None = None
    """Nats per token of the best validation."""
    validations: tuple[float, ...] = ()
    """Nats per token of all validations, in order."""
    averaged_from: int | None = None
    """Steps done when the average of the parameters began, if it has."""
    divisions: int = 0
    """How often the plateau schedule has divided the learning rate."""
    loss_scale: dict[str, float | int] = dataclasses.field(default_factory=dict)
    """State of the fp16 loss scaler."""
    started_from: StartedFrom | None = None
    """What the run began with beside random parameters; None where it began with these alone."""

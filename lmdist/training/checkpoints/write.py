"""Write a checkpoint: an atomic folder of tensors and JSON.

Saving has two steps: `take_snapshot` copies the state to memory, and training waits for it; `write_checkpoint` writes the
copy in a thread of `Saver`, while training continues. This module does not know when to save.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor

from lmdist import __version__
from lmdist.console import log
from lmdist.errors import EXIT_DATA, EXIT_USAGE, FULL_DISK, DataError, Stopped, exit_code_of
from lmdist.model.language_model import LanguageModel, State
from lmdist.model.lstm import STATE_PARTS
from lmdist.settings import ModelSettings
from lmdist.storage.atomic import atomic_folder, write_atomic
from lmdist.storage.checksums import OWN_CHECKSUM, checksums, own_checksum
from lmdist.storage.reading import write_json
from lmdist.text.data_folder import TEXT, VOCABULARY
from lmdist.tracking.run_folder import NEWEST, newest_name
from lmdist.training.checkpoints.format import (
    AVERAGED,
    FORMAT,
    MANIFEST,
    MODEL,
    TRAINING,
    VERSION,
    Progress,
)
from lmdist.training.checkpoints.retain import remove_old
from lmdist.training.data import DataFolder
from lmdist.training.optimizer import optimizer_state

NICENESS = 10
"""Added to the niceness of the thread that writes. Where all cores compute it takes a tenth of one of them, and a checkpoint is
on the disk some 10 times later; with 19, the most, it would be later still, and a kill meanwhile would lose the steps of all
that time."""


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A run's state after a step, copied to memory: later steps do not change it."""

    progress: Progress
    model: ModelSettings
    vocabulary_size: int
    parameters: dict[str, Tensor]
    training: dict[str, Tensor]
    """The optimizer's tensors, and the state of all G streams, each part (G, S)."""
    averaged: dict[str, Tensor]
    """The average of the parameters over the steps; empty without one."""


def take_snapshot(
    progress: Progress,
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    streams: State | None,
    averaged: LanguageModel | None = None,
) -> Snapshot:
    """Copy a run's state to the CPU's memory; `streams` is the LSTM state of all G streams, each part (G, S).

    `averaged` has the average of the parameters, if there is one.
    """
    training = {f"optimizer.{name}": value for name, value in optimizer_state(optimizer).items()}
    if streams is not None:
        training |= {f"streams.{name}": part for name, part in zip(STATE_PARTS, streams, strict=True)}
    return Snapshot(
        dataclasses.replace(progress),
        model.settings,
        model.vocabulary_size,
        {name: copy_to_cpu(value) for name, value in model.named_parameters()},  # a tied matrix once, under its first name
        {name: copy_to_cpu(value) for name, value in training.items()},
        {name: copy_to_cpu(value) for name, value in averaged.named_parameters()} if averaged else {},
    )


def copy_to_cpu(tensor: Tensor) -> Tensor:
    """Return a copy in the CPU's memory."""
    return tensor.detach().contiguous().to("cpu", copy=True)


def write_checkpoint(checkpoints: Path, snapshot: Snapshot, recipe: dict[str, Any], data: DataFolder) -> Path:
    """Write the atomic folder `checkpoints/step-N`, then its name into `checkpoints/newest`; return the folder.

    Vocabulary and tokenizer are those that `data` had when it was opened, whatever has become of the folder.
    """
    target = checkpoints / f"step-{snapshot.progress.step:09d}"
    with atomic_folder(target, replace=True) as folder:
        save_file(snapshot.parameters, folder / MODEL)
        save_file(snapshot.training, folder / TRAINING)
        if snapshot.averaged:
            save_file(snapshot.averaged, folder / AVERAGED)
        for name in (VOCABULARY, TEXT):
            (folder / name).write_bytes(data.contents[name])
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "lmdist": __version__,
            "torch": torch.__version__,
            "model": dataclasses.asdict(snapshot.model),
            "vocabulary_size": snapshot.vocabulary_size,
            "progress": dataclasses.asdict(snapshot.progress),
            "recipe": recipe,
            "data": data.meta,
            "files": checksums(folder),
        }
        write_json(folder / MANIFEST, {**manifest, OWN_CHECKSUM: own_checksum(manifest)})
    write_atomic(checkpoints / NEWEST, f"{target.name}\n")
    return target


class Saver:
    """Writes snapshots in a thread, one at a time, while training continues; `with` waits for the last one."""

    def __init__(self, checkpoints: Path, recipe: dict[str, Any], data: DataFolder, keep: int) -> None:
        self.checkpoints = checkpoints
        self.recipe = recipe
        self.data = data
        self.keep = keep
        self.thread: threading.Thread | None = None
        self.failure: Exception | None = None
        self.asked = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Wait; what `close` would raise must not replace the error that ends the training."""
        self.wait()

    def save(self, snapshot: Snapshot) -> None:
        """Start to write; wait first for the snapshot before, if that is still being written."""
        self.wait()
        self.asked = time.monotonic()
        self.thread = threading.Thread(target=self.write, args=(snapshot,), name="checkpoint")
        self.thread.start()

    def is_overdue(self, minutes: float) -> bool:
        """Return whether so many minutes have passed since the last save, or since this was true: to ask once is enough."""
        if not 0 < minutes <= (time.monotonic() - self.asked) / 60:
            return False
        self.asked = time.monotonic()
        return True

    def write(self, snapshot: Snapshot) -> None:
        """Write and remove old checkpoints, in the thread; a failure is a warning, because older checkpoints remain."""
        if sys.platform == "linux":  # where it is this thread's niceness, and elsewhere the process's
            with suppress(OSError):  # a container may forbid it, and then the checkpoint matters more
                os.nice(NICENESS)
        try:
            write_checkpoint(self.checkpoints, snapshot, self.recipe, self.data)
        except Exception as error:  # a full disk has many names: OSError, SafetensorError
            self.failure = error
            log(f"warning: the checkpoint of step {snapshot.progress.step} could not be written: {error}")
            return
        self.failure = None
        try:
            remove_old(self.checkpoints, self.keep)
        except Exception as error:  # costs room, and no step
            log(f"warning: old checkpoints could not be removed: {error}")

    def wait(self) -> None:
        """Wait until nothing is being written."""
        if self.thread:
            self.thread.join()

    def close(self) -> None:
        """Wait for the last write; if it failed, the last steps are not on the disk: raise Stopped.

        Raise DataError where another try would fail as well, but for a full disk, of which there are many names.
        """
        self.wait()
        if self.failure:
            newest_one = newest_name(self.checkpoints) or "none"
            failed = f"the last checkpoint could not be written ({self.failure}); the newest one is {newest_one}."
            is_full = isinstance(self.failure, OSError) and self.failure.errno in FULL_DISK
            if not is_full and exit_code_of(self.failure) in (EXIT_USAGE, EXIT_DATA):
                raise DataError(f"{failed} Give the job a run folder that it may write in, then run again with --resume auto")
            raise Stopped(f"{failed} Make room for it and run again with --resume auto")

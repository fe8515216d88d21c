"""The training job: `torchrun --nproc_per_node=4 -m lmdist.train [--config recipe.toml] [--section.key value ...]`.

Reads the recipe, joins the job, and calls the loop in training/loop.py. torch is imported after the recipe is checked, so that
`--help` and usage errors are fast. Only rank 0 prints.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from lmdist import config
from lmdist.console import log
from lmdist.errors import DataError, MissingInputError, Stopped, UsageError, exit_on_error, one_line
from lmdist.settings import DEMO, DEMO_SETTINGS, DataSettings, PrepareSettings, Recipe
from lmdist.signals import AGENT, StopRequest, die_with_parent
from lmdist.storage.atomic import TakenError
from lmdist.storage.locks import exclusive_lock
from lmdist.text.prepare import prepare
from lmdist.tracking.run_folder import JOB_LOCK, refuse_links

LOCK_PATIENCE = 20.0
"""Seconds to wait for a job that is just exiting, such as the one before a restart."""
PEERS_FIRST = 2.0
"""torchrun reports the first rank that exits. A rank that lost a peer, or that fails as rank 0 does, waits so many seconds, so
that it is not the first."""


def main(argv: Sequence[str] | None = None) -> None:
    """Read the recipe, join the job, train."""
    is_main = os.environ.get("RANK", "0") == "0"
    if "RANK" in os.environ:
        die_with_parent(int(os.environ.get(AGENT, 0)) or None)
    with exit_on_error("lmdist.train", quiet=not is_main), nullcontext() if is_main else after_rank_0():
        stop = StopRequest().listen()
        recipe = config.load(argv, quiet=not is_main)
        refuse_links(Path(recipe.run_folder))
        prepare_if_absent(recipe, is_main=is_main)

        import torch

        from lmdist.training import distributed, loop

        with exclusive_lock(Path(recipe.run_folder) / JOB_LOCK, LOCK_PATIENCE) if is_main else nullcontext():
            settings = recipe.training
            try:
                world = distributed.join_job(
                    settings.device, recipe.data.global_batch, settings.accumulation, settings.timeout_seconds
                )
                loop.train(recipe, world, stop)
            except torch.OutOfMemoryError as error:
                raise UsageError(
                    "the GPU's memory is full: lower data.global_batch or data.window, or raise training.accumulation "
                    f"({one_line(error)})"
                ) from None
            except RuntimeError as error:
                if not distributed.lost_peer(error):
                    raise
                time.sleep(PEERS_FIRST)
                raise Stopped("another rank was lost; --resume auto continues from the last checkpoint") from None


@contextmanager
def after_rank_0() -> Iterator[None]:
    """Delay a user's error: rank 0 has it too and prints it, unless torchrun ends rank 0 because this rank exits first."""
    try:
        yield
    except (UsageError, DataError, MissingInputError):
        time.sleep(PEERS_FIRST)
        raise


def prepare_if_absent(recipe: Recipe, *, is_main: bool) -> None:
    """Prepare the data folder on rank 0 if it is absent and the recipe names its text; other ranks wait until it exists."""
    folder = Path(recipe.data.folder)
    settings = recipe.prepare
    if folder == Path(DataSettings.folder) and not (settings.inputs or settings.train):
        # Any setting of `prepare` replaces all of the demo's.
        settings = DEMO_SETTINGS if settings == PrepareSettings() else dataclasses.replace(settings, inputs=[DEMO])
    if folder.exists() or not (settings.inputs or settings.train):
        return
    if is_main:
        try:
            prepare(settings, folder)
        except TakenError:
            log(f"{folder} was prepared by another job meanwhile, and is used as it is")
    while not folder.exists():
        time.sleep(0.2)


if __name__ == "__main__":
    main()

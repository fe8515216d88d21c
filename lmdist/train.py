"""The training job: `torchrun --nproc_per_node=4 -m lmdist.train [--config recipe.toml] [--section.key value ...]`.

Reads the recipe, joins the job, and calls the loop in loop.py. torch is imported only when the recipe is right, so that
help and a wrong flag are answered at once; rank 0 alone speaks.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path

from lmdist import config
from lmdist.errors import report
from lmdist.prepare import prepare
from lmdist.settings import DataSettings, Recipe


def main(argv: Sequence[str] | None = None) -> None:
    """Read the recipe, join the job, train."""
    is_main = os.environ.get("RANK", "0") == "0"
    with report("lmdist.train", quiet=not is_main):
        recipe = config.load(argv, quiet=not is_main)
        prepare_if_absent(recipe, is_main=is_main)

        from lmdist import distributed, loop

        world = distributed.start(recipe.training.device, recipe.data.global_batch, recipe.training.accumulation)
        try:
            loop.train(recipe, world)
        finally:
            world.close()


def prepare_if_absent(recipe: Recipe, *, is_main: bool) -> None:
    """Make the data folder on rank 0 where the recipe says from what; the other ranks wait until it is there."""
    folder = Path(recipe.data.folder)
    settings = recipe.prepare
    if folder == Path(DataSettings.folder) and not settings.inputs:
        settings = dataclasses.replace(settings, inputs=["demo"])
    if folder.exists() or not (settings.inputs or settings.train):
        return
    if is_main:
        prepare(settings, folder)
    while not folder.exists():
        time.sleep(0.2)


if __name__ == "__main__":
    main()

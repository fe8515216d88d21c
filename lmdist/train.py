"""The training job: `torchrun --nproc_per_node=4 -m lmdist.train [--config recipe.toml] [--section.key value ...]`.

Reads the recipe, joins the job, and calls the loop in training/loop.py. torch is imported after the recipe is checked, so that
`--help` and usage errors are fast. Only rank 0 prints, but for the rank that is the first to fail.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path

from lmdist.command_line import exit_on_error, run_as_process
from lmdist.console import log
from lmdist.errors import (
    EXIT_AGAIN,
    EXIT_DEFECT,
    FULL_DISK,
    OwnDataError,
    Stopped,
    exit_code_of,
    reason_of,
    require,
)
from lmdist.settings import DEMO, DEMO_SETTINGS, DataSettings, PrepareSettings, Recipe
from lmdist.signals import AGENT, FIRST_FAILURE, StopRequest, die_with_parent
from lmdist.storage.atomic import TakenError
from lmdist.storage.locks import exclusive_lock
from lmdist.text.prepare import prepare
from lmdist.tracking.address import packages_of, store_address
from lmdist.tracking.run_folder import JOB_LOCK, check_run_folder

LOCK_WAIT_SECONDS = 20.0
"""Seconds to wait for a job that is just exiting, such as the one before a restart."""
PEERS_FIRST_SECONDS = 2.0
"""torchrun reports the first rank that exits. A rank that lost a peer waits so many seconds, so that it is not the first;
so does one that fails as rank 0 does, where no launcher asks for the first failure."""
SMALLER = "lower data.global_batch or data.window, raise training.accumulation, or take a smaller model"
"""What to do where the memory is full."""


def main(argv: Sequence[str] | None = None) -> None:
    """Read the recipe, join the job, train."""
    is_main = os.environ.get("RANK", "0") == "0"
    if "RANK" in os.environ:
        die_with_parent(int(os.environ.get(AGENT, 0)) or None)
    with exit_on_error("lmdist.train"), reported_once(is_main=is_main):
        stop = StopRequest().listen()
        from lmdist import config

        recipe = config.load(argv, quiet=not is_main)
        require_packages(recipe)
        check_run_folder(Path(recipe.run_folder), writes=os.environ.get("GROUP_RANK", "0") == "0")
        prepare_if_absent(recipe, argv, is_main=is_main)

        from lmdist.training import distributed, loop

        lock = exclusive_lock(Path(recipe.run_folder) / JOB_LOCK, LOCK_WAIT_SECONDS) if is_main else nullcontext()
        with stopped_by_full_disk(), lock:
            settings = recipe.training
            try:
                with distributed.full_memory_reported(SMALLER):
                    world = distributed.join_job(
                        settings.device, recipe.data.global_batch, settings.accumulation, settings.timeout_seconds
                    )
                    loop.train(recipe, world, stop)
            except RuntimeError as error:
                if not distributed.lost_peer(error):
                    raise
                time.sleep(PEERS_FIRST_SECONDS)
                raise Stopped("another rank was lost; --resume auto continues from the last checkpoint") from None


def require_packages(recipe: Recipe) -> None:
    """Raise UsageError for a package that is missing and that the job may import only at its end."""
    require("torch", "safetensors", "matplotlib", "toml")
    if recipe.tracking.mlflow:
        require(*packages_of(store_address()), purpose="the run is logged to MLflow unless you give --tracking.mlflow false: ")


@contextmanager
def stopped_by_full_disk() -> Iterator[None]:
    """Have a disk that is full at the start stop the job; later the loop goes on without what the disk rejects."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise Stopped(f"{reason_of(error)}: make room and run again with --resume auto") from None


@contextmanager
def reported_once(*, is_main: bool) -> Iterator[None]:
    """Have one rank of a machine report why the job fails or stops: the first that fails; for all else rank 0."""
    try:
        yield
    except (Stopped, KeyboardInterrupt):
        if not is_main:
            sys.exit(EXIT_AGAIN)
        raise
    except Exception as error:
        code = exit_code_of(error)
        is_first = is_first_failure(code) if FIRST_FAILURE in os.environ else is_main or isinstance(error, OwnDataError)
        if code == EXIT_DEFECT or is_first:
            raise
        if FIRST_FAILURE not in os.environ:  # rank 0 has it too, and would be ended by torchrun if this rank exited first
            time.sleep(PEERS_FIRST_SECONDS)
        sys.exit(code)


def is_first_failure(code: int) -> bool:
    """Record the exit code of this rank for the agent (job/agent.py); return whether no other rank has done so before."""
    try:
        with open(os.environ[FIRST_FAILURE], "x", encoding="ascii") as file:
            file.write(str(code))
    except FileExistsError:
        return False
    except OSError:
        pass  # a full disk: rather reported twice than not at all
    return True


def prepare_if_absent(recipe: Recipe, argv: Sequence[str] | None, *, is_main: bool) -> None:
    """Prepare the data folder on rank 0 if it is absent and the recipe names its text; other ranks wait until it exists.

    The command line says which settings were given by hand.
    """
    folder = Path(recipe.data.folder)
    settings = recipe.prepare
    if folder == Path(DataSettings.folder) and not (settings.inputs or settings.train):
        # Any setting of `prepare` replaces all of the demo's.
        settings = DEMO_SETTINGS if settings == PrepareSettings() else dataclasses.replace(settings, inputs=[DEMO])
    if folder.exists() or not (settings.inputs or settings.train):
        return
    if is_main:
        from lmdist.config import prepare_by_hand

        try:
            with redirect_stdout(sys.stderr):  # a job has no results on stdout
                prepare(settings, folder, flag="--data.folder", given=prepare_by_hand(argv))
        except TakenError:
            log(f"{folder} was prepared by another job meanwhile, and is used as it is")
    while not folder.exists():
        time.sleep(0.2)


if __name__ == "__main__":
    run_as_process(main)

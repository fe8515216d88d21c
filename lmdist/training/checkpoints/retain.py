"""Find the checkpoints of a run, and remove those that are not kept."""

from __future__ import annotations

import contextlib
import os
import reprlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from lmdist.console import log
from lmdist.errors import DataError, MissingInputError
from lmdist.storage.atomic import WRITING, recover, remove_folder
from lmdist.storage.reading import check_folder, read_bytes, refuse_link
from lmdist.tracking.run_folder import CHECKPOINTS, NEWEST, STEP, checkpoint_folders
from lmdist.training.checkpoints.format import MANIFEST
from lmdist.training.checkpoints.read import Checkpoint, open_resumable, read_manifest

Read = TypeVar("Read")


def find_checkpoint(run_or_checkpoint: Path) -> Path:
    """Return the checkpoint a user names: the folder itself, or the best one of a run; raise MissingInputError or DataError."""
    check_folder(run_or_checkpoint, "a run (runs/NAME) or a checkpoint is expected")
    if (run_or_checkpoint / MANIFEST).is_file():
        return run_or_checkpoint
    checkpoint = best_checkpoint(run_or_checkpoint / CHECKPOINTS)
    if checkpoint is None:
        raise MissingInputError(f"{run_or_checkpoint} holds no checkpoint: train it first, or name another run")
    return checkpoint


def run_of(checkpoint: Path) -> Path | None:
    """Return the run that a checkpoint lies in; None if it lies elsewhere."""
    checkpoints = checkpoint.resolve().parent
    return checkpoints.parent if checkpoints.name == CHECKPOINTS else None


def newest_checkpoint(checkpoints: Path) -> Path | None:
    """Return the newest undamaged checkpoint, None if there is none at all; warn of each one that is damaged or missing."""
    newest = newest_verified(checkpoints)
    return newest.path if newest else None


def newest_verified(checkpoints: Path) -> Checkpoint | None:
    """Return the same, held open; raise DataError where there were checkpoints and none can be read."""
    last = ""
    with contextlib.suppress(DataError, MissingInputError):
        last = read_bytes(checkpoints / NEWEST, 1000).decode(errors="replace").strip()
        if not os.path.isdir(checkpoints / last):
            log(f"warning: the checkpoint that was written last, {reprlib.repr(last)}, is missing")
    found = next((checkpoint for _, checkpoint in readable(checkpoints, open_resumable)), None)
    if found is None and (last or checkpoint_folders(checkpoints)):
        raise DataError(
            f"{checkpoints} has no checkpoint that can be read, and the run had made progress: restore one from a copy; "
            "to start anew, remove the folder or name another run"
        )
    return found


def best_checkpoint(checkpoints: Path) -> Path | None:
    """Return the checkpoint with the lowest validation loss, or the newest one if none was validated."""
    return best_of(list(readable(checkpoints, read_manifest))) or newest_checkpoint(checkpoints)


def best_of(found: list[tuple[Path, dict[str, Any]]]) -> Path | None:
    """Return the one of some checkpoints with the lowest validation loss, of equals the newest; None if none was validated."""
    validated = {}
    for folder, manifest in found:
        progress = manifest["progress"]
        if progress["valid_nats"] is not None:
            validated[progress["valid_nats"], -progress["step"]] = folder
    return validated[min(validated)] if validated else None


def readable(checkpoints: Path, read: Callable[[Path], Read]) -> Iterator[tuple[Path, Read]]:
    """Yield the checkpoints of a run and what `read` makes of them, newest first; warn of each damaged one."""
    refuse_link(checkpoints)
    for folder in checkpoint_folders(checkpoints):
        try:
            refuse_link(folder)
            yield folder, read(folder)
        except (DataError, MissingInputError) as error:
            log(f"warning: skipping a damaged checkpoint: {error}")


def remove_old(checkpoints: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints and the best one.

    What cannot be read is neither counted nor removed: it may be a copy under the name of a later step, or somebody's own.
    """
    found = list(readable(checkpoints, read_manifest))
    kept = {*(folder for folder, _ in found[:keep]), best_of(found)}
    for folder, _ in found:
        if folder not in kept:
            remove_folder(folder)


def remove_unfinished(checkpoints: Path) -> None:
    """Remove what a killed job left half written or half removed; no other job may be writing here."""
    refuse_link(checkpoints)
    if checkpoints.is_dir():
        recover(checkpoints, STEP.pattern, everyone=True)
        for left in checkpoints.glob(f".{NEWEST}.{WRITING}-*"):
            if left.name.rpartition("-")[2].isdigit() and not left.is_dir():
                left.unlink()

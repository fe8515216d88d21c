"""Find the checkpoints of a run, and remove those that are not kept."""

from __future__ import annotations

import contextlib
import os
import reprlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lmdist.console import log
from lmdist.errors import DataError, MissingInputError
from lmdist.storage.reading import check_folder, read_bytes
from lmdist.tracking.run_folder import CHECKPOINTS, NEWEST
from lmdist.training.checkpoints.format import MANIFEST
from lmdist.training.checkpoints.read import read_manifest, read_verified_manifest


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
    """Return the newest undamaged checkpoint; warn of each one that is damaged or missing."""
    newest = newest_verified(checkpoints)
    return newest[0] if newest else None


def newest_verified(checkpoints: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the same with its manifest."""
    with contextlib.suppress(DataError, MissingInputError):
        last = read_bytes(checkpoints / NEWEST, 1000).decode(errors="replace").strip()
        if not os.path.isdir(checkpoints / last):
            log(f"warning: the checkpoint that was written last, {reprlib.repr(last)}, is missing")
    return next(readable(checkpoints, read_verified_manifest), None)


def best_checkpoint(checkpoints: Path) -> Path | None:
    """Return the checkpoint with the lowest validation loss, or the newest one if none was validated."""
    validated = {}
    for folder, manifest in readable(checkpoints, read_manifest):
        progress = manifest["progress"]
        if progress["valid_nats"] is not None:
            validated[progress["valid_nats"], -progress["step"]] = folder
    return validated[min(validated)] if validated else newest_checkpoint(checkpoints)


def readable(checkpoints: Path, read: Callable[[Path], dict[str, Any]]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the checkpoints of a run and their manifests, newest first; warn of each damaged one."""
    for folder in sorted(checkpoints.glob("step-*"), reverse=True):
        if is_numbered(folder):
            try:
                yield folder, read(folder)
            except (DataError, MissingInputError) as error:
                log(f"warning: skipping a damaged checkpoint: {error}")


def remove_old(checkpoints: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints and the best one."""
    numbered = [folder for folder in sorted(checkpoints.glob("step-*")) if is_numbered(folder)]
    kept = {*numbered[-keep:], best_checkpoint(checkpoints)}
    for folder in numbered:
        if folder not in kept:
            # Renamed first: a kill leaves no half of it under a checkpoint's name. `remove_unfinished` removes the rest.
            removed = folder.rename(folder.with_name(f".{folder.name}.removed"))
            shutil.rmtree(removed)


def remove_unfinished(checkpoints: Path) -> None:
    """Remove what a killed job left half written or half removed; no other job may be writing here."""
    for left in checkpoints.glob(".*"):
        shutil.rmtree(left, ignore_errors=True)


def is_numbered(folder: Path) -> bool:
    """Return whether the name is one that `write_checkpoint` writes; a folder called `step-old` is the user's own."""
    return folder.is_dir() and folder.name.removeprefix("step-").isdigit()

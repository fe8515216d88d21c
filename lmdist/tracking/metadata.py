"""The run metadata, `mlflow.json`: what it takes to find a run in MLflow or to create it there, and whose folder it is.

They hold no address. A folder that was copied is not the run that its metadata name: what is trained in the copy must not
change the figures of the original, so it gets a run of its own. This module does not know how MLflow is accessed.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import re
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypedDict

from lmdist import __version__
from lmdist.console import log
from lmdist.errors import DataError
from lmdist.storage.atomic import write_atomic
from lmdist.storage.reading import read_json
from lmdist.storage.schema import check_schema
from lmdist.text.data_folder import META, token_file, token_files
from lmdist.tracking.run_folder import RUN_METADATA

COPY_TAG = "lmdist.copy_of"
"""The tag of a run whose folder was a copy: the id of the original's run."""
START_TAG = "lmdist.init."
"""How the tags begin that say what a run started from."""
RUN_ID = re.compile("[0-9a-f]{32}")
"""How MLflow names a run."""
SOURCE = {"mlflow.source.name": "lmdist-train", "mlflow.source.type": "LOCAL"}
"""The tags by which MLflow's page shows what has trained a run."""
GIT_SECONDS = 5
LONGEST_TAG = 500
"""In characters; MLflow refuses a run with a tag of some thousands, now and at each attempt."""


class Dataset(TypedDict):
    """A split of a data folder, as an input of a run."""

    name: str
    context: str
    digest: str
    source: str
    profile: str


METADATA: dict[str, Any] = {
    "run_key": str,
    "experiment": str,
    "name": str,
    "start_time": int,
    "status": Literal["RUNNING", "FINISHED", "FAILED", "KILLED", "UNKNOWN"],
    "parameters": {},
    "datasets": list[Dataset],
    "files": dict[str, str],
}
"""The keys of mlflow.json, and the schemas of their values."""
OPTIONAL: dict[str, Any] = {
    "run_id": str,
    "experiment_id": str,
    "tags": dict[str, str],
    "folder": {"path": str},
}
"""Those that it may have beside them."""


def new_metadata(
    run: Path,
    experiment: str,
    parameters: dict[str, Any],
    datasets: list[dict[str, str]],
    start_time: int,
    tags: dict[str, str],
) -> dict[str, Any]:
    """Return the metadata of a run that MLflow does not know yet; `start_time` is in milliseconds since 1970."""
    return {
        "run_key": uuid.uuid4().hex,  # a tag of the run: it finds the run when the response to its creation was lost
        "experiment": experiment,
        "name": run.absolute().name,
        "start_time": start_time,
        "status": "RUNNING",
        "parameters": parameters,
        "datasets": datasets,
        "tags": tags,
        "files": {},  # name and sha256 of each file that was uploaded
    }


def provenance(description: str, started_from: Mapping[str, Any]) -> dict[str, str]:
    """Return the tags by which MLflow's page shows who trains what: description, source, Git commit of this folder, user.

    And what it `started_from` (training/starting_point.py): the run of its base is its parent.
    """
    tags = {
        **SOURCE,
        "mlflow.note.content": description,
        "mlflow.user": getpass.getuser(),
        "lmdist.version": __version__,
    }
    tags |= {f"{START_TAG}{name}": str(value)[:LONGEST_TAG] for name, value in started_from.items() if value not in ("", 0)}
    if parent := run_id_of(started_from):
        tags["mlflow.parentRunId"] = parent
    with suppress(OSError, subprocess.SubprocessError):  # no git, no repository
        command = ["git", "rev-parse", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=GIT_SECONDS)
        tags["mlflow.source.git.commit"] = done.stdout.strip()
    return tags


def run_id_of(found: Mapping[str, Any]) -> str:
    """Return the `run_id` that a stranger's file may have; "" unless it is one: MLflow would look for a parent of any name."""
    run_id = found.get("run_id")
    return run_id if isinstance(run_id, str) and RUN_ID.fullmatch(run_id) else ""


def datasets_of(folder: Path) -> list[dict[str, str]]:
    """Return `dataset_inputs` of a data folder, none where there is no such folder any more; raise DataError."""
    path = folder / META
    if not path.exists():
        return []
    meta = read_json(path)
    check_schema(meta, {"splits": {}, "files": {}}, path)
    names = [name for split in meta["splits"] for name in (token_files(split, meta["files"]) or [token_file(split)])]
    check_schema(meta, {"files": {name: {"sha256": str} for name in names}}, path)
    return dataset_inputs(folder.name, meta)


def dataset_inputs(name: str, meta: dict[str, Any]) -> list[dict[str, str]]:
    """Return the splits of a data folder as inputs of an MLflow run; `meta` is the folder's meta.json."""
    return [
        {
            "name": name,
            "context": split,
            "digest": digest_of([meta["files"][name]["sha256"] for name in token_files(split, meta["files"])]),
            "source": json.dumps({"sources": meta.get("sources", [])}),
            "profile": json.dumps(counts),
        }
        for split, counts in meta.get("splits", {}).items()
    ]


def digest_of(sums: Sequence[str]) -> str:
    """Return what tells a split from others: the sha256 of its token file, or of those of several; MLflow has room for 36."""
    return (sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest())[:36]


# --- the file ------------------------------------------------------------------------------------------------------


def check_metadata(metadata: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return what was read from `path`, the metadata of a run; raise DataError where that is damaged."""
    check_schema(metadata, METADATA | {name: OPTIONAL[name] for name in OPTIONAL if name in metadata}, path)
    return metadata


def read_metadata(run: Path) -> dict[str, Any]:
    """Return the run metadata; empty where they are missing or unreadable."""
    try:
        return read_json(run / RUN_METADATA)
    except (FileNotFoundError, DataError):
        return {}


def write_metadata(run: Path, metadata: dict[str, Any]) -> None:
    """Write the run metadata atomically, as those of this folder."""
    write_atomic(run / RUN_METADATA, json.dumps({**metadata, "folder": identity_of(run)}, indent=1, ensure_ascii=False) + "\n")


def update_metadata(run: Path, **changes: Any) -> dict[str, Any]:
    """Change some entries of the run metadata on disk; return all of them."""
    metadata = {**read_metadata(run), **changes}
    write_metadata(run, metadata)
    return metadata


# --- whose folder --------------------------------------------------------------------------------------------------


def identity_of(run: Path) -> dict[str, Any]:
    """Return what a copy of a folder does not share with it: its path and its inode."""
    return {"path": str(run.resolve()), "inode": run.stat().st_ino}


def is_copy(run: Path, metadata: dict[str, Any]) -> bool:
    """Return whether metadata in the folder `run` were written in another one.

    A folder that is renamed keeps its inode; one that is restored from a backup, or mounted anew, keeps its path; a copy keeps
    neither. On another volume a copy may have the same inode by chance: then the original is still in its place.
    """
    before, now = metadata.get("folder"), identity_of(run)
    if not before or before["path"] == now["path"]:
        return False
    original = Path(before["path"])
    return before.get("inode") != now["inode"] or (
        original.is_dir()
        and not os.path.samefile(original, run)
        and read_metadata(original).get("run_key") == metadata.get("run_key")
    )


def own_metadata(run: Path, metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata that were read in the folder `run`; of a copy those of a run of its own, which a line reports.

    The key follows from the original's and the place of the copy: synced again, from a folder that is copied again to the same
    place, it is the same run.
    """
    if not is_copy(run, metadata):
        return metadata
    here, original = identity_of(run), metadata["folder"]["path"]
    log(f"{run} is a copy of {original}: it gets a run of its own in MLflow")
    key = hashlib.sha256(f"{metadata.get('run_key')} {here['path']} {here['inode']}".encode()).hexdigest()[:32]
    copied: dict[str, Any] = {"run_key": key, "name": Path(here["path"]).name}
    if "run_id" in metadata:
        copied["tags"] = {**metadata.get("tags", {}), COPY_TAG: metadata["run_id"]}
    return as_new_run({**metadata, **copied})


def as_new_run(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return metadata without what is known of their run in MLflow."""
    return {name: value for name, value in metadata.items() if name not in ("run_id", "experiment_id")} | {"files": {}}

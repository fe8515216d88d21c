"""The command `lmdist-sync RUN ...`: upload to MLflow what it lacks of runs.

A job uploads by itself while it runs (uploader.py, which starts this module with the hidden flag --follow); the command is
for what was left over when the server was away. It knows nothing of training.
"""

from __future__ import annotations

import os
import sys
import time
import tomllib
import uuid
from argparse import SUPPRESS
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmdist.command_line import CommandParser, exit_on_error
from lmdist.console import log
from lmdist.counted import counted
from lmdist.errors import EXIT_AGAIN, DataError, MissingInputError, Stopped, require
from lmdist.storage.locks import exclusive_lock
from lmdist.storage.reading import read_json, refuse_link
from lmdist.tracking.address import (
    DEFAULT_FILE,
    DEFAULT_STORE,
    configure,
    experiment_name,
    packages_of,
    store_address,
    without_password,
)
from lmdist.tracking.failures import FinalError, UploadError, upload_error
from lmdist.tracking.machines import monitor
from lmdist.tracking.metadata import (
    SOURCE,
    as_new_run,
    check_metadata,
    datasets_of,
    is_copy,
    new_metadata,
    own_metadata,
    write_metadata,
)
from lmdist.tracking.replay import Replay
from lmdist.tracking.run_folder import METRICS, RECIPE, RUN_METADATA, UPLOAD_LOCK, is_training, read_metrics
from lmdist.tracking.store import silence
from lmdist.tracking.uploader import follow

COMMAND = "lmdist-sync"


def main(argv: Sequence[str] | None = None) -> None:
    """Upload runs, or follow one while its job runs."""
    configure()
    with exit_on_error(COMMAND):
        arguments = parser().parse_args(argv)
        if arguments.monitor:
            monitor(arguments.runs[0], arguments.monitor)
        if not arguments.follow:
            sys.exit(sync(arguments.runs, new_run=arguments.new_run))
        code = 1
        try:
            code = follow(arguments.runs[0], sys.stderr)
        except Exception as error:  # a defect; its text may hold an address, and the job reports that points are missing
            log(f"warning: the uploader of {arguments.runs[0]} has failed ({type(error).__name__})")
        finally:
            os._exit(code)  # MLflow's threads may be waiting for a server


def parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = CommandParser(
        prog=COMMAND,
        description="Upload to MLflow what it lacks of a run: points, settings, samples and the picture, and how the run "
        "ended. A job does so by itself while it runs; this is for what was left over when its server was away.",
        epilog="MLflow is where MLFLOW_TRACKING_URI says, else mlflow.db in this directory: go to where the job ran. Nothing "
        "is uploaded twice, so this may be run at any time, and again. A run whose job was killed is marked KILLED; of one "
        "that was trained with --tracking.mlflow false the end is unknown, and FINISHED is assumed. A folder that is a copy "
        "of another run's gets a run of its own. Exit codes: 0 all is uploaded, 65 not the folder of a run, or MLflow does "
        "not accept it, whenever it is asked, 66 a folder that does not exist, 75 MLflow does not answer or a job is "
        "uploading: run it again.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the folder of a run, such as runs/demo")
    parser.add_argument(
        "--new-run",
        action="store_true",
        help="upload all of it as a new run, where the one of before was deleted in MLflow, or is not to be touched",
    )
    parser.add_argument("--follow", action="store_true", help=SUPPRESS)  # how a job starts it
    parser.add_argument("--monitor", metavar="KEY", help=SUPPRESS)  # how it starts it on its other machines
    return parser


def sync(runs: list[Path], *, new_run: bool = False) -> int:
    """Upload runs one after the other; return the exit code. Raise Stopped or DataError where MLflow does not accept a run."""
    require(*packages_of(store_address()))
    for run in runs:
        load_metadata(run)  # a mistake in the last one is reported before the first one is uploaded
    address = without_password(store_address())
    code = 0
    for run in runs:
        try:
            with exclusive_lock(run / UPLOAD_LOCK, 0):
                line = f"{upload(run, new_run=new_run)} ({address})"
        except Stopped:
            code = EXIT_AGAIN
            line = "its job or another lmdist-sync is uploading it: nothing to do now, run it again after that"
        except FinalError as error:
            raise DataError(f"MLflow ({address}) does not accept {run} ({error})") from None
        except UploadError as error:
            raise Stopped(f"MLflow ({address}) does not accept {run} ({error}): run it again later") from None
        except PermissionError as error:
            raise DataError(f"{run} cannot be written to: {error.strerror}") from None
        sys.stdout.write(f"{run}: {line}\n")
        sys.stdout.flush()
    return code


def upload(run: Path, *, new_run: bool = False) -> str:
    """Upload what is missing of one run; return a description of what that was. Raise UploadError where MLflow fails."""
    metadata = load_metadata(run)
    other = os.environ.get("MLFLOW_EXPERIMENT_NAME")
    if new_run:
        metadata = {**as_new_run(metadata), "run_key": uuid.uuid4().hex, "experiment": other or metadata["experiment"]}
    elif is_copy(run, metadata):
        metadata = own_metadata(run, metadata)
    elif store_address() == DEFAULT_STORE and metadata.get("run_id") and not DEFAULT_FILE.exists():
        raise MissingInputError(
            f"{DEFAULT_FILE} is not here, and MLflow has had {run}: go to where the job ran, or set its MLFLOW_TRACKING_URI; "
            "--new-run uploads it to a new one"
        )
    status: str = metadata["status"]
    if is_training(run):
        status = "RUNNING"  # a job without an uploader: MLflow is switched off, or the uploader was killed
    elif status in ("RUNNING", "UNKNOWN"):
        status = "KILLED" if status == "RUNNING" else "FINISHED"
    metadata["status"] = status
    replay = Replay(run, metadata, live=False)
    write_metadata(run, metadata)
    try:
        with silence():
            changed = replay.upload_status(status)
            replay.upload_files(ended=True)
    except Exception as error:  # any exception of MLflow and the libraries below it
        raise upload_error(error) from None
    counts = [(replay.num_points, "point"), (replay.num_files, "file")]
    uploaded = [counted(count, thing) for count, thing in counts if count]
    if uploaded:
        return f"{' and '.join(uploaded)} uploaded, {status}"
    return f"only the status was missing, {status}" if changed else f"nothing was missing, {status}"


def load_metadata(run: Path) -> dict[str, Any]:
    """Return the metadata of a run, built from its recipe where it has none. Raise MissingInputError or DataError."""
    from lmdist import config

    if not run.is_dir():
        raise MissingInputError(f"{run} does not exist; the folder of a run is expected, such as runs/demo")
    refuse_link(run / METRICS)
    metadata = read_json(run / RUN_METADATA) if (run / RUN_METADATA).exists() else {}
    if "run_key" in metadata:
        return check_metadata(metadata, run / RUN_METADATA)
    try:
        refuse_link(run / RECIPE)
        recipe = tomllib.loads((run / RECIPE).read_text(encoding="utf-8"))
        experiment, data = recipe["tracking"]["experiment"], Path(recipe["data"]["folder"])
    except FileNotFoundError:
        raise DataError(f"{run} holds no recipe.toml: it is not the folder of a run") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{run}/recipe.toml is not the recipe of a run: {error}") from None
    rows = read_metrics(run / METRICS)
    start_time = int((rows[0]["time"] if rows else time.time()) * 1000)
    name, settings = experiment_name(experiment), config.named_values(recipe)
    new = new_metadata(run, name, settings, datasets_of(data), start_time, SOURCE)
    return check_metadata({**new, "status": "UNKNOWN", **metadata}, run / (RUN_METADATA if metadata else RECIPE))


if __name__ == "__main__":
    main()

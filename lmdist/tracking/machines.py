"""The machines of a job in MLflow: the load of each, under its own name.

The uploader logs the load of rank 0's machine. On each of the others the first rank starts a process (companion.py) that
waits until the uploader has created the run, and then logs. It writes nothing into the run's folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from lmdist.tracking.address import is_file, store_address
from lmdist.tracking.companion import Companion, Job
from lmdist.tracking.metadata import read_metadata
from lmdist.tracking.store import Store, silence

COMMAND = ("-m", "lmdist.tracking.sync", "--monitor")
"""Arguments of Python that start the process; the key of the run and its folder follow."""
PERIOD_SECONDS = 2.0
"""Between two looks for the run."""
RETRY_SECONDS = 10.0
"""Between two attempts, while MLflow does not answer or the run is not marked as running yet."""


def machine_name() -> str | None:
    """Return the name of this machine in a job on several, by torchrun's variables; None for the only machine."""
    return f"node-{os.environ['GROUP_RANK']}" if os.environ.get("GROUP_WORLD_SIZE", "1") != "1" else None


def is_first_of_another_machine() -> bool:
    """Return whether this rank is the first of another machine than rank 0's, and MLflow is a server that it can reach."""
    first = os.environ.get("LOCAL_RANK") == "0" and os.environ.get("GROUP_RANK", "0") != "0"
    return first and not is_file(store_address())


def machine_monitor(run: Path, run_key: str) -> Companion:
    """Start the process for the run with this key in the folder `run`."""
    return Companion(*COMMAND, run_key, str(run), stderr=subprocess.DEVNULL)


def monitor(run: Path, run_key: str) -> None:
    """Log this machine's load to MLflow until the job, at the other end of stdin, has ended."""
    os.nice(19)
    Job(sys.stdin)
    with silence():
        while True:
            found = read_metadata(run)
            if found.get("run_key") == run_key and "run_id" in found:
                with suppress(Exception):  # any exception of MLflow and the libraries below it
                    store = Store(store_address())
                    if store.client.get_run(found["run_id"]).info.status == "RUNNING":
                        store.system_monitor(found["run_id"], machine_name()).monitor()
                time.sleep(RETRY_SECONDS)  # it has ended because MLflow did not answer
            time.sleep(PERIOD_SECONDS)

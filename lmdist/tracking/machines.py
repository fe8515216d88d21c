"""The machines of a job in MLflow: the load of each, under its own name.

The uploader logs the load of rank 0's machine. On each of the others the first rank starts a process, `MachineMonitor`, that
waits until the uploader has created the run, and then logs. It writes nothing into the run's folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from threading import Thread

from lmdist.tracking.address import is_file, store_address
from lmdist.tracking.metadata import read_metadata
from lmdist.tracking.store import Store, silence

COMMAND = ("-m", "lmdist.tracking.sync", "--monitor")
"""Arguments of Python that start the process; the key of the run and its folder follow."""
PERIOD_SECONDS = 2.0
"""Between two looks for the run."""
RETRY_SECONDS = 10.0
"""Between two attempts, while MLflow does not answer or the run is not marked as running yet."""
ONE_THREAD = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL", "NUMEXPR")}


def machine_name() -> str | None:
    """Return the name of this machine in a job on several, by torchrun's variables; None for the only machine."""
    return f"node-{os.environ['GROUP_RANK']}" if os.environ.get("GROUP_WORLD_SIZE", "1") != "1" else None


def is_first_of_another_machine() -> bool:
    """Return whether this rank is the first of another machine than rank 0's, and MLflow is a server that it can reach."""
    first = os.environ.get("LOCAL_RANK") == "0" and os.environ.get("GROUP_RANK", "0") != "0"
    return first and not is_file(store_address())


class MachineMonitor:
    """The handle of the process. It never raises, whatever becomes of the process."""

    def __init__(self, run: Path, run_key: str) -> None:
        """Start the process for the run with this key in the folder `run`."""
        self.child: subprocess.Popen[bytes] | None = None
        with suppress(OSError):  # no memory or no process left
            self.child = subprocess.Popen(
                [sys.executable, *COMMAND, run_key, str(run)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, **ONE_THREAD},
                process_group=0,
            )

    def close(self) -> None:
        """End the process."""
        if self.child:
            assert self.child.stdin
            self.child.kill()
            with suppress(subprocess.TimeoutExpired):
                self.child.wait(1)
            self.child.stdin.close()


def monitor(run: Path, run_key: str) -> None:
    """Log this machine's load to MLflow until the job, at the other end of stdin, has ended."""
    os.nice(19)
    Thread(target=end_with_job, name="job", daemon=True).start()
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


def end_with_job() -> None:
    """End this process when the pipe is closed: the job's process is gone."""
    sys.stdin.read()
    os._exit(0)

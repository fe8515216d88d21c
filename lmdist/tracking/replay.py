"""One run's folder replayed into MLflow: parameters, datasets, points, files, status.

`Replay` asks MLflow what it has of the run and uploads what is missing. So nothing is uploaded twice and nothing is lost,
whatever happened before: a server that was away, a response that was lost, a job that was killed. It does not know who calls
it: the uploader beside a job, or `lmdist-sync`.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from lmdist.storage.checksums import sha256
from lmdist.storage.reading import refuse_link
from lmdist.tracking.address import store_address
from lmdist.tracking.failures import FinalError
from lmdist.tracking.machines import machine_name
from lmdist.tracking.metadata import update_metadata
from lmdist.tracking.run_folder import METRICS, PICTURE, RECIPE, SAMPLE, SAMPLES, TEST, parse_row
from lmdist.tracking.store import POINTS_PER_REQUEST, Point, Store, logged_contexts

if TYPE_CHECKING:
    from lmdist.tracking.store import Run, SystemMetricsMonitor

FILES = (RECIPE, PICTURE, SAMPLE, f"{SAMPLES}/step-*.txt")
"""The files that are uploaded, unless they are links; checkpoints are too large."""
ROWS_PER_READ = 500


class Replay:
    """Uploads what MLflow lacks of one run. Each upload may raise any exception and can be repeated after it."""

    def __init__(self, run: Path, metadata: dict[str, Any], *, live: bool) -> None:
        """Replay the folder `run`; `live` says whether its job is still running."""
        self.run = run
        self.metadata = metadata
        self.live = live
        self.offset = 0  # MLflow has the points of the first `offset` bytes of metrics.jsonl
        self.uploaded_files: dict[str, tuple[int, int]] = {}  # modification time and size of each
        self.last_time: int | None = None  # of the last row, in milliseconds since 1970
        self.num_points = self.num_files = 0  # uploaded by this object
        self.monitor: SystemMetricsMonitor | None = None
        self.forget()

    def forget(self) -> None:
        """Forget what MLflow has: after an error it is unknown."""
        self.store: Store | None = None
        self.run_id = ""
        self.status = ""
        self.keys: set[str] = set()  # the metrics that the run had points of when it was opened
        self.points: dict[str, set[object]] = {}  # `identity` of these points, for each metric that was asked for
        if self.monitor:  # in a thread, for it may wait for the server
            Thread(target=self.monitor.finish, daemon=True).start()
            self.monitor = None

    @contextmanager
    def opened(self) -> Iterator[Store]:
        """Yield the store with the run open in it; after an error, forget what it has."""
        try:
            if self.store is None:
                self.store = self.open()
            yield self.store
        except Exception:
            self.forget()
            raise

    def open(self) -> Store:
        """Find the run in MLflow or create it; upload its parameters and datasets."""
        store = Store(store_address())
        run = self.find_or_create(store)
        run_id, experiment_id = run.info.run_id, run.info.experiment_id
        if run.info.lifecycle_stage == "deleted":
            raise FinalError(
                f"the run was deleted there: mlflow runs restore --run-id {run_id} brings it back, and "
                f"lmdist-sync --new-run {shlex.quote(str(self.run))} uploads all of it as a new run"
            )
        if run_id != self.metadata.get("run_id"):
            self.metadata = update_metadata(self.run, run_id=run_id, experiment_id=experiment_id, files={})
        elif "experiment_id" not in self.metadata:
            self.metadata = update_metadata(self.run, experiment_id=experiment_id)
        # A parameter that has changed since keeps its first value: MLflow rejects another.
        parameters = self.metadata["parameters"].items()
        store.log_parameters(run_id, {key: value for key, value in parameters if key not in run.data.params})
        contexts = logged_contexts(run)
        for dataset in self.metadata["datasets"]:
            if dataset["context"] not in contexts:
                store.log_dataset(run_id, dataset)
        self.status = run.info.status
        if self.live and self.status != "RUNNING":
            store.client.update_run(run_id, status="RUNNING")
            self.status = "RUNNING"
        self.keys = set(run.data.metrics)
        self.run_id = run_id
        return store

    def find_or_create(self, store: Store) -> Run:
        """Return the run: by its id, by its key where the response to its creation was lost, or a new one."""
        saved = self.metadata
        experiment, run_key = saved["experiment"], saved["run_key"]
        return (
            (store.get_run(saved["run_id"]) if "run_id" in saved else None)
            or store.find_run(experiment, run_key)
            or store.create_run(experiment, run_key, saved["name"], saved["start_time"], saved.get("tags", {}))
        )

    def upload_points(self, *, ended: bool = False) -> None:
        """Upload the new rows of metrics.jsonl; `ended` says that the last one is complete."""
        with self.opened() as store:
            while lines := self.new_lines(ended):
                points = [point for line in lines for point in self.missing_points(store, line)]
                for start in range(0, len(points), POINTS_PER_REQUEST):
                    part = points[start : start + POINTS_PER_REQUEST]
                    store.log_points(self.run_id, part)
                    self.num_points += len(part)
                self.offset += sum(map(len, lines))

    def new_lines(self, ended: bool) -> list[bytes]:
        """Return some lines of metrics.jsonl that were not uploaded yet; raise DataError for a link."""
        refuse_link(self.run / METRICS)
        try:
            with (self.run / METRICS).open("rb") as file:
                file.seek(self.offset)
                lines = list(islice(file, ROWS_PER_READ))
        except FileNotFoundError:
            return []
        return lines if ended or not lines or lines[-1].endswith(b"\n") else lines[:-1]

    def missing_points(self, store: Store, line: bytes) -> Iterator[Point]:
        """Yield the points of a line that MLflow does not have."""
        row = parse_row(line)
        if row is None:
            return
        step, self.last_time = row.pop("step"), int(row.pop("time") * 1000)
        for key, value in row.items():
            point = Point(key, float(value), self.last_time, step)
            if key not in self.points:
                logged = store.logged_points(self.run_id, key) if key in self.keys else []
                self.points[key] = {identity(one) for one in logged}
            if identity(point) not in self.points[key]:
                yield point

    def upload_status(self, status: str) -> bool:
        """Upload the last points and the status; return whether MLflow had another status."""
        self.upload_points(ended=True)
        with self.opened() as store:
            if status == self.status:
                return False
            if status == "RUNNING":
                store.client.update_run(self.run_id, status=status)
            else:
                store.client.set_terminated(self.run_id, status, None if self.live else self.last_time)
            self.status = status
        return True

    def upload_files(self, *, ended: bool = False) -> None:
        """Upload new and changed files; without `ended`, skip one that may still be being written.

        An error here forgets nothing: files fail where the artifact store does, and the run stays open for its points.
        """
        assert self.store
        for path in sorted(path for pattern in FILES for path in self.run.glob(pattern)):
            if os.path.islink(path) or os.path.islink(path.parent) or not path.is_file():
                continue  # a link may lead to a file that nobody wants uploaded
            name, facts = path.relative_to(self.run).as_posix(), path.stat()
            version = (facts.st_mtime_ns, facts.st_size)
            settled = ended or time.time() - facts.st_mtime > 1
            if self.uploaded_files.get(name) == version or not settled:
                continue
            digest = sha256(path)
            if self.metadata["files"].get(name) != digest:
                self.store.client.log_artifact(self.run_id, str(path), path.parent.name if "/" in name else None)
                self.metadata = update_metadata(self.run, files={**self.metadata["files"], name: digest})
                self.num_files += 1
            self.uploaded_files[name] = version

    def monitor_system(self) -> None:
        """Have MLflow log the machine's load until the process ends or an upload fails."""
        assert self.store
        if not self.monitor:
            self.monitor = self.store.system_monitor(self.run_id, machine_name())
            self.monitor.start()


def identity(point: Point) -> object:
    """Return what MLflow has once of a metric: a step, which is trained again after a kill; of what is measured, its value."""
    return (point.step, point.value) if point.key.startswith(TEST) else point.step

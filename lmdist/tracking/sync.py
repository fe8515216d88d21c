"""From a run's folder to MLflow: the command `lmdist-sync RUN`, and the follower that does the same while a job runs.

Both ask MLflow what it has of the run and bring in what is missing: settings, data, points, files, the status. So nothing
comes twice and nothing is lost, whatever happened before: a server that was away, an answer that was lost, a job that was
killed. This is the one file in which mlflow is said. It reads the run's folder (tracking.py) and knows nothing of training.

An address may hold a password, and the texts of errors hold addresses. So of an error only its name is shown, and what
MLflow and the libraries below it would say by themselves goes nowhere.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
import threading
import time
import tomllib
import warnings
from argparse import SUPPRESS
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lmdist.errors import EXIT_AGAIN, CommandParser, DataError, MissingInputError, Stopped, exit_on_error
from lmdist.storage.checksums import sha256
from lmdist.storage.locks import exclusive_lock
from lmdist.storage.reading import read_json
from lmdist.tracking.run_folder import (
    DEFAULT_STORE,
    JOB_LOCK,
    METRICS,
    MLFLOW_LOCK,
    MLFLOW_NOTE,
    change_note,
    datasets,
    new_note,
    read_metrics,
    store_address,
    write_note,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

DEFAULT_FILE = DEFAULT_STORE.removeprefix("sqlite:///")
KEY_TAG = "lmdist.run_key"
CONTEXT_TAG = "mlflow.data.context"
FILES = ("recipe.toml", "loss.png", "sample.txt", "samples/*.txt")
"""What MLflow gets of the folder beside the points; checkpoints are too large for it."""
VALUES_A_REQUEST = 1000
"""As many as MLflow takes."""
LINES_AT_ONCE = 500
PERIOD_SECONDS = 10.0
"""Between two looks at the folder. Each costs some 50 ms of a core that a training may want, so they are rare: below 1 %."""
LONGEST_PAUSE = 30.0
"""Seconds between two attempts while MLflow does not answer; the pause doubles from one second on."""
ATTEMPTS = 3
"""Failures in a row after which the end of a job does not try again."""
ORPHAN_SECONDS = 4.0
"""How long a follower outlives its job, at most."""
MLFLOW_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # MLflow's own retries hold on to a dead server for minutes, and make runs twice
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it would ask the server for what goes nowhere
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""Where the user has not set them."""


class Unanswered(Exception):
    """MLflow does not take what it is given; the text may be shown."""


def main(argv: Sequence[str] | None = None) -> None:
    """Bring runs into MLflow, or follow one."""
    for name, value in MLFLOW_SETTINGS.items():
        os.environ.setdefault(name, value)
    with exit_on_error("lmdist-sync"):
        arguments = parser().parse_args(argv)
        if not arguments.follow:
            sys.exit(sync(arguments.runs))
        code = 1
        try:
            code = follow(arguments.runs[0], sys.stderr)
        except Exception as error:  # a defect; its text may hold an address, and the job says that points are missing
            sys.stderr.write(f"warning: the follower of {arguments.runs[0]} has ended ({type(error).__name__})\n")
        finally:
            os._exit(code)  # MLflow's threads may be waiting for a server


def parser() -> CommandParser:
    """The command line."""
    made = CommandParser(
        prog="lmdist-sync",
        description="Bring into MLflow what it has not got of a run: points, settings, samples and the picture, and how the "
        "run ended. A job does so by itself while it runs; this is for what was left over when its server was away.",
        epilog="MLflow is where MLFLOW_TRACKING_URI says, else mlflow.db in this directory: go to where the job ran. Nothing "
        "is brought in twice, so this may be run at any time, and again. A run whose job was killed is marked KILLED; of one "
        "that was trained with --tracking.mlflow false it is not known, and FINISHED is assumed. Exit codes: 0 all is there, "
        "65 not the folder of a run, 66 a folder that is not there, 75 MLflow does not answer or a job is at it: run me again.",
    )
    made.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the folder of a run, such as runs/demo")
    made.add_argument("--follow", action="store_true", help=SUPPRESS)  # how a job starts it
    return made


def sync(runs: list[Path]) -> int:
    """Bring runs into MLflow, one after the other; gives the exit code. Raises Stopped where MLflow does not answer."""
    for run in runs:
        noted(run)  # a mistake in the last one is said before the first one is brought in
    where = without_password(store_address())
    code = 0
    for run in runs:
        try:
            with exclusive_lock(run / MLFLOW_LOCK, 0):
                line = f"{bring_in(run)} ({where})"
        except Stopped:
            code = EXIT_AGAIN
            line = "its job is bringing it in itself, or another lmdist-sync is: nothing to do now, run me again after that"
        except Unanswered as error:
            raise Stopped(f"MLflow ({where}) does not take {run} ({error}): run me again later") from None
        except PermissionError as error:
            raise DataError(f"{run} cannot be written to: {error.strerror}") from None
        sys.stdout.write(f"{run}: {line}\n")
        sys.stdout.flush()
    return code


def bring_in(run: Path) -> str:
    """Bring in what is missing of one run; gives what that was."""
    note = noted(run)
    if store_address() == DEFAULT_STORE and note.get("run_id") and not Path(DEFAULT_FILE).exists():
        raise MissingInputError(
            f"{DEFAULT_FILE} is not here, and MLflow has had {run}: go to where the job ran, or set its MLFLOW_TRACKING_URI"
        )
    status: str = note["status"]
    if is_live(run):
        status = "RUNNING"  # a job that nobody follows: it was told not to, or its follower died
    elif status in ("RUNNING", "UNKNOWN"):
        status = "KILLED" if status == "RUNNING" else "FINISHED"
    note["status"] = status
    mirror = Mirror(run, note, live=False)
    write_note(run, note)
    try:
        with silence():
            changed = mirror.end(status)
            mirror.files(ended=True)
    except Exception as error:  # whatever MLflow and the libraries below it raise
        raise Unanswered(name_of(error)) from None
    counts = [(mirror.points_sent, "point"), (mirror.files_sent, "file")]
    sent = [f"{count:,} {thing}{'s' if count > 1 else ''}" for count, thing in counts if count]
    if sent:
        return f"{' and '.join(sent)} brought in, {status}"
    return f"nothing was missing but that it is {status}" if changed else f"nothing was missing, {status}"


def noted(run: Path) -> dict[str, Any]:
    """The note of a run; made from its recipe where there is none. Raises MissingInputError or DataError."""
    if not run.is_dir():
        raise MissingInputError(f"{run} is not there; the folder of a run is expected, such as runs/demo")
    note = read_json(run / MLFLOW_NOTE) if (run / MLFLOW_NOTE).exists() else {}
    if "run_key" in note:
        return note
    try:
        recipe = tomllib.loads((run / "recipe.toml").read_text(encoding="utf-8"))
        parameters = {key: value for key, value in recipe.items() if not isinstance(value, dict)}
        for section in [key for key in recipe if key not in parameters]:
            parameters |= {f"{section}.{key}": value for key, value in recipe[section].items()}
        experiment, data = recipe["tracking"]["experiment"], Path(recipe["data"]["folder"])
    except FileNotFoundError:
        raise DataError(f"{run} holds no recipe.toml: it is not the folder of a run") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{run}/recipe.toml is not the recipe of a run: {error}") from None
    inputs = datasets(data.name, read_json(data / "meta.json")) if (data / "meta.json").exists() else []
    rows = read_metrics(run / METRICS)
    made = new_note(run, experiment, parameters, inputs, int((rows[0]["time"] if rows else time.time()) * 1000))
    return {**made, "status": "UNKNOWN", **note}


def is_live(run: Path) -> bool:
    """Whether a job trains in this folder."""
    if not (run / JOB_LOCK).exists():
        return False
    try:
        with exclusive_lock(run / JOB_LOCK, 0):
            return False
    except Stopped:
        return True


def follow(run: Path, voice: IO[str]) -> int:
    """Bring a run into MLflow while its job goes on, at the other end of stdin; gives the exit code. `voice` is heard."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # whoever ends a job may signal all its processes; there is work to do then
    os.nice(19)  # at 10 it still takes a tenth of a core from a training that has them all
    job = Job(sys.stdin)
    with silence(), ExitStack() as held:
        while True:
            with suppress(Stopped):  # the follower of a job that was killed a moment ago, or an lmdist-sync
                held.enter_context(exclusive_lock(run / MLFLOW_LOCK, 1))
                break
            if job.ended.is_set():
                return EXIT_AGAIN
        mirror = Mirror(run, change_note(run, status="RUNNING"), live=True)
        points, files = Effort("points", run / METRICS, run, voice), Effort("files", run, run, voice)
        while not job.ended.wait(1):
            if points.due:
                points.attempt(mirror.points)
            if points.works and files.due:
                files.attempt(mirror.files)
        mirror.note = change_note(run, status=job.status)
        done = points.persist(lambda: mirror.end(job.status)) and files.persist(lambda: mirror.files(ended=True))
        return 0 if done else EXIT_AGAIN


class Job:
    """The job that a follower follows, seen through the pipe between them."""

    def __init__(self, pipe: IO[str]) -> None:
        self.pipe = pipe
        self.ended = threading.Event()
        self.status = "RUNNING"
        threading.Thread(target=self.listen, name="job", daemon=True).start()

    def listen(self) -> None:
        """Wait for the one line that says how the job ended, and for the end of its process, which ends this one as well."""
        for line in iter(self.pipe.readline, ""):
            self.status = line.strip()
            self.ended.set()
        if not self.ended.is_set():
            self.status = "KILLED"
            self.ended.set()
        time.sleep(ORPHAN_SECONDS)
        os._exit(EXIT_AGAIN)


class Effort:
    """One thing that is tried until it works: a warning when it does not, a line when it does again."""

    def __init__(self, what: str, place: Path, run: Path, voice: IO[str]) -> None:
        self.what = what
        self.place = place
        self.run = run
        self.voice = voice
        self.failures = 0
        self.next_time = 0.0

    @property
    def works(self) -> bool:
        """Whether it worked the last time."""
        return self.failures == 0

    @property
    def due(self) -> bool:
        """Whether it is time for the next time."""
        return time.monotonic() >= self.next_time

    def attempt(self, action: Callable[[], Any]) -> bool:
        """Try once; the first failure is kept quiet, for a connection that was idle may just have been closed."""
        try:
            action()
        except Exception as error:  # whatever MLflow and the libraries below it raise: tracking never hurts training
            self.next_time = time.monotonic() + min(2**self.failures, LONGEST_PAUSE)
            self.failures += 1
            if self.failures == 2:
                self.say(
                    f"warning: MLflow does not take this run's {self.what} ({name_of(error)}); they are in {self.place}; "
                    f"lmdist-sync {self.run} brings them in later"
                )
            return False
        if self.failures > 1:
            self.say(f"MLflow takes this run's {self.what} again")
        self.next_time = time.monotonic() + PERIOD_SECONDS
        self.failures = 0
        return True

    def persist(self, action: Callable[[], Any]) -> bool:
        """Try a few times, once where it has failed for long."""
        while not self.attempt(action):
            if self.failures >= ATTEMPTS:
                return False
            time.sleep(max(0.0, self.next_time - time.monotonic()))
        return True

    def say(self, line: str) -> None:
        """Say a line to whoever is left to hear it."""
        with suppress(OSError):
            self.voice.write(f"{line}\n")
            self.voice.flush()


class Mirror:
    """One run's folder, and what MLflow has of it. Each method may raise anything, and can be called again after that."""

    def __init__(self, run: Path, note: dict[str, Any], *, live: bool) -> None:
        """Mirror `run`, of which `note` is the note; `live` says whether its job is still going on."""
        self.run = run
        self.note = note
        self.live = live
        self.store = store_address()
        self.offset = 0  # what lies before it in metrics.jsonl, MLflow has
        self.marks: dict[str, tuple[int, int]] = {}  # of files that MLflow has: time and size
        self.end_time: int | None = None
        self.points_sent = self.files_sent = 0
        self.monitor: Any = None
        self.client: MlflowClient | None = None
        self.run_id = ""
        self.forget()

    def forget(self) -> None:
        """After a failure nothing is known of what MLflow has."""
        self.run_id = ""
        self.status = ""
        self.keys: set[str] = set()  # the keys that it had points of when it was asked
        self.steps: dict[str, set[int]] = {}  # the steps that it had of each
        if self.monitor:  # its end may have to wait for the server
            threading.Thread(target=self.monitor.finish, daemon=True).start()
            self.monitor = None

    def points(self, *, ended: bool = False) -> None:
        """Bring in the lines of metrics.jsonl that have come; `ended` says that the last one is not being written."""
        try:
            if not self.run_id:
                self.begin()
            while lines := self.lines(ended):
                self.send([row for row in map(parsed, lines) if row])
                self.offset += sum(map(len, lines))
        except Exception:
            self.forget()
            raise

    def end(self, status: str) -> bool:
        """Bring in the last points and the status; gives whether MLflow had another status."""
        self.points(ended=True)
        assert self.client
        try:
            if status == self.status:
                return False
            if status == "RUNNING":
                self.client.update_run(self.run_id, status=status)
            else:
                self.client.set_terminated(self.run_id, status, None if self.live else self.end_time)
            self.status = status
        except Exception:
            self.forget()
            raise
        return True

    def files(self, *, ended: bool = False) -> None:
        """Bring in the files that are new or other than before, and have the machine watched while the job goes on."""
        assert self.client
        for path in sorted(path for pattern in FILES for path in self.run.glob(pattern)):
            name, facts = path.relative_to(self.run).as_posix(), path.stat()
            mark = (facts.st_mtime_ns, facts.st_size)
            if self.marks.get(name) == mark or not (ended or time.time() - facts.st_mtime > 1):  # being written
                continue
            digest = sha256(path)
            if self.note["files"].get(name) != digest:
                self.client.log_artifact(self.run_id, str(path), path.parent.name if "/" in name else None)
                self.note = change_note(self.run, files={**self.note["files"], name: digest})
                self.files_sent += 1
            self.marks[name] = mark
        if self.live and not ended and not self.monitor:
            self.monitor = watch_machine(self.run_id, self.store)

    def begin(self) -> None:
        """Find the run in MLflow or make it, and bring in its settings and its data."""
        import mlflow
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param

        if self.store == DEFAULT_STORE:
            make_default_store()
        self.client = mlflow.MlflowClient(self.store)
        found = self.found() or self.client.create_run(
            experiment_id(self.client, self.note["experiment"]),
            self.note["start_time"],
            {KEY_TAG: self.note["run_key"]},
            self.note["name"],
        )
        if found.info.lifecycle_stage == "deleted":
            raise Unanswered("it was deleted there")
        run_id = found.info.run_id
        if run_id != self.note.get("run_id"):
            self.note = change_note(self.run, run_id=run_id, files={})
        # A parameter that has changed since keeps its first value: MLflow takes no other.
        missing = [Param(key, str(value)) for key, value in self.note["parameters"].items() if key not in found.data.params]
        self.client.log_batch(run_id, params=missing, synchronous=True)
        inputs = found.inputs.dataset_inputs if found.inputs else []
        contexts = {tag.value for dataset in inputs for tag in dataset.tags if tag.key == CONTEXT_TAG}
        for facts in self.note["datasets"]:
            if facts["context"] not in contexts:
                dataset = Dataset(facts["name"], facts["digest"], "lmdist-prepare", facts["source"], profile=facts["profile"])
                self.client.log_inputs(run_id, [DatasetInput(dataset, [InputTag(CONTEXT_TAG, facts["context"])])])
        self.status = found.info.status
        if self.live and self.status != "RUNNING":
            self.client.update_run(run_id, status="RUNNING")
            self.status = "RUNNING"
        self.keys = set(found.data.metrics)
        self.run_id = run_id

    def found(self) -> Run | None:
        """The run in MLflow: by its id, or by its key where the answer to its making was lost."""
        from mlflow import MlflowException

        assert self.client
        if "run_id" in self.note:
            try:
                return self.client.get_run(self.note["run_id"])
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        named = f"tags.`{KEY_TAG}` = '{self.note['run_key']}'"
        experiment = experiment_id(self.client, self.note["experiment"])
        return next(iter(self.client.search_runs([experiment], named, order_by=["start_time"])), None)

    def lines(self, ended: bool) -> list[bytes]:
        """Some of the lines that MLflow has not got."""
        try:
            with (self.run / METRICS).open("rb") as file:
                file.seek(self.offset)
                lines = list(islice(file, LINES_AT_ONCE))
        except FileNotFoundError:
            return []
        return lines if ended or not lines or lines[-1].endswith(b"\n") else lines[:-1]

    def send(self, rows: list[dict[str, Any]]) -> None:
        """Bring in the points of some lines, but for those that MLflow has."""
        from mlflow.entities import Metric

        assert self.client
        points = []
        for row in rows:
            self.end_time = int(row["time"] * 1000)
            points += [
                Metric(key, float(value), self.end_time, row["step"])
                for key, value in row.items()
                if key not in ("step", "time") and row["step"] not in self.steps_of(key)
            ]
        for start in range(0, len(points), VALUES_A_REQUEST):
            part = points[start : start + VALUES_A_REQUEST]
            self.client.log_batch(self.run_id, metrics=part, synchronous=True)
            self.points_sent += len(part)

    def steps_of(self, key: str) -> set[int]:
        """The steps at which MLflow had this figure when it was last asked."""
        assert self.client
        if key not in self.steps:
            history = self.client.get_metric_history(self.run_id, key) if key in self.keys else []
            self.steps[key] = {point.step for point in history}
        return self.steps[key]


def parsed(line: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl; None where a kill has cut it short."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def experiment_id(client: MlflowClient, name: str) -> str:
    """The experiment's id; made where it is not there."""
    found = client.get_experiment_by_name(name)
    if found:
        return found.experiment_id
    # With this tag the page opens on runs and their curves, not on traces of chat models.
    return client.create_experiment(name, tags={"mlflow.experimentKind": "custom_model_development"})


def make_default_store() -> None:
    """Make mlflow.db, whole or not at all.

    MLflow takes a second or more for it. If it is killed meanwhile, or two do it at once, the file may be of no use for ever.
    """
    from mlflow import MlflowClient

    file = Path(DEFAULT_FILE)
    if file.exists():
        return
    aside = Path(f"{file}.making-{os.getpid()}")
    try:
        MlflowClient(f"sqlite:///{aside}").search_experiments(max_results=1)
        try:
            os.link(aside, file)
        except FileExistsError:  # another job was faster; a rename would replace what it has written since
            pass
        except OSError:  # a file system without links
            aside.rename(file)
    finally:
        aside.unlink(missing_ok=True)


def watch_machine(run_id: str, store: str) -> Any:
    """MLflow's own watch over CPU, memory, disk, network and GPUs; it has a thread, and ends with an outage."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=store)
    monitor.start()
    return monitor


@contextmanager
def silence() -> Iterator[None]:
    """Let nothing out that MLflow and the libraries below it say, now or when the process ends."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - loggers keep it
    with redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def name_of(error: BaseException) -> str:
    """What went wrong, without the text of the error, which may hold an address with a password."""
    if isinstance(error, Unanswered):
        return str(error)
    cause = error.__cause__ or error.__context__
    if type(error).__name__ == "MlflowException" and cause:
        error = cause
    code = getattr(error, "error_code", "")
    return f"{type(error).__name__} {code}" if re.fullmatch("[A-Z_]+", str(code)) else type(error).__name__


def without_password(store: str) -> str:
    """The address of a store, less user name, password and query."""
    return re.sub(r"[?#].*", "", re.sub(r"//.*@", "//", store))


if __name__ == "__main__":
    main()

"""What MLflow has of a run when its server was dead, stopped, failing or forgetful, and what lmdist-sync adds later.

The servers are real. Most jobs here are a logger without a training: the uploader does not know the difference.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import mlflow
import psutil
import pytest

from lmdist import config
from lmdist.settings import DataSettings, ModelSettings, Recipe, TrackingSettings
from lmdist.storage.locks import exclusive_lock
from lmdist.storage.reading import read_json
from lmdist.tracking import sync as command
from lmdist.tracking import uploader
from lmdist.tracking.logger import MachineLogger, MetricsLogger, RunLogger, logger_of_rank
from lmdist.tracking.metadata import read_metadata
from lmdist.tracking.run_folder import read_metrics
from servers import Proxy, Server
from support.jobs import SMALL, rows, small_data, train

FREQUENT = ("-c", "from lmdist.tracking import sync, uploader; uploader.PERIOD_SECONDS = 1; sync.main()", "--follow")
"""The uploader with a shorter period."""
SECRETS = {"MLFLOW_TRACKING_PASSWORD": "planted-1", "AWS_SECRET_ACCESS_KEY": "planted-2", "LMDIST_TOKEN": "planted-3"}


@pytest.fixture(scope="module")
def server(tmp_path_factory, empty_store):
    running = Server(tmp_path_factory.mktemp("server"))
    shutil.copy(empty_store, running.folder / "server.db")
    running.start()
    yield running
    running.kill()


@pytest.fixture
def proxy(server):
    running = Proxy(server.port)
    yield running
    running.shutdown()
    running.server_close()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty directory to work in, and MLflow's default store."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


@pytest.fixture
def frequent(monkeypatch):
    monkeypatch.setattr(uploader, "COMMAND", FREQUENT)


class Job(RunLogger):
    """A job's logger without the training."""

    def __init__(self, run: str, step: int = 0, *, resume: bool = False, mlflow: bool = True, **parameters: object) -> None:
        path = Path("runs") / run
        path.mkdir(parents=True, exist_ok=True)
        settings = TrackingSettings(mlflow=mlflow)
        meta = {
            "splits": {"train": {"tokens": 7}},
            "files": {"train.bin": {"sha256": "ab" * 32}},
            "sources": [],
        }
        super().__init__(path, settings, {"seed": 1, **parameters}, "data", meta, step, resume=resume)

    def log(self, first: int, last: int) -> None:
        """Lines of so many steps."""
        for step in range(first, last + 1):
            self.log_metrics(step, {"train/loss": 1 / step, "train/tokens": float(step)})

    def close(self, status: str) -> None:
        """End as a job does, and wait for an uploader that it killed: a real job exits before the uploader is dead."""
        super().close(status)
        if self.uploader and self.uploader.process.child:
            self.uploader.process.child.wait(60)

    def until_found(self) -> None:
        """Wait until MLflow has the run."""
        until(lambda: "run_id" in read_metadata(self.run))


class Stderr:
    """All that was printed on stderr."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self.capfd = capfd
        self.text = ""

    def all(self) -> str:
        """Return what was printed so far."""
        self.text += self.capfd.readouterr().err
        return self.text

    def __contains__(self, line: str) -> bool:
        return line in self.all()


def until(condition: Callable[[], object]) -> None:
    """Wait for what an uploader does."""
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def sync(*runs: str, code: int = 0) -> str:
    """Return what lmdist-sync prints."""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "lmdist.tracking.sync", *runs], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert time.monotonic() - start < 100
    printed = done.stdout + done.stderr
    assert "Traceback" not in printed
    return printed


def sync_here(*runs: str, code: int = 0) -> str:
    """The same in this process, which has imported MLflow already. For servers only: MLflow caches the default store."""
    start = time.monotonic()
    printed = StringIO()
    with patch.dict(os.environ), redirect_stdout(printed), redirect_stderr(printed), pytest.raises(SystemExit) as ended:
        command.main(runs)
    assert ended.value.code == code, printed.getvalue()
    assert time.monotonic() - start < 100
    return printed.getvalue()


def points(store: str, run_id: str, key: str) -> list[tuple[int, int, float]]:
    """Return step, time and value of each point of a metric in MLflow."""
    history = mlflow.MlflowClient(store).get_metric_history(run_id, key)
    return sorted((point.step, point.timestamp, point.value) for point in history)


def check(store: str, run: str | Path, status: str) -> str:
    """Assert that MLflow has the run once, each point once, and the status; return the run's id."""
    run = Path("runs") / run
    metadata = read_json(run / "mlflow.json")
    client = mlflow.MlflowClient(store)
    experiment = client.get_experiment_by_name("lmdist")
    assert experiment
    named = [found for found in client.search_runs([experiment.experiment_id]) if found.info.run_name == run.name]
    (found,) = (found for found in named if found.data.tags["lmdist.run_key"] == metadata["run_key"])
    assert found.info.run_id == metadata["run_id"]
    assert found.info.status == status
    for key in {key for row in rows(run) for key in row} - {"step", "time"}:
        expected = sorted((row["step"], int(row["time"] * 1000), row[key]) for row in rows(run) if key in row)
        assert points(store, metadata["run_id"], key) == expected, key
    assert found.data.params.keys() == metadata["parameters"].keys()
    assert found.inputs
    assert len(found.inputs.dataset_inputs) == len(metadata["datasets"])
    artifacts = {item.path for folder in (None, "samples") for item in client.list_artifacts(metadata["run_id"], folder)}
    files = {
        path.relative_to(run).as_posix() for name in ("recipe.toml", "*.png", "*.txt", "samples/*") for path in run.glob(name)
    }
    assert artifacts - {"samples"} == files
    return metadata["run_id"]


@pytest.mark.slow
def test_a_server_that_was_dead_at_the_start_or_died_during_the_job_gets_all_of_it_later(
    server, here, monkeypatch, capfd, frequent
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    stderr = Stderr(capfd)
    died = Job("died")
    with died:
        died.log(1, 20)
        died.until_found()
        server.kill()
        dead = Job("dead")
        died.log(21, 40)
        died.log_text("samples/step-000000040.txt", "some words\n")
        with suppress(ZeroDivisionError), dead:
            dead.log(1, 2000)
            refused = (
                "does not accept this run's points (ConnectionRefusedError: Connection refused); they are in runs/dead/metrics"
            )
            until(lambda: refused in stderr)
            dead.log(0, 0)
        until(lambda: "they are in runs/died/metrics" in stderr)
        began = time.monotonic()
    assert time.monotonic() - began < 60
    for run in ("died", "dead"):
        assert f"warning: MLflow has not received all of this run; lmdist-sync runs/{run} uploads the rest" in stderr
    assert "Traceback" not in stderr
    server.start()
    both = ("runs/died", "runs/dead")
    printed = sync_here(*both)
    assert "runs/died: " in printed
    assert "1 file uploaded, FINISHED" in printed
    assert "runs/dead: 4,000 points uploaded, FAILED" in printed
    check(server.uri, "died", "FINISHED")
    run_id = check(server.uri, "dead", "FAILED")
    found = mlflow.MlflowClient(server.uri).get_run(run_id)
    assert found.info.start_time == read_metadata(Path("runs/dead"))["start_time"]
    assert found.info.end_time == int(rows(Path("runs/dead"))[-1]["time"] * 1000)
    assert re.search("runs/died: nothing was missing, FINISHED .*\nruns/dead: nothing was missing, FAILED", sync_here(*both))
    check(server.uri, "died", "FINISHED")


@pytest.mark.slow
def test_a_server_that_is_stopped_does_not_hold_a_job_up(server, here, monkeypatch, request, frequent):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "1")
    assert uploader.SERVER_WAIT_SECONDS + 1 <= 10, "a kill takes up to a second more"
    monkeypatch.setattr(uploader, "SERVER_WAIT_SECONDS", 3)
    job = Job("one")
    with job:
        job.log(1, 20)
        job.until_found()
        client, run_id = mlflow.MlflowClient(server.uri), read_metadata(job.run)["run_id"]
        until(lambda: "system/cpu_utilization_percentage" in client.get_run(run_id).data.metrics)
        server.signal(signal.SIGSTOP)
        request.addfinalizer(lambda: server.signal(signal.SIGCONT))
        job.log(21, 40)
        time.sleep(1.5)  # so that a request is on its way
        began = time.monotonic()
    assert time.monotonic() - began < 60
    with monkeypatch.context() as hurried:
        hurried.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        hurried.setenv("MLFLOW_TRACKING_URI", server.uri.replace("http://", "http://somebody:pass-word@"))
        printed = sync_here("runs/one", code=75)
    assert printed.startswith(f"lmdist-sync: MLflow ({server.uri}) does not accept runs/one (")
    assert printed.count("\n") == 1
    server.signal(signal.SIGCONT)
    sync_here("runs/one")
    check(server.uri, "one", "FINISHED")


@pytest.mark.slow
def test_lost_responses_and_failures_create_nothing_twice(server, proxy, here, monkeypatch, capfd, frequent):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.uri)
    stderr = Stderr(capfd)
    proxy.mode = "lost"  # the server creates an experiment, a run, points, and the uploader does not learn of it
    job = Job("one")
    with job:
        job.log(1, 20)
        until(lambda: "warning: MLflow does not accept this run's points" in stderr)
        proxy.mode = "fine"
        until(lambda: "MLflow accepts this run's points again" in stderr)
        proxy.mode = "lost"
        job.log(21, 40)
    assert stderr.all().count("MLflow does not accept this run's points") == 2  # once an outage
    proxy.mode, proxy.delay_seconds = "slow", 0.2
    sync_here("runs/one")
    check(server.uri, "one", "FINISHED")


@pytest.mark.slow
def test_no_secret_gets_anywhere(server, proxy, here, monkeypatch):
    """A real training, by way of a server with a password that fails at first."""
    data = small_data(here / "data")
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.uri.replace("http://", "http://somebody:pass-word@"))
    proxy.mode = "error"
    flags = [*SMALL, f"--data.folder={data}", "--tracking.mlflow=true", "--training.steps=5", "--run_folder=runs/one"]
    done = train(1, *flags, cwd=here)
    printed = done.stdout + done.stderr
    assert "warning: MLflow has not received all of this run" in printed
    proxy.mode = "fine"
    printed += sync("runs/one")
    run_id = check(server.uri, "one", "FINISHED")
    assert mlflow.MlflowClient(server.uri).get_run(run_id).data.params["seed"] == "1"
    assert "127.0.0.1" not in Path("runs/one/mlflow.json").read_text()
    assert f"({proxy.uri})" in printed
    shutil.copytree(server.folder, here / "server")
    texts = [printed.encode(), *(path.read_bytes() for path in here.rglob("*") if path.is_file())]
    for secret in ("pass-word", "somebody", *SECRETS.values()):
        assert not any(secret.encode() in text for text in texts), secret


ENDLESS = """
import time
from pathlib import Path
from lmdist.settings import DataSettings, ModelSettings, Recipe, TrackingSettings
from lmdist.tracking.logger import MachineLogger, MetricsLogger, RunLogger, logger_of_rank
with RunLogger(Path("runs/one"), TrackingSettings(), {"seed": 1}, "data", {}, 0, resume=False) as logger:
    for step in range(1, 31):
        logger.log_metrics(step, {"train/loss": 1 / step, "train/tokens": float(step)})
    time.sleep(600)
"""


@pytest.mark.slow
def test_a_job_that_is_killed_leaves_no_process_and_resumes_as_the_same_run(server, here, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    run = Path("runs/one")
    run.mkdir(parents=True)
    job = subprocess.Popen([sys.executable, "-c", ENDLESS])
    client = mlflow.MlflowClient(server.uri)
    until(lambda: "run_id" in read_metadata(run) and points(server.uri, read_metadata(run)["run_id"], "train/loss"))
    (child,) = psutil.Process(job.pid).children()
    child.send_signal(signal.SIGINT)  # Ctrl-C and Slurm reach it as well
    child.send_signal(signal.SIGTERM)
    job.kill()
    killed = time.monotonic()
    job.wait()
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() - killed < 60  # 5 on a machine that is not busy
        time.sleep(0.05)
    run_id = read_metadata(run)["run_id"]
    if client.get_run(run_id).info.status == "RUNNING":  # it had four seconds; nobody else may say so
        sync_here("runs/one")
    check(server.uri, "one", "KILLED")

    again = Job("one", 20, resume=True, learning_rate=2.0)  # a new setting, and steps that come again
    with again:
        until(lambda: client.get_run(run_id).info.status == "RUNNING")
        again.log(21, 50)
    assert [step for step, _, _ in points(server.uri, run_id, "train/loss")] == list(range(1, 51))
    found = client.get_run(run_id)
    assert found.info.status == "FINISHED"
    assert found.data.params["seed"] == "1"
    assert "learning_rate" not in found.data.params


@pytest.mark.slow
def test_each_machine_of_a_job_logs_its_own_load(server, here, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "1")
    # As torchrun sets them on two machines, for the first rank of each.
    for name, value in {"GROUP_WORLD_SIZE": "2", "LOCAL_RANK": "0", "GROUP_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert type(logger_of_rank(Path("runs/one"), "key")) is MetricsLogger, "its uploader does that"
    with Job("one") as job:
        monkeypatch.setenv("GROUP_RANK", "1")
        with logger_of_rank(job.run, job.run_key) as other:
            assert isinstance(other, MachineLogger)
            assert other.monitor.child
            job.until_found()
            client, run_id = mlflow.MlflowClient(server.uri), read_metadata(job.run)["run_id"]
            expected = {f"system/node-{number}/cpu_utilization_percentage" for number in (0, 1)}
            until(lambda: expected <= client.get_run(run_id).data.metrics.keys())
        assert other.monitor.child.poll() is not None
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert type(logger_of_rank(job.run, job.run_key)) is MetricsLogger
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert type(logger_of_rank(job.run, job.run_key)) is MetricsLogger, "SQLite is for one machine"


@pytest.mark.slow
def test_two_jobs_create_the_default_store_at_once(here, capfd):
    first, second = Job("one"), Job("two")
    with first, second:
        first.log(1, 5)
        second.log(1, 5)
    store = f"sqlite:///{here}/mlflow.db"
    printed = capfd.readouterr().err
    for run in ("one", "two"):  # no warning, only where the pages are
        page = f"MLflow: http://127.0.0.1:5000/#/experiments/1/runs/{read_metadata(Path('runs', run))['run_id']}?workflow"
        assert page in printed
    assert printed.count("mlflow ui --backend-store-uri sqlite:///mlflow.db\n") == 2
    assert "warning" not in printed
    assert {path.name for path in here.iterdir() if path.is_file()} == {"mlflow.db"}
    check(store, "one", "FINISHED")
    check(store, "two", "FINISHED")


@pytest.mark.slow
def test_a_run_without_mlflow_is_uploaded_by_its_recipe(here, monkeypatch, empty_store):
    data = small_data(here / "data")
    shutil.copy(empty_store, here / "mlflow.db")
    with Job("one", mlflow=False) as job:
        job.log(1, 5)
    recipe = Recipe(data=DataSettings(folder=str(data)), model=ModelSettings(hidden_size=24))
    Path("runs/one/recipe.toml").write_text(config.as_toml(recipe))
    assert not Path("runs/one/mlflow.json").exists()
    assert "uploaded, FINISHED (sqlite:///mlflow.db)" in sync("runs/one")
    run_id = check(f"sqlite:///{here}/mlflow.db", "one", "FINISHED")
    found = mlflow.MlflowClient(f"sqlite:///{here}/mlflow.db").get_run(run_id)
    assert found.data.params["model.hidden_size"] == "24"
    assert found.inputs
    assert {dataset.tags[0].value for dataset in found.inputs.dataset_inputs} == {"train", "valid"}

    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert "mlflow.db is not here, and MLflow has had ../runs/one" in sync("../runs/one", code=66)
    assert not Path("mlflow.db").exists()


def test_lmdist_sync_leaves_a_run_to_its_uploader(here):
    with Job("one", mlflow=False) as job:
        job.log_metrics(1, {"train/loss": 1.0})
    Path("runs/one/recipe.toml").write_text('seed = 1\n[tracking]\nexperiment = "lmdist"\n[data]\nfolder = "data"\n')
    with exclusive_lock(Path("runs/one/.mlflow.lock"), 0):
        assert "runs/one: its job or another lmdist-sync is uploading it" in sync("runs/one", code=75)
    assert not Path("mlflow.db").exists()


RECIPE = '[tracking]\nexperiment = "lmdist"\n[data]\nfolder = "runs/one"'


@pytest.mark.parametrize(
    ("files", "code", "message"),
    [
        (None, 66, "lmdist-sync: error: runs/one does not exist; the folder of a run is expected"),
        ({}, 65, "runs/one holds no recipe.toml: it is not the folder of a run"),
        ({"recipe.toml": "= 3"}, 65, "runs/one/recipe.toml is not the recipe of a run"),
        ({"recipe.toml": "seed = 1"}, 65, "runs/one/recipe.toml is not the recipe of a run"),
        ({"mlflow.json": "{"}, 65, "runs/one/mlflow.json is not JSON"),
        ({"mlflow.json": '{"run_key": "x"}'}, 65, "runs/one/mlflow.json: experiment is missing"),
        ({"recipe.toml": '[tracking]\nexperiment = 3\n[data]\nfolder = "."'}, 65, "runs/one/recipe.toml: experiment is 3"),
        ({"recipe.toml": RECIPE, "meta.json": '{"splits": {"train": {}}}'}, 65, "runs/one/meta.json: files is missing"),
    ],
)
def test_what_is_no_run_is_reported_in_one_line(here, files, code, message):
    if files is not None:
        Path("runs/one").mkdir(parents=True)
        for name, text in files.items():
            Path("runs/one", name).write_text(text)
    line = sync("runs/one", code=code)
    assert message in line
    assert line.count("\n") == 1
    assert not Path("mlflow.db").exists()


def test_an_uploader_that_cannot_start_or_is_killed_costs_a_warning(here, monkeypatch, capfd):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with Job("one") as job:
        job.log_metrics(1, {"train/loss": 1.0})
    assert "warning: MLflow has not received all of this run; lmdist-sync runs/one uploads the rest" in capfd.readouterr().err
    monkeypatch.undo()
    monkeypatch.chdir(here)
    with Job("two") as job:
        assert job.uploader
        assert job.uploader.process.child
        job.uploader.process.child.kill()
        job.uploader.process.child.wait()
        job.log_metrics(1, {"train/loss": 1.0})
    assert "lmdist-sync runs/two uploads the rest" in capfd.readouterr().err
    assert read_json(Path("runs/two/mlflow.json"))["status"] == "FINISHED"


def test_a_row_without_a_time_is_no_row(tmp_path):
    lines = ['{"step": 1, "time": NaN}', '{"step": 2, "time": 1e308}', '{"step": 3, "time": 5, "a": Infinity, "b": 1}']
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 4, "tim']))
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 3, "time": 5, "b": 1}]


def test_lines_that_a_full_disk_rejects_are_written_later(here, capfd):
    job = Job("one", mlflow=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with job:
        job.log(1, 3)
        resource.setrlimit(resource.RLIMIT_FSIZE, ((job.run / "metrics.jsonl").stat().st_size + 20, hard))
        try:
            job.log(4, 6)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        job.log(7, 8)
    assert [row["step"] for row in rows(job.run)] == list(range(1, 9))
    assert capfd.readouterr().err.count("its lines are kept and tried again") == 1

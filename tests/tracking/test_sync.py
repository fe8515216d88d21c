"""What MLflow has of a run when its server was dead, stopped, failing or forgetful, and what lmdist-sync makes of that.

The servers are real. Most jobs here are a tracker without a training: the follower does not know the difference.
"""

from __future__ import annotations

import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import mlflow
import psutil
import pytest

from corpora import chain, write_data_folder
from lmdist import config
from lmdist.settings import DataSettings, ModelSettings, Recipe, TrackingSettings
from lmdist.storage.locks import exclusive_lock
from lmdist.storage.reading import read_json
from lmdist.tracking.run_folder import RunTracker, read_note
from servers import Proxy, Server
from support.jobs import SMALL, rows, train

SECRETS = {"MLFLOW_TRACKING_PASSWORD": "planted-1", "AWS_SECRET_ACCESS_KEY": "planted-2", "LMDIST_TOKEN": "planted-3"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = Server(tmp_path_factory.mktemp("server"))
    made.start()
    yield made
    made.kill()


@pytest.fixture
def proxy(server):
    made = Proxy(server.port)
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty directory to work in, and MLflow's default store."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


class Job(RunTracker):
    """A job's tracking without the job."""

    def __init__(self, run: str, step: int = 0, *, going_on: bool = False, mlflow: bool = True, **parameters: object) -> None:
        path = Path("runs") / run
        path.mkdir(parents=True, exist_ok=True)
        settings = TrackingSettings(mlflow=mlflow)
        meta = {
            "splits": {"train": {"tokens": 7}},
            "files": {"train.bin": {"sha256": "ab" * 32}},
            "sources": [],
        }
        super().__init__(path, settings, {"seed": 1, **parameters}, "data", meta, step, going_on=going_on)

    def log(self, first: int, last: int) -> None:
        """Lines of so many steps."""
        for step in range(first, last + 1):
            self.metrics(step, {"train/loss": 1 / step, "train/tokens": float(step)})

    def close(self, status: str) -> None:
        """End as a job does, and wait for a follower that it killed: a real job is gone before it is dead."""
        super().close(status)
        if self.follower and self.follower.child:
            self.follower.child.wait(60)

    def until_found(self) -> None:
        """Wait until MLflow has the run."""
        until(lambda: "run_id" in read_note(self.run))


class Heard:
    """All that has been said on stderr."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self.capfd = capfd
        self.text = ""

    def all(self) -> str:
        """What was said so far."""
        self.text += self.capfd.readouterr().err
        return self.text

    def __contains__(self, line: str) -> bool:
        return line in self.all()


def until(condition: Callable[[], object]) -> None:
    """Wait for what a follower does."""
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def sync(*runs: str, code: int = 0) -> str:
    """What lmdist-sync says."""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "lmdist.tracking.sync", *runs], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert time.monotonic() - start < 100
    said = done.stdout + done.stderr
    assert "Traceback" not in said
    return said


def points(store: str, run_id: str, key: str) -> list[tuple[int, int, float]]:
    """Step, time and value of a figure in MLflow."""
    history = mlflow.MlflowClient(store).get_metric_history(run_id, key)
    return sorted((point.step, point.timestamp, point.value) for point in history)


def check(store: str, run: str | Path, status: str) -> str:
    """MLflow has the run once, with each point once and the status; gives its id."""
    run = Path("runs") / run
    note = read_json(run / "mlflow.json")
    client = mlflow.MlflowClient(store)
    experiment = client.get_experiment_by_name("lmdist")
    assert experiment
    named = [found for found in client.search_runs([experiment.experiment_id]) if found.info.run_name == run.name]
    (found,) = (found for found in named if found.data.tags["lmdist.run_key"] == note["run_key"])
    assert found.info.run_id == note["run_id"]
    assert found.info.status == status
    for key in {key for row in rows(run) for key in row} - {"step", "time"}:
        expected = sorted((row["step"], int(row["time"] * 1000), row[key]) for row in rows(run) if key in row)
        assert points(store, note["run_id"], key) == expected, key
    assert found.data.params.keys() == note["parameters"].keys()
    assert found.inputs
    assert len(found.inputs.dataset_inputs) == len(note["datasets"])
    artifacts = {item.path for folder in (None, "samples") for item in client.list_artifacts(note["run_id"], folder)}
    files = {
        path.relative_to(run).as_posix() for name in ("recipe.toml", "*.png", "*.txt", "samples/*") for path in run.glob(name)
    }
    assert artifacts - {"samples"} == files
    return note["run_id"]


@pytest.mark.slow
def test_a_server_that_was_dead_at_the_start_or_died_on_the_way_gets_all_of_it_later(server, here, monkeypatch, capfd):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    heard = Heard(capfd)
    died = Job("died")
    with died:
        died.log(1, 20)
        died.until_found()
        server.kill()
        died.log(21, 40)
        died.text("samples/step-000000040.txt", "some words\n")
        until(lambda: "warning" in heard)
        began = time.monotonic()
    assert time.monotonic() - began < 60
    with suppress(ZeroDivisionError), Job("dead") as dead:
        dead.log(1, 2000)
        until(lambda: "MLflow does not take this run's points (ConnectionError); they are in runs/dead/metrics" in heard)
        dead.log(0, 0)
    assert "warning: MLflow has not got all of this run; lmdist-sync runs/dead brings in the rest" in heard
    assert "Traceback" not in heard
    server.start()
    both = ("runs/died", "runs/dead")
    said = sync(*both)
    assert "runs/died: " in said
    assert "1 file brought in, FINISHED" in said
    assert "runs/dead: 4,000 points brought in, FAILED" in said
    check(server.uri, "died", "FINISHED")
    run_id = check(server.uri, "dead", "FAILED")
    found = mlflow.MlflowClient(server.uri).get_run(run_id)
    assert found.info.start_time == read_note(Path("runs/dead"))["start_time"]
    assert found.info.end_time == int(rows(Path("runs/dead"))[-1]["time"] * 1000)
    assert re.search("runs/died: nothing was missing, FINISHED .*\nruns/dead: nothing was missing, FAILED", sync(*both))
    check(server.uri, "died", "FINISHED")


@pytest.mark.slow
def test_a_server_that_is_stopped_does_not_hold_a_job_up(server, here, monkeypatch, request):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "1")
    job = Job("one")
    with job:
        job.log(1, 20)
        job.until_found()
        client, run_id = mlflow.MlflowClient(server.uri), read_note(job.run)["run_id"]
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
        said = sync("runs/one", code=75)
    assert said.startswith(f"lmdist-sync: MLflow ({server.uri}) does not take runs/one (")
    assert said.count("\n") == 1
    server.signal(signal.SIGCONT)
    sync("runs/one")
    check(server.uri, "one", "FINISHED")


@pytest.mark.slow
def test_answers_that_are_lost_or_failures_make_nothing_twice(server, proxy, here, monkeypatch, capfd):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.uri)
    heard = Heard(capfd)
    proxy.mode = "lost"  # the server makes an experiment, a run, points, and the follower does not hear of it
    job = Job("one")
    with job:
        job.log(1, 20)
        until(lambda: "warning: MLflow does not take this run's points" in heard)
        proxy.mode = "fine"
        until(lambda: "MLflow takes this run's points again" in heard)
        proxy.mode = "lost"
        job.log(21, 40)
    assert heard.all().count("MLflow does not take this run's points") == 2  # once an outage
    proxy.mode = "slow"
    sync("runs/one")
    check(server.uri, "one", "FINISHED")


@pytest.mark.slow
def test_no_secret_gets_anywhere(server, proxy, here, monkeypatch):
    """A real training, by way of a server with a password that fails at first."""
    data = write_data_folder(here / "data", {"train": chain(451, 30), "valid": chain(103, 30, seed=1)}, 30)
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.uri.replace("http://", "http://somebody:pass-word@"))
    proxy.mode = "error"
    flags = [*SMALL, f"--data.folder={data}", "--tracking.mlflow=true", "--training.steps=5", "--run_folder=runs/one"]
    said = train(1, *flags, cwd=here)
    said = said.stdout + said.stderr
    assert "warning: MLflow has not got all of this run" in said
    proxy.mode = "fine"
    said += sync("runs/one")
    run_id = check(server.uri, "one", "FINISHED")
    assert mlflow.MlflowClient(server.uri).get_run(run_id).data.params["seed"] == "1"
    assert "127.0.0.1" not in Path("runs/one/mlflow.json").read_text()
    assert f"({proxy.uri})" in said
    shutil.copytree(server.folder, here / "server")
    texts = [said.encode(), *(path.read_bytes() for path in here.rglob("*") if path.is_file())]
    for secret in ("pass-word", "somebody", *SECRETS.values()):
        assert not any(secret.encode() in text for text in texts), secret


ENDLESS = """
import time
from pathlib import Path
from lmdist.settings import DataSettings, ModelSettings, Recipe, TrackingSettings
from lmdist.tracking.run_folder import RunTracker
with RunTracker(Path("runs/one"), TrackingSettings(), {"seed": 1}, "data", {}, 0, going_on=False) as tracker:
    for step in range(1, 31):
        tracker.metrics(step, {"train/loss": 1 / step, "train/tokens": float(step)})
    time.sleep(600)
"""


@pytest.mark.slow
def test_a_job_that_is_killed_leaves_nothing_behind_and_goes_on_as_the_same_run(server, here, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    run = Path("runs/one")
    run.mkdir(parents=True)
    job = subprocess.Popen([sys.executable, "-c", ENDLESS])
    client = mlflow.MlflowClient(server.uri)
    until(lambda: "run_id" in read_note(run) and points(server.uri, read_note(run)["run_id"], "train/loss"))
    (follower,) = psutil.Process(job.pid).children()
    follower.send_signal(signal.SIGINT)  # Ctrl-C and Slurm reach it, too
    follower.send_signal(signal.SIGTERM)
    job.kill()
    killed = time.monotonic()
    job.wait()
    while follower.is_running() and follower.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() - killed < 60  # 5 on a machine that is not busy
        time.sleep(0.05)
    run_id = read_note(run)["run_id"]
    if client.get_run(run_id).info.status == "RUNNING":  # it had four seconds; nobody else may say so
        sync("runs/one")
    check(server.uri, "one", "KILLED")

    again = Job("one", 20, going_on=True, learning_rate=2.0)  # a setting that is new, and steps that come again
    with again:
        until(lambda: client.get_run(run_id).info.status == "RUNNING")
        again.log(21, 50)
    assert [step for step, _, _ in points(server.uri, run_id, "train/loss")] == list(range(1, 51))
    found = client.get_run(run_id)
    assert found.info.status == "FINISHED"
    assert found.data.params["seed"] == "1"
    assert "learning_rate" not in found.data.params


@pytest.mark.slow
def test_two_jobs_make_the_default_store_at_once(here, capfd):
    first, second = Job("one"), Job("two")
    with first, second:
        first.log(1, 5)
        second.log(1, 5)
    store = f"sqlite:///{here}/mlflow.db"
    assert capfd.readouterr().err == ""
    assert {path.name for path in here.iterdir() if path.is_file()} == {"mlflow.db"}
    check(store, "one", "FINISHED")
    check(store, "two", "FINISHED")


@pytest.mark.slow
def test_a_run_without_mlflow_is_brought_in_by_its_recipe(here, monkeypatch):
    data = write_data_folder(here / "data", {"train": chain(451, 30), "valid": chain(103, 30, seed=1)}, 30)
    with Job("one", mlflow=False) as job:
        job.log(1, 5)
    recipe = Recipe(data=DataSettings(folder=str(data)), model=ModelSettings(hidden_size=24))
    Path("runs/one/recipe.toml").write_text(config.as_toml(recipe))
    assert not Path("runs/one/mlflow.json").exists()
    assert "brought in, FINISHED (sqlite:///mlflow.db)" in sync("runs/one")
    run_id = check(f"sqlite:///{here}/mlflow.db", "one", "FINISHED")
    found = mlflow.MlflowClient(f"sqlite:///{here}/mlflow.db").get_run(run_id)
    assert found.data.params["model.hidden_size"] == "24"
    assert found.inputs
    assert {dataset.tags[0].value for dataset in found.inputs.dataset_inputs} == {"train", "valid"}

    Path("elsewhere").mkdir()
    shutil.copytree("runs", "elsewhere/runs")
    monkeypatch.chdir("elsewhere")
    assert "mlflow.db is not here, and MLflow has had runs/one" in sync("runs/one", code=66)


def test_lmdist_sync_leaves_a_run_to_its_follower(here):
    with Job("one", mlflow=False) as job:
        job.metrics(1, {"train/loss": 1.0})
    Path("runs/one/recipe.toml").write_text('seed = 1\n[tracking]\nexperiment = "lmdist"\n[data]\nfolder = "data"\n')
    with exclusive_lock(Path("runs/one/.mlflow.lock"), 0):
        assert "runs/one: its job is bringing it in itself, or another lmdist-sync is" in sync("runs/one", code=75)
    assert not Path("mlflow.db").exists()


@pytest.mark.parametrize(
    ("files", "code", "said"),
    [
        (None, 66, "lmdist-sync: error: runs/one is not there; the folder of a run is expected"),
        ({}, 65, "runs/one holds no recipe.toml: it is not the folder of a run"),
        ({"recipe.toml": "= 3"}, 65, "runs/one/recipe.toml is not the recipe of a run"),
        ({"recipe.toml": "seed = 1"}, 65, "runs/one/recipe.toml is not the recipe of a run"),
        ({"mlflow.json": "{"}, 65, "runs/one/mlflow.json is not JSON"),
    ],
)
def test_what_is_no_run_is_said_in_one_line(here, files, code, said):
    if files is not None:
        Path("runs/one").mkdir(parents=True)
        for name, text in files.items():
            Path("runs/one", name).write_text(text)
    line = sync("runs/one", code=code)
    assert said in line
    assert line.count("\n") == 1
    assert not Path("mlflow.db").exists()


def test_a_follower_that_cannot_start_or_dies_costs_a_warning(here, monkeypatch, capfd):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with Job("one") as job:
        job.metrics(1, {"train/loss": 1.0})
    assert "warning: MLflow has not got all of this run; lmdist-sync runs/one brings in the rest" in capfd.readouterr().err
    monkeypatch.undo()
    monkeypatch.chdir(here)
    with Job("two") as job:
        assert job.follower
        assert job.follower.child
        job.follower.child.kill()
        job.follower.child.wait()
        job.metrics(1, {"train/loss": 1.0})
    assert "lmdist-sync runs/two brings in the rest" in capfd.readouterr().err
    assert read_json(Path("runs/two/mlflow.json"))["status"] == "FINISHED"


def test_lines_that_find_no_room_on_the_disk_are_written_later(here, capfd):
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

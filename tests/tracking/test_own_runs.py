"""A folder and its run in MLflow: a copy gets its own, a renamed folder keeps it, a deleted run is named with what to do."""

from __future__ import annotations

import getpass
import json
import logging
import math
import os
import shutil
import subprocess
import time
import warnings
from pathlib import Path

import pytest

from lmdist.errors import DataError
from lmdist.settings import TrackingSettings
from lmdist.tracking import sync
from lmdist.tracking.logger import RunLogger
from lmdist.tracking.metadata import is_copy, own_metadata, provenance, read_metadata
from lmdist.tracking.run_folder import MetricsFile, append_figures, read_metrics
from lmdist.tracking.store import Store

PARAMETERS = {"seed": 1}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, empty_store: Path):
    """A store in SQLite, by an address of its own: MLflow keeps it open for the process."""
    return Store(f"sqlite:///{shutil.copy(empty_store, tmp_path_factory.mktemp('store') / 'store.db')}")


@pytest.fixture
def run(tmp_path, monkeypatch, store):
    """A run of three steps that MLflow has."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.address)
    path = Path("runs/a")
    path.mkdir(parents=True)
    log(path, 1, 3)
    sync.upload(path)
    return path


def log(run: Path, first: int, last: int, **parameters: object) -> None:
    """Log steps, as a job without an uploader."""
    settings = TrackingSettings(mlflow=False)
    (run / "recipe.toml").write_text('seed = 1\n[tracking]\nexperiment = "lmdist"\n[data]\nfolder = "data"\n')
    with RunLogger(run, settings, {**PARAMETERS, **parameters}, "data", {}, first - 1, resume=True) as logger:
        for step in range(first, last + 1):
            logger.log_metrics(step, {"train/loss": (1 if run.name == "a" else 2) / step})


def losses(store: Store, run: Path) -> list[tuple[int, float]]:
    run_id = read_metadata(run)["run_id"]
    return [(point.step, point.value) for point in store.logged_points(run_id, "train/loss")]


def test_a_program_that_uploads_a_run_logs_as_before(run, caplog):
    filters = list(warnings.filters)
    log(run, 4, 5)
    assert sync.upload(run) != "nothing was missing, FINISHED"
    logging.getLogger("a program").warning("it goes on")
    assert "it goes on" in caplog.text
    assert warnings.filters == filters


@pytest.mark.slow
def test_a_copied_run_gets_a_run_of_its_own_and_leaves_the_original_as_it_is(run, store, capsys):
    before = losses(store, run), store.get_run(read_metadata(run)["run_id"])
    copy = Path("runs/b")
    shutil.copytree(run, copy)
    log(copy, 3, 6, learning_rate=2.0)
    assert f"runs/b is a copy of {run.resolve()}: it gets a run of its own in MLflow" in capsys.readouterr().err
    sync.upload(copy)
    original, other = read_metadata(run)["run_id"], read_metadata(copy)["run_id"]
    assert original != other
    assert losses(store, run) == before[0] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    now = store.get_run(original)
    assert (now.data.params, now.data.metrics, now.info.end_time) == (
        before[1].data.params,
        before[1].data.metrics,
        before[1].info.end_time,
    )
    assert losses(store, copy) == [(1, 1.0), (2, 0.5), (3, 2 / 3), (4, 0.5), (5, 0.4), (6, 1 / 3)]
    found = store.get_run(other)
    assert (found.info.run_name, found.data.params["learning_rate"]) == ("b", "2.0")
    assert found.data.tags["lmdist.copy_of"] == original
    # It is a run like any other from now on.
    log(copy, 7, 7)
    sync.upload(copy)
    assert read_metadata(copy)["run_id"] == other
    assert "copy" not in capsys.readouterr().err


def test_a_folder_knows_itself_renamed_restored_and_moved(run, tmp_path, monkeypatch):
    metadata = read_metadata(run)
    renamed = run.rename("runs/c")
    assert not is_copy(renamed, metadata)
    monkeypatch.chdir("runs")
    assert not is_copy(Path("c"), metadata)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(renamed, run)  # restored from a backup
    assert not is_copy(run, metadata)
    shutil.copytree(renamed, "runs/d", copy_function=shutil.copy2)  # as cp -a does
    assert is_copy(Path("runs/d"), metadata)
    assert is_copy(renamed, {**metadata, "folder": {**metadata["folder"], "path": str(run.resolve())}})
    other = os.stat("runs/d").st_ino  # on another volume it may be the original's by chance
    assert is_copy(Path("runs/d"), {**metadata, "folder": {"path": str(run.resolve()), "inode": other}})


def test_a_copy_that_is_synced_again_is_the_same_run(run):
    copy = Path("runs/b")
    shutil.copytree(run, copy)
    first = own_metadata(copy, read_metadata(copy))
    shutil.copytree(run, copy, dirs_exist_ok=True)  # as rsync does
    assert own_metadata(copy, read_metadata(copy)) == first
    assert first["run_key"] != read_metadata(run)["run_key"]
    assert "run_id" not in first


@pytest.mark.slow
def test_a_deleted_run_and_a_deleted_experiment_are_final_and_say_what_to_do(run, store, monkeypatch):
    first = read_metadata(run)["run_id"]
    store.client.delete_run(first)
    with pytest.raises(DataError, match=r"the run was deleted there: mlflow runs restore .*lmdist-sync --new-run runs/a"):
        sync.sync([run])
    assert sync.sync([run], new_run=True) == 0
    assert read_metadata(run)["run_id"] != first
    assert losses(store, run) == [(1, 1.0), (2, 0.5), (3, 1 / 3)]

    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "doomed")
    assert sync.sync([run], new_run=True) == 0
    store.client.delete_experiment(read_metadata(run)["experiment_id"])
    with pytest.raises(DataError, match="the run was deleted there"):
        sync.sync([run])
    with pytest.raises(DataError, match=r"the experiment doomed was deleted there: .*MLFLOW_EXPERIMENT_NAME=OTHER"):
        sync.sync([run], new_run=True)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "other")
    assert sync.sync([run], new_run=True) == 0
    assert store.client.get_experiment(read_metadata(run)["experiment_id"]).name == "other"


@pytest.mark.slow
def test_links_in_a_run_are_not_uploaded(run, store, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (run / "samples").mkdir()
    (run / "samples/step-000000003.txt").write_text("a sample")
    (run / "samples/step-000000004.txt").symlink_to(secret)
    (run / "samples/notes.txt").write_text("not ours")
    (run / "loss.png").symlink_to(secret)
    assert "1 file uploaded" in sync.upload(run)
    run_id = read_metadata(run)["run_id"]
    assert [item.path for item in store.client.list_artifacts(run_id, "samples")] == ["samples/step-000000003.txt"]
    (run / "samples").rename(tmp_path / "outside")
    (run / "samples").symlink_to(tmp_path / "outside")
    (tmp_path / "outside/step-000000005.txt").write_text("outside")
    assert "file" not in sync.upload(run)


@pytest.mark.slow
def test_a_figure_that_is_measured_again_is_another_point(run, store):
    for value in (30.0, 30.0, 29.0):
        append_figures(run / "metrics.jsonl", 2, {"test/perplexity": value})
        time.sleep(0.002)  # MLflow shows the newest, by the millisecond
    sync.upload(run)
    sync.upload(run)
    run_id = read_metadata(run)["run_id"]
    assert sorted(point.value for point in store.logged_points(run_id, "test/perplexity")) == [29.0, 30.0]
    assert store.get_run(run_id).data.metrics["test/perplexity"] == 29.0


def test_figures_are_appended_after_a_truncated_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "time": 1.0, "train/loss": 1.0}\n{"step": 2, "tra')
    append_figures(path, 1, {"test/perplexity": 3.0})
    assert [row["step"] for row in read_metrics(path)] == [1, 1]
    assert path.read_text().endswith("\n")


def test_a_number_that_json_has_not_is_left_out_of_its_row(tmp_path):
    path, values = tmp_path / "metrics.jsonl", {"valid/loss": 701.0, "valid/perplexity": math.inf}
    rows = MetricsFile(path, 0)
    rows.append(1, values)
    rows.close()
    append_figures(path, 1, values)  # which it has
    append_figures(path, 2, values)
    lines = path.read_text().splitlines()
    assert [{**json.loads(line, parse_constant=pytest.fail), "time": 0} for line in lines] == [
        {"step": step, "time": 0, "valid/loss": 701.0} for step in (1, 2)
    ]


def test_who_trains_what_from_which_commit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tags = provenance("LSTM 16-24-16", {})
    assert "mlflow.source.git.commit" not in tags
    assert tags["mlflow.note.content"] == "LSTM 16-24-16"
    assert tags["mlflow.source.name"] == "lmdist-train"
    assert tags["mlflow.user"] == getpass.getuser()
    git = ["git", "-c", "user.name=somebody", "-c", "user.email=somebody@localhost"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message=first"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert len(head) >= 40
    assert provenance("", {})["mlflow.source.git.commit"] == head
    monkeypatch.setenv("PATH", "/nowhere")
    assert "mlflow.source.git.commit" not in provenance("", {})

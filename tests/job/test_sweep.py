"""The search for settings, launch/sweep.py: real trials, and how it acts on trials that end badly."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from corpora import chain, write_data_folder
from support.jobs import environment, installed

ROOT = Path(__file__).parents[2]
SWEEP = [sys.executable, str(ROOT / "launch" / "sweep.py"), "sweeps/small"]
FAKE = """#!{python}
# Stands in for lmdist-train where a trial is to end in a way that takes a real one minutes.
import json, sys, time
from pathlib import Path
run = Path(sys.argv[sys.argv.index("--run_folder") + 1])
run.mkdir(parents=True, exist_ok=True)
number = int(run.name.removeprefix("trial-"))
def validation(perplexity):
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({{"step": 1, "time": time.time(), "valid/perplexity": perplexity}}) + "\\n")
{body}
"""


def sweep(cwd: Path, *flags: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    variables = installed() if path is None else {**environment(), "PATH": f"{path}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run([*SWEEP, *flags], cwd=cwd, env=variables, capture_output=True, text=True, timeout=300)


def fake(folder: Path, body: str) -> Path:
    """A folder with an lmdist-train that does `body`."""
    script = folder / "bin" / "lmdist-train"
    script.parent.mkdir()
    script.write_text(FAKE.format(python=sys.executable, body=body))
    script.chmod(0o755)
    return script.parent


def trials(folder: Path) -> list[Any]:
    """The trials that Optuna knows of."""
    import optuna

    storage = f"sqlite:///{folder / 'sweeps' / 'small' / 'optuna.db'}"
    return optuna.load_study(study_name="small", storage=storage).get_trials()


def test_trials_are_runs_and_children_of_one_run_in_mlflow(tmp_path, empty_store):
    from mlflow import MlflowClient

    shutil.copy(empty_store, tmp_path / "mlflow.db")
    write_data_folder(tmp_path / "data", {"train": chain(900, 20), "valid": chain(200, 20, 1)}, 20)
    flags = (
        "--nproc-per-node=1 --data.folder data --model.embedding_size=8 --model.num_layers=1 --data.global_batch=8 "
        "--data.window=7 --training.device=cpu --training.precision=fp32 --training.epochs=2 --sample.words=0"
    ).split()
    done = sweep(tmp_path, "--trials=1", *flags)
    assert done.returncode == 0, done.stderr
    again = sweep(tmp_path, "--trials=1", *flags)  # all trials are done
    found = trials(tmp_path)
    assert len(found) == 1
    metrics = (tmp_path / "sweeps/small/trial-000/metrics.jsonl").read_text().splitlines()
    best = min(row["valid/perplexity"] for row in map(json.loads, metrics) if "valid/perplexity" in row)
    assert found[0].value == best
    for output in (done.stdout, again.stdout):
        assert output.splitlines()[-1].startswith(f"best: trial 0, valid perplexity {best:.2f}: --optimizer.learning_rate ")

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    parent, child = sorted(runs, key=lambda run: "mlflow.parentRunId" in run.data.tags)
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert parent.data.metrics == {"valid/best_perplexity": best}
    assert (parent.info.run_name, parent.info.status, parent.data.tags["best trial"]) == ("small", "FINISHED", "trial-000")


def test_a_trial_that_is_worse_than_most_is_stopped_and_one_that_diverges_is_passed_over(tmp_path):
    body = """
if number == 5:
    validation(90.0)
    sys.exit(64)
for epoch in range(3):
    validation(100 - epoch if number < 5 else 200.0)
if number == 6:
    time.sleep(60)
"""
    done = sweep(tmp_path, "--trials=7", path=fake(tmp_path, body))
    assert done.returncode == 0, done.stderr
    assert [trial.state.name for trial in trials(tmp_path)] == ["COMPLETE"] * 5 + ["FAIL", "PRUNED"], done.stderr
    assert "best: trial 0, valid perplexity 98.00" in done.stdout


def test_a_mistake_in_the_flags_ends_the_sweep_with_its_code_and_the_trial_is_left(tmp_path):
    assert sweep(tmp_path, "--trials=2", path=fake(tmp_path, "sys.exit(64)")).returncode == 64
    assert [trial.state.name for trial in trials(tmp_path)] == ["RUNNING"]


def test_a_sweep_of_which_no_trial_is_completed_says_so(tmp_path):
    done = sweep(tmp_path, "--trials=1", path=fake(tmp_path, "validation(90.0)\nsys.exit(64)"))
    assert done.returncode == 65, done.stderr
    assert "sweep.py: error: none of 1 trials was trained to its end" in done.stderr
    assert "Traceback" not in done.stderr


def test_data_without_a_valid_split_are_an_error_of_the_data(tmp_path):
    done = sweep(tmp_path, "--trials=2", path=fake(tmp_path, "pass"))
    assert done.returncode == 65
    assert done.stderr.endswith("sweep.py: error: the data folder has no valid split, by which trials could be compared\n")


@pytest.mark.parametrize("by", ["Ctrl-C", "SIGTERM to the sweep alone"])
def test_a_sweep_that_is_stopped_goes_on_with_the_trial_that_it_was_at(tmp_path, by):
    body = """
import signal
def save(*_):
    (run / "saved").touch()
    sys.exit(75)
signal.signal(signal.SIGINT, save)
signal.signal(signal.SIGTERM, save)
validation(50.0 - number)
if not (run / "again").exists():
    (run / "again").touch()
    time.sleep(60)
"""
    path = fake(tmp_path, body)
    variables = {**environment(), "PATH": f"{path}{os.pathsep}{os.environ['PATH']}"}
    with subprocess.Popen([*SWEEP, "--trials=1"], cwd=tmp_path, env=variables, start_new_session=True) as job:
        while not (tmp_path / "sweeps/small/trial-000/again").exists():
            time.sleep(0.1)
        if by == "Ctrl-C":
            os.killpg(job.pid, signal.SIGINT)
        else:
            job.terminate()
    assert job.returncode == 75
    assert (tmp_path / "sweeps/small/trial-000/saved").exists()
    done = sweep(tmp_path, "--trials=1", path=path)
    assert done.returncode == 0, done.stderr
    assert [(trial.number, trial.value) for trial in trials(tmp_path)] == [(0, 50.0)]

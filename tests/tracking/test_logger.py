"""Metrics arrive in metrics.jsonl and in MLflow's default store. For a server that is away see test_sync.py."""

from __future__ import annotations

import json
import math
import shutil
from contextlib import suppress
from pathlib import Path

import mlflow
import pytest

from lmdist.errors import Stopped, UsageError
from lmdist.settings import TrackingSettings
from lmdist.storage.reading import read_json
from lmdist.tracking.logger import RunLogger
from lmdist.tracking.metadata import read_metadata, write_metadata
from lmdist.tracking.plot import plot_losses
from lmdist.tracking.run_folder import read_metrics
from support.jobs import SMALL, rows, small_data, train


@pytest.fixture
def data(tmp_path):
    return small_data(tmp_path / "data")


def history(client: mlflow.MlflowClient, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run_id, key)]


def expected(run: Path, key: str) -> list[tuple[int, float]]:
    return [(row["step"], row[key]) for row in rows(run) if key in row]


@pytest.mark.slow
def test_a_run_and_its_second_half_are_one_mlflow_run_without_a_point_twice(data, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    flags = [
        *SMALL,
        f"--data.folder={data}",
        "--run_folder=runs/one",
        "--tracking.mlflow=true",
        "--schedule.name=constant",
        "--checkpoint.every_steps=4",
        "--checkpoint.keep=9",
    ]
    train(1, *flags, "--training.steps=9", cwd=tmp_path)
    # The way a killed run looks to the next one: the points of steps 5 to 9 are in MLflow, its checkpoint is step 4.
    for name in ("step-000000008", "step-000000009"):
        shutil.rmtree(tmp_path / "runs/one/checkpoints" / name)
    train(1, *flags, "--training.steps=14", "--resume=auto", cwd=tmp_path)

    run = tmp_path / "runs/one"
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("lmdist")
    assert experiment
    (found,) = client.search_runs([experiment.experiment_id])
    run_id = found.info.run_id
    assert run_id == read_json(run / "mlflow.json")["run_id"]
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "one"
    assert found.data.params["model.hidden_size"] == "24"
    assert found.data.tags["mlflow.note.content"].startswith("LSTM 16-24-16 tied, 7,230 parameters. ")
    assert found.info.user_id == found.data.tags["mlflow.user"]
    for key in ("train/loss", "train/tokens_per_second", "valid/loss", "valid/perplexity", "valid/best_perplexity"):
        assert [step for step, _ in history(client, run_id, key)] == [step for step, _ in expected(run, key)], key
    assert history(client, run_id, "train/loss") == expected(run, "train/loss")
    validations = [value for _, value in history(client, run_id, "valid/perplexity")]
    assert found.data.metrics["valid/best_perplexity"] == min(validations)
    assert found.inputs
    assert {dataset.tags[0].value for dataset in found.inputs.dataset_inputs} == {"train", "valid"}
    assert {item.path for item in client.list_artifacts(run_id)} == {"loss.png", "recipe.toml", "samples"}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "FINISHED"),
        (UsageError("diverged"), "FAILED"),
        (RuntimeError(), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(1), "KILLED"),
        (Stopped("on request"), "KILLED"),
    ],
)
def test_how_a_run_ended(tmp_path, error, status):
    write_metadata(tmp_path, {"status": "RUNNING"})
    with suppress(BaseException), RunLogger(tmp_path, TrackingSettings(mlflow=False), {}, "data", {}, 0, resume=True):
        assert read_metadata(tmp_path)["status"] == "RUNNING"
        if error:
            raise error
    assert read_metadata(tmp_path)["status"] == status


def test_metrics_beyond_the_checkpoint_are_written_once(tmp_path):
    settings = TrackingSettings(mlflow=False)
    with RunLogger(tmp_path, settings, {}, "data", {}, 0, resume=False) as logger:
        for step in range(1, 6):
            logger.log_metrics(step, {"train/loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "train/lo')  # a kill in the middle of a line
    with RunLogger(tmp_path, settings, {}, "data", {}, 3, resume=True) as logger:
        logger.log_metrics(4, {"train/loss": 2.0})
    assert [(row["step"], row["train/loss"]) for row in read_metrics(tmp_path / "metrics.jsonl")] == [
        (1, 1.0),
        (2, 1.0),
        (3, 1.0),
        (4, 2.0),
    ]


def test_a_picture_that_cannot_be_written_does_not_stay_in_memory(tmp_path):
    from matplotlib import pyplot

    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 1.0, "train/loss": 1.0}\n')
    with pytest.raises(FileNotFoundError):
        plot_losses(tmp_path / "metrics.jsonl", tmp_path / "nowhere" / "loss.png")
    assert not pyplot.get_fignums()


@pytest.mark.parametrize("tokens", [1.0, 1.5])
def test_the_picture_has_the_perplexity_that_compares_between_tokenizers(tmp_path, monkeypatch, tokens):
    from matplotlib import pyplot

    points = [{"step": step, "train/loss": 6.0 - step} for step in (1, 2)]
    for step, loss in ((1, 4.0), (2, 3.0)):
        points.append({"step": step, "valid/loss": loss, "valid/perplexity_per_word": math.exp(tokens * loss)})
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps({'time': 1.0, **point})}\n" for point in points))
    shown = []
    monkeypatch.setattr(pyplot, "close", shown.append)
    plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    monkeypatch.undo()
    losses, *perplexities = shown[0].axes
    labels = ["perplexity"] if tokens == 1 else ["perplexity per token", "perplexity per word (validation)"]
    assert [axes.get_ylabel() for axes in (losses, *perplexities)] == ["nats per token", *labels]
    for axes, factor in zip(perplexities, (1.0, tokens), strict=False):
        places = dict(zip((label.get_text() for label in axes.get_yticklabels()), axes.get_yticks(), strict=True))
        assert places["100"] == pytest.approx(math.log(100) / factor)
        assert axes.get_ylim() == losses.get_ylim()
    pyplot.close(shown[0])

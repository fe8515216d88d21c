"""The Python API and the commands take a bundle from MLflow, by its registered name or its run."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import lmdist
from lmdist.errors import MissingInputError, Stopped, UsageError
from lmdist.tracking import store as tracking_store
from lmdist.training.starting_point import load_base
from lmdist_export.api import Model
from lmdist_export.serving import registry
from servers import free_port
from support.small_bundles import PLAIN_WORDS, UNTIED, command, make_bundle, neutral, same_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with the whitespace tokenizer."""
    return neutral(make_bundle(tmp_path_factory.mktemp("api"), UNTIED, "whitespace", PLAIN_WORDS))


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return lmdist.load(folder)


def test_a_model_says_what_it_is(model: Model, folder: Path) -> None:
    assert repr(model) == f"<lmdist model {folder}: LSTM 10-10, embedding 6, vocabulary 19, fp32, on cpu>"


def test_what_is_no_bundle(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="does not exist"):
        lmdist.load(tmp_path / "none")
    with pytest.raises(UsageError, match="the provider is 'tpu'"):
        lmdist.load(folder, provider="tpu")  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def store(folder: Path, tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[Path]:
    """A folder whose mlflow.db has the bundle as `news`, version 1, alias `champion`."""
    place = tmp_path_factory.mktemp("store")
    shutil.copy(empty_store, place / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        registry.register(folder, "news", "champion")
        yield place


@pytest.mark.slow
def test_a_bundle_in_mlflow(store: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.chdir(store)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    variables = dict(os.environ)
    client = mlflow.MlflowClient("sqlite:///mlflow.db")
    run = client.get_model_version("news", "1").run_id
    expected = model.generate("the cat", seed=7, max_new_tokens=20)
    for name in ("models:/news@champion", "models:/news/1", f"runs:/{run}/news"):
        found = lmdist.load(name)
        assert name in repr(found)
        assert not list(tmp_path.iterdir())  # what was loaded is in memory
        assert same_text(found.generate("the cat", seed=7, max_new_tokens=20), expected)
    for name, message in (
        ("models:/news@nobody", "has no models:/news@nobody"),
        ("models:/olds/1", "has no models:/olds/1"),
        (f"runs:/{run}/other", "has no runs:"),
    ):
        with pytest.raises(MissingInputError, match=message):
            lmdist.load(name)
    assert not list(tmp_path.iterdir())
    assert dict(os.environ) == variables, "a program has its own MLflow"
    done = command(
        "lmdist_export.generate", "models:/news@champion", "--prompt", "the cat", "--seed", 7, "--max-new-tokens", 20
    )
    assert done.stdout == f"{expected.text}\n"
    assert len(done.stderr.splitlines()) == 1, done.stderr
    done = command("lmdist_export.score", f"runs:/{run}/news", "--sentences", given="the cat\n")
    assert done.stdout.split("\t")[0] == f"{model.score('the cat').log_probability:.6f}"
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_mlflow_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(MissingInputError, match=r"models:/news@champion: mlflow\.db does not exist; set MLFLOW_TRACKING_URI"):
        lmdist.load("models:/news@champion")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{free_port()}")
    with pytest.raises(Stopped, match=r"^models:/news@champion cannot be downloaded from MLflow") as raised:
        lmdist.load("models:/news@champion")
    assert "secret" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_training_starts_from_a_bundle_in_mlflow(store: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(store)
    base = load_base("models:/news@champion")
    assert (base.name, base.origin["run"], base.origin["step"]) == ("models:/news@champion", "small", 7)
    assert base.origin["sha256"] == model.bundle.manifest["files"]["weights.bin"]["sha256"]
    for word in ("<unk>", "dog"):
        assert base.model.embedding.weight[base.vocabulary.ids[word]].tolist() == model.vector(word).tolist()
    with pytest.raises(MissingInputError, match="has no models:/nothing@champion"):
        load_base("models:/nothing@champion")


def test_threads_that_download_have_one_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The first to end would take the address of the store from the second, which would ask MLflow's own."""
    seen = []

    def slow(uri: str, dst_path: str) -> str:
        time.sleep(float(uri))
        seen.append(os.environ.get("MLFLOW_TRACKING_URI"))
        return dst_path

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("mlflow.artifacts.download_artifacts", slow)
    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(tracking_store.download_artifacts, ("0.1", "0.3", "0.2"), [tmp_path] * 3)) == [tmp_path] * 3
    assert seen == ["sqlite:///mlflow.db"] * 3
    assert "MLFLOW_TRACKING_URI" not in os.environ

"""The neural cache and ensembles: equal to the formulas written naively in fp64, for chunks of any size, and tuned."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from corpora import chain, write_data_folder
from lmdist.cache_settings import NeuralCache, read_tuned, write_tuned
from lmdist.errors import DataError
from lmdist.training import neural_cache
from lmdist.training.checkpoints.read import open_checkpoint
from lmdist.training.checkpoints.retain import find_checkpoint
from lmdist.training.evaluate import main
from lmdist.training.neural_cache import best_weight, log_mean, mixed, token_log_probabilities, tune
from support.jobs import train_here
from support.neural_cache_reference import distributions
from support.small_bundles import ADAPTIVE, TIED, make_model

CPU = torch.device("cpu")
SIZE, THETA = 17, 0.3


def text(length: int, words: int = 20, seed: int = 0) -> NDArray[np.uint16]:
    """Return random tokens in which some come again and again."""
    return (np.random.default_rng(seed).integers(0, words, length) ** 2 // words).astype(np.uint16)


@pytest.mark.parametrize("settings", [TIED, ADAPTIVE], ids=["full", "adaptive"])
def test_the_cache_is_the_naive_one(settings: Any) -> None:
    model, tokens = make_model(settings, 300), text(60)
    places = np.arange(len(tokens)), tokens
    static, cached = token_log_probabilities(model, tokens, 1, CPU, SIZE, [0.0, THETA])
    for theta, found in zip([0.0, THETA], cached, strict=True):
        by_model, by_cache = distributions(model, tokens, SIZE, theta)
        assert static.numpy() == pytest.approx(by_model[places], abs=1e-5)
        assert found.exp().numpy() == pytest.approx(np.exp(by_cache[places]), abs=1e-6)


@pytest.mark.parametrize("chunk", [1, 7, 16, 18, 60])
@pytest.mark.parametrize("streams", [1, 3])
def test_the_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, chunk: int, streams: int) -> None:
    model, tokens = make_model(TIED, 20), text(59)
    expected = [sorted(part.flatten().tolist()) for part in token_log_probabilities(model, tokens, streams, CPU, SIZE, [THETA])]
    monkeypatch.setattr(neural_cache, "WINDOW", chunk)
    for part, values in zip(token_log_probabilities(model, tokens, streams, CPU, SIZE, [THETA]), expected, strict=True):
        assert sorted(part.flatten().tolist()) == pytest.approx(values, rel=1e-4, abs=1e-5)


def test_mixture_and_its_best_weight() -> None:
    random = np.random.default_rng(0)
    static, cached = (torch.from_numpy(np.log(random.uniform(1e-6, 1, 500))) for _ in range(2))
    assert torch.equal(mixed(static, cached, 0), static)
    weights = np.linspace(0, 1, 1001)
    naive = [float(np.log((1 - w) * np.exp(static.numpy()) + w * np.exp(cached.numpy())).sum()) for w in weights]
    assert [float(mixed(static, cached, w).sum()) for w in weights[[0, 137, 500, 1000]]] == pytest.approx(
        [naive[place] for place in (0, 137, 500, 1000)]
    )
    assert best_weight(static, cached) == pytest.approx(weights[int(np.argmax(naive))], abs=1e-3)
    assert best_weight(static, static - 1) == 0
    assert best_weight(static, torch.full_like(static, -math.inf)) == 0


def test_tuned_where_the_text_is_likeliest() -> None:
    model, tokens = make_model(TIED, 20), np.tile(text(12), 9)
    cache = tune(model, tokens, 1, CPU, 40)
    static, (cached,) = token_log_probabilities(model, tokens, 1, CPU, 40, [cache.theta])
    best = mixed(static, cached, cache.weight).sum()
    assert best > static.sum() + 10  # a text that comes again
    for theta, weight in [(cache.theta * 1.4, cache.weight), (cache.theta, cache.weight - 0.02), (cache.theta, 0.1)]:
        static, (cached,) = token_log_probabilities(model, tokens, 1, CPU, 40, [theta])
        assert mixed(static, cached, weight).sum() < best


def test_nothing_is_tuned_where_the_loss_is_not_finite() -> None:
    model = make_model(TIED, 20)
    with torch.no_grad():
        dict(model.named_parameters())["projection.bias"][:2] = torch.tensor([3e38, -3e38])
    with pytest.raises(DataError, match="the loss on the text that tunes the cache is not finite"):
        tune(model, text(50), 1, CPU, 40)


def test_an_ensemble_averages_probabilities() -> None:
    random = np.random.default_rng(0)
    models = [torch.from_numpy(np.log(random.uniform(1e-6, 1, 50))) for _ in range(3)]
    expected = np.log(np.mean([np.exp(model.numpy()) for model in models], axis=0))
    assert log_mean(models).numpy() == pytest.approx(expected)
    assert log_mean(models[:1] * 3).numpy() == pytest.approx(models[0].numpy())


# --- the command ---------------------------------------------------------------------------------------------------


def topics(count: int, seed: int) -> NDArray[np.int64]:
    """Return the tokens of passages that have three words each."""
    random = np.random.default_rng(seed)
    return np.concatenate([random.choice(random.integers(2, 30, 3), 40) for _ in range(count)])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs on one data folder, in whose splits words come again soon."""
    folder = tmp_path_factory.mktemp("neural-cache")
    splits = {"train": chain(1503, 30), "valid": topics(5, seed=1), "test": topics(4, seed=2)}
    data = write_data_folder(folder / "data", splits, 30)
    for seed in (1, 2):
        train_here(f"--data.folder={data}", f"--run_folder={folder / str(seed)}", f"--seed={seed}", "--training.epochs=1")
    return folder / "1", folder / "2"


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Return a function that runs lmdist-evaluate, checks its exit code, and returns stdout and stderr."""

    def run(*arguments: object, code: int = 0) -> Any:
        with pytest.raises(SystemExit) if code else nullcontext() as ended:
            main([str(argument) for argument in arguments])
        assert code == (ended.value.code if ended else 0)
        return capsys.readouterr()

    return run


def test_the_cache_of_the_command(runs: tuple[Path, Path], command: Callable[..., Any], tmp_path: Path) -> None:
    run = runs[0]
    static = json.loads(command(run, "--json").out)
    figures = json.loads(command(run, "--cache=60", "--json").out)
    assert figures["perplexity_without_cache"] == pytest.approx(static["perplexity"], rel=1e-5)
    assert figures["perplexity"] < 0.8 * static["perplexity"]
    assert figures["nats_per_token"] == pytest.approx(math.log(figures["perplexity"]))
    cache = NeuralCache(figures["cache"], figures["cache_theta"], figures["cache_weight"])

    # It was tuned on valid, and applied once to test.
    checkpoint = find_checkpoint(run)
    opened = open_checkpoint(checkpoint)
    model, manifest = opened.model(), opened.manifest
    data = Path(manifest["recipe"]["data"]["folder"])
    assert cache == tune(model, np.fromfile(data / "valid.bin", "<u2"), 1, CPU, 60)
    tokens = np.fromfile(data / "test.bin", "<u2")
    by_model, (by_cache,) = token_log_probabilities(model, tokens, 1, CPU, 60, [cache.theta])
    assert figures["nats_per_token"] == pytest.approx(-float(mixed(by_model, by_cache, cache.weight).mean()))

    # The run remembers it, for these parameters: those of the other run are of the same step.
    assert read_tuned(run, manifest["files"]["model.safetensors"]["sha256"]) == cache
    other = open_checkpoint(find_checkpoint(runs[1])).manifest
    assert other["progress"]["step"] == manifest["progress"]["step"]
    assert read_tuned(run, other["files"]["model.safetensors"]["sha256"]) is None
    alone = tmp_path / "alone"
    alone.mkdir()
    for file in checkpoint.iterdir():
        (alone / file.name).write_bytes(file.read_bytes())
    assert "not saved" in command(alone, "--cache=60").err

    assert "valid is the split that the cache is tuned on" in command(run, "--split=valid", "--cache=60").err
    file = tmp_path / "text.txt"
    file.write_text("w3 w4 w3 w4 w3\n")
    assert json.loads(command(run, f"--file={file}", "--cache=60", "--json").out)["cache_theta"] == cache.theta


def test_ensembles_of_the_command(runs: tuple[Path, Path], command: Callable[..., Any]) -> None:
    one, other = runs
    first, second = (json.loads(command(run, "--json").out) for run in runs)
    same = json.loads(command(one, one, one, "--json").out)
    assert same["nats_per_token"] == pytest.approx(first["nats_per_token"], abs=1e-6)
    both = json.loads(command(one, other, "--json").out)
    assert both["perplexities"] == pytest.approx([first["perplexity"], second["perplexity"]], rel=1e-5)
    assert len(both["checkpoints"]) == 2
    models = [open_checkpoint(find_checkpoint(run)).model() for run in runs]
    tokens = np.fromfile(one.parent / "data" / "test.bin", "<u2")
    probabilities = [token_log_probabilities(model, tokens, 1, CPU)[0].exp() for model in models]
    assert both["nats_per_token"] == pytest.approx(-float(((probabilities[0] + probabilities[1]) / 2).log().mean()))
    cached = json.loads(command(one, other, "--cache=60", "--json").out)
    assert cached["perplexity"] < both["perplexity"]
    assert [len(cached[name]) for name in ("cache", "cache_theta", "cache_weight")] == [2, 2, 2]
    assert "perplexities" in command(one, other).out


def test_mistakes(runs: tuple[Path, Path], command: Callable[..., Any], tmp_path: Path) -> None:
    run = runs[0]
    assert "--cache is -1; it must be from 0 to 1,000,000 (0 is none)" in command(run, "--cache=-1", code=64).err
    other = write_data_folder(tmp_path / "data", {"train": chain(451, 31), "valid": chain(99, 31)}, 31)
    train_here(f"--data.folder={other}", f"--run_folder={tmp_path / 'run'}", "--training.epochs=1")
    *_, line = command(run, tmp_path / "run", code=65).err.splitlines()
    assert f"{tmp_path / 'run'}" in line
    assert "another vocabulary" in line
    folder = write_data_folder(tmp_path / "test-only", {"train": chain(451, 30), "test": chain(99, 30)}, 30)
    message = f"--cache is tuned on the valid split, and {folder} has none"
    (tmp_path / "x").write_text("w2 w3")
    assert message in command(run, "--cache=9", f"--data={folder}", f"--file={tmp_path / 'x'}", code=64).err


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 0}, "cache.size is 0; it must be from 1 to 1,000,000"),
        ({"theta": -1}, "cache.theta is -1"),
        ({"weight": 2}, "cache.weight is 2; it must be from 0 to 1"),
        ({"weight": "x"}, "cache.weight is 'x'; a number is expected"),
    ],
)
def test_damaged_parameters(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    write_tuned(tmp_path, "3f", NeuralCache(5, 0.3, 0.1))
    path = tmp_path / "cache.json"
    found = json.loads(path.read_text())
    found["cache"] |= values
    path.write_text(json.dumps(found))
    with pytest.raises(DataError, match=message.replace("(", r"\(")):
        read_tuned(tmp_path, "3f")

"""Folders that are replaced, removed, truncated or overwritten while they are read: what was checked is what is used."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lmdist.errors import DataError, MissingInputError
from lmdist.settings import Recipe
from lmdist.storage import held
from lmdist.storage.atomic import rename_over
from lmdist.storage.checksums import own_checksum
from lmdist.storage.held import HeldFolder, read_held
from lmdist.training import evaluate
from lmdist.training.checkpoints.format import MODEL, TRAINING
from lmdist.training.checkpoints.read import Checkpoint, open_checkpoint
from lmdist.training.data import DataFolder
from lmdist.training.run import find_newest
from lmdist_export.bundle import WEIGHTS, Bundle
from lmdist_export.options import GenerationConfig
from lmdist_export.sampling.sampler import Sampler
from lmdist_export.serving.mlflow_model import ServedModel
from support.mutations import with_correct_checksums
from support.small_bundles import make_bundle, make_run


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two bundles of the same sizes, with other weights and other words."""
    first = make_bundle(tmp_path_factory.mktemp("bundle"), tokenizer="whitespace")
    second = Path(shutil.copytree(first, first.with_name("second")))
    numbers = np.fromfile(second / WEIGHTS, np.float32)
    np.where(np.isfinite(numbers), -numbers, numbers).tofile(second / WEIGHTS)
    head, *words = (second / "vocab.txt").read_text().split("\n", 2)
    (second / "vocab.txt").write_text("\n".join([head, words[0], *words[1].upper().split("\n")]))
    with_correct_checksums(second, "manifest.json")
    return first, second


def used(bundle: Bundle) -> str:
    """Return what a bundle generates and scores, in words: each graph is opened here."""
    sampler, tokens = Sampler(bundle, threads=1), np.array([[1, 4, 5, 6]])
    words = bundle.vocabulary.decode(sampler.generate(sampler.start([[1]]).seeded(1), GenerationConfig(), 9)[0][:, 0])
    logits, _ = sampler.step(tokens, sampler.initial_state(1))
    scores, _ = sampler.score(tokens[:, :-1], tokens[:, 1:])
    return f"{bundle.tokenizer.detokenize(words)} {logits.sum():.6f} {scores.tolist()}"


def swap(place: Path, other: Path) -> None:
    """Replace a folder as lmdist-export --overwrite does."""
    rename_over(Path(shutil.copytree(other, place.with_name("new"))), place)


def at_open(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], object]) -> None:
    """Do something before the file with a number is opened, once."""
    opened, count = held.open_descriptor, iter(range(10**9))

    def open_descriptor(*arguments: Any) -> int:
        if next(count) == number:
            act()
        return opened(*arguments)

    monkeypatch.setattr(held, "open_descriptor", open_descriptor)


def test_a_bundle_that_is_replaced_before_its_first_use_is_the_one_that_was_loaded(
    bundles: tuple[Path, Path], tmp_path: Path
) -> None:
    first, second = map(used, map(Bundle.load, bundles))
    assert first != second
    place = Path(shutil.copytree(bundles[0], tmp_path / "bundle"))
    loaded, again = Bundle.load(place), Bundle.load(place)
    swap(place, bundles[1])
    assert used(loaded) == first
    assert used(Bundle.load(place)) == second
    shutil.rmtree(place)
    assert used(again) == first


def test_a_bundle_that_is_replaced_while_it_is_loaded_is_one_or_the_other(
    bundles: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, found = [used(Bundle.load(bundle)) for bundle in bundles], []
    for number in range(8):
        place = Path(shutil.copytree(bundles[0], tmp_path / str(number) / "bundle"))
        with monkeypatch.context() as patch:
            at_open(patch, number, lambda: swap(place, bundles[1]))  # noqa: B023 (called in the loop)
            found.append(used(Bundle.load(place)))
    assert set(found) <= set(expected)
    assert expected[1] in found


def test_a_bundle_that_was_loaded_holds_no_file_open(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    """A file that was removed, and is open, keeps its space on the disk."""
    place = Path(shutil.copytree(bundles[0], tmp_path / "bundle"))
    before = sorted(os.listdir("/proc/self/fd"))
    loaded = Bundle.load(place)
    assert sorted(os.listdir("/proc/self/fd")) == before
    shutil.rmtree(place)
    assert used(loaded) == used(Bundle.load(bundles[0]))
    with pytest.raises(AssertionError, match="only what was read before the folder was closed"):
        loaded.files.read_json("manifest2.json")


@pytest.mark.parametrize("length", [0, 4096])
def test_weights_that_are_truncated_or_overwritten_in_place_are_still_those_that_were_loaded(
    bundles: tuple[Path, Path], tmp_path: Path, length: int
) -> None:
    """Where the file was mapped into memory, the signal SIGBUS ended the process."""
    place = Path(shutil.copytree(bundles[0], tmp_path / "bundle"))
    expected, loaded = used(Bundle.load(bundles[0])), Bundle.load(place)
    sampler = Sampler(loaded, threads=1)
    tokens = np.array([[1, 4, 5, 6]])
    before, _ = sampler.step(tokens, sampler.initial_state(1))
    os.truncate(place / WEIGHTS, length)
    after, _ = sampler.step(tokens, sampler.initial_state(1))
    np.testing.assert_array_equal(after, before)
    (place / WEIGHTS).write_bytes((bundles[1] / WEIGHTS).read_bytes())
    assert used(loaded) == expected


def test_a_server_answers_from_the_bundle_that_it_has_loaded(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    import pandas as pd

    place = Path(shutil.copytree(bundles[0], tmp_path / "bundle"))

    def served(folder: Path) -> ServedModel:
        model, context = ServedModel(), SimpleNamespace(artifacts={"bundle": str(folder)}, model_config={"threads": 1})
        model.load_context(context)  # type: ignore[arg-type]
        return model

    def answers(model: ServedModel) -> str:
        ways = [{"top_k": 3, "seed": 1}, {"repetition_penalty": 1.3, "seed": 1}, {"num_beams": 2}, {"temperature": 0.0}]
        prompts = pd.DataFrame({"prompt": ["the cat"]})
        found = [model.predict(None, prompts, {"max_new_tokens": 5, **way}) for way in ways]  # type: ignore[arg-type]
        return json.dumps(found)

    first, second = map(served, bundles)
    model = served(place)
    swap(place, bundles[1])
    assert answers(model) == answers(first) != answers(second)
    shutil.rmtree(place)
    assert answers(model) == answers(first)


# --- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoints(tmp_path: Path) -> tuple[Path, Path]:
    """Two checkpoints of one model and one step, with other parameters: the second one's are the first one's negative."""
    first = make_run(tmp_path) / "checkpoints" / "step-000000007"
    second = Path(shutil.copytree(first, tmp_path / "second"))
    from safetensors.torch import load_file, save_file

    save_file({name: -value for name, value in load_file(second / MODEL).items()}, second / MODEL)
    with_correct_checksums(second, "manifest.json")
    return first, second


def bias(checkpoint: Checkpoint) -> list[float]:
    """Return some parameters, and restore the rest of a run as a resume does."""
    model = checkpoint.model()
    checkpoint.load_parameters(model)
    assert checkpoint.load_training(torch.optim.AdamW(model.parameters()))[0].step == 7
    return model.get_parameter("projection.bias").tolist()


def test_a_checkpoint_that_is_replaced_after_its_checks_is_the_one_that_was_checked(checkpoints: tuple[Path, Path]) -> None:
    path, other = checkpoints
    expected = bias(open_checkpoint(path))
    found = open_checkpoint(path)
    swap(path, other)
    assert bias(found) == expected
    assert bias(open_checkpoint(path)) == [-value for value in expected]
    shutil.rmtree(path)
    assert bias(found) == expected


def test_a_checkpoint_that_is_replaced_while_it_is_opened_is_one_or_the_other(
    checkpoints: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command that evaluates it."""
    path, other = checkpoints
    kept = Path(shutil.copytree(path, tmp_path / "first"))

    def perplexity(checkpoint: Path) -> float:
        capsys.readouterr()
        evaluate.main([str(checkpoint), "--split", "valid", "--json"])
        return json.loads(capsys.readouterr().out)["perplexity"]

    expected = [perplexity(kept), perplexity(other)]
    assert expected[0] != expected[1]
    found = []
    for number in range(12):
        with monkeypatch.context() as patch:
            at_open(patch, number, lambda: swap(path, other))
            found.append(perplexity(path))
        swap(path, kept)
    assert set(found) == set(expected)


@pytest.mark.parametrize("name", [MODEL, TRAINING])
def test_tensors_that_are_overwritten_after_the_checks_are_refused(checkpoints: tuple[Path, Path], name: str) -> None:
    path, other = checkpoints
    found = open_checkpoint(path)
    content = (other / name).read_bytes()
    (path / name).write_bytes(content)
    os.utime(path / name)
    with pytest.raises(DataError, match=f"{name} was overwritten while it was read"):
        bias(found)


def test_without_links_to_open_files_a_replaced_checkpoint_is_refused(
    checkpoints: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a system without /proc: never another checkpoint than the one that was checked."""
    path, other = checkpoints
    expected = bias(open_checkpoint(path))
    monkeypatch.setattr(held, "DESCRIPTORS", Path("/nowhere"))
    found = open_checkpoint(path)
    assert bias(found) == expected
    swap(path, other)
    with pytest.raises(DataError, match="was overwritten while it was read"):
        bias(found)


def test_a_rank_that_finds_another_checkpoint_than_rank_0_says_so(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    path, other = checkpoints
    said = f"auto {own_checksum(open_checkpoint(path).manifest)} {path}"
    world: Any = SimpleNamespace(is_main=False, rank=1, broadcast=lambda text: said, wait_for_all=lambda: None)
    recipe, folder = Recipe(run_folder=str(path.parents[1])), DataFolder(tmp_path / "data")
    swap(path, other)
    with pytest.raises(DataError, match="is another checkpoint on rank 1 than on rank 0"):
        find_newest(recipe, folder, world)


# --- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_always_replaced_is_an_error_in_the_end(tmp_path: Path) -> None:
    place, tries = tmp_path / "place", []
    (tmp_path / "other").mkdir()

    def read(folder: HeldFolder) -> None:
        tries.append(folder)
        swap(place, tmp_path / "other")
        folder.descriptor("file")

    swap(place, tmp_path / "other")
    with pytest.raises(MissingInputError, match="file does not exist"):
        read_held(place, read)
    assert len(tries) == held.TRIES


def test_what_is_damaged_is_read_once(tmp_path: Path) -> None:
    tries = []

    def read(folder: HeldFolder) -> None:
        tries.append(folder)
        folder.read_json("file")

    (tmp_path / "file").write_text("{")
    with pytest.raises(DataError, match="file is not JSON"):
        read_held(tmp_path, read)
    assert len(tries) == 1


def test_files_are_closed_with_the_folder_that_holds_them(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("{}")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        assert HeldFolder(tmp_path).read_json("file") == {}
    assert len(os.listdir("/proc/self/fd")) == before

"""Every line `next:` runs as it is printed: of each recipe, in folders whose names a shell would split."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from lmdist import config
from lmdist.job import launcher
from lmdist.text import prepare
from lmdist.training import evaluate
from lmdist_export import export, generate
from support.jobs import train

RECIPES = config.recipe_names()
TINY = (
    "--model.hidden_size=16 --model.embedding_size=16 --training.steps=2 --training.precision=fp32 --training.device=cpu "
    "--tracking.mlflow=false --sample.words=5 --sample.final_words=5"
)
WORDS = "the a president said we must people of united states and in to government new year".split()


MAINS: dict[str, Callable[[list[str]], None]] = {
    "lmdist-prepare": prepare.main,
    "lmdist-evaluate": evaluate.main,
    "lmdist-export": export.main,
    "lmdist-generate": generate.main,
}


Run = Callable[[str], list[str]]
"""Runs a command; returns those that it names as the next ones."""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs a training as the launcher does, and any other command in this process."""
    monkeypatch.chdir(tmp_path)

    def call(line: str) -> list[str]:
        name, *words = shlex.split(line)
        if name == "lmdist-train":
            arguments, flags = launcher.parser().parse_known_args(words)
            assert arguments == launcher.parser().parse_args([]), "the launcher's own options are the defaults"
            done = train(1, *flags, cwd=tmp_path)
            text = done.stdout + done.stderr
        else:
            MAINS[name](words)
            text = "".join(capsys.readouterr())
        found = re.search(r"^next:? +(.+)$", text, re.MULTILINE)
        return found[1].split("; ") if found else []

    return call


def corpus(folder: Path, recipe: str) -> list[str]:
    """Write text of the kind that a recipe is for; return the arguments of lmdist-prepare that name it."""
    section = tomllib.loads((config.find_recipe(recipe)).read_text()).get("prepare", {})
    sentences = [" ".join(WORDS[(n * m) % 17 % 16] for m in range(1, 60)) for n in range(1, 600)]
    if section.get("unknown") == "file":
        for name in ("train", "valid", "test"):
            (folder / name).write_text(
                "".join(f" {sentence} <unk> \n" for sentence in sentences[: 600 if name == "train" else 90])
            )
        return ["--train", "train", "--valid", "valid", "--test", "test"]
    rows = (f'{n},title {n // 2},"{sentence}, {n}."' for n, sentence in enumerate(sentences))
    (folder / "articles 1.csv").write_text("id,title,content\n" + "\n".join(rows) + "\n")
    return ["articles 1.csv"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_next_command_of_a_recipe_runs(recipe: str, tmp_path: Path, run: Run) -> None:
    if recipe == "finetune":  # its base
        (line,) = run(shlex.join(["lmdist-prepare", *corpus(tmp_path, recipe), "-o", "data/demo"]))
        run(f"{line} --run_folder runs/demo {TINY}")
    (train_line,) = run(shlex.join(["lmdist-prepare", *corpus(tmp_path, recipe), "--recipe", recipe, "-o", "data/my text"]))
    assert train_line == f"lmdist-train --config {recipe} --data.folder 'data/my text' --run_folder 'runs/my text'"
    *evaluations, export_line = run(f"{train_line} {TINY}")
    assert len(evaluations) == (recipe != "tutorial"), "the tutorial holds no text back"
    for line in evaluations:
        assert run(line) == []
    (generate_line,) = run(export_line)
    assert generate_line == "lmdist-generate 'bundles/my text'"
    assert run(f"{generate_line} --max-new-tokens 5") == []


def test_the_next_training_does_not_meet_a_run_that_is_there(tmp_path: Path, run: Run) -> None:
    """After the quickstart, as it were: runs/news exists, and of other words."""
    (tmp_path / "runs/news").mkdir(parents=True)
    (line,) = run(shlex.join(["lmdist-prepare", *corpus(tmp_path, "demo"), "-o", "data/news"]))
    assert line == "lmdist-train --data.folder data/news --run_folder runs/news-2"

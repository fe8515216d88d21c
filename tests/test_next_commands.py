"""Every line `next:` runs as it is printed: of each recipe, in folders whose names a shell would split."""

from __future__ import annotations

import os
import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from lmdist import config
from lmdist import train as training
from lmdist.job import launcher
from lmdist.text import prepare
from lmdist.training import evaluate
from lmdist_export import export, generate
from support.jobs import FORKS

RECIPES = config.recipe_names()
TINY = (
    "--model.hidden_size=16 --model.embedding_size=16 --training.steps=2 --training.precision=fp32 --training.device=cpu "
    "--tracking.mlflow=false --sample.words=5 --sample.final_words=5"
)
WORDS = "the a president said we must people of united states and in to government new year".split()


def train(argv: list[str]) -> None:
    """Train as the launcher does, in this process."""
    arguments, flags = launcher.parser().parse_known_args(argv)
    assert arguments == launcher.parser().parse_args([]), "the launcher's own options are the defaults"
    training.main(flags)


MAINS: dict[str, Callable[[list[str]], None]] = {
    "lmdist-prepare": prepare.main,
    "lmdist-train": train,
    "lmdist-evaluate": evaluate.main,
    "lmdist-export": export.main,
    "lmdist-generate": generate.main,
}


def run_in_fork(line: str, cwd: Path, output: Path) -> None:
    for number in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT), number)
    os.chdir(cwd)
    name, *arguments = shlex.split(line)
    MAINS[name](arguments)


def run(line: str, cwd: Path) -> list[str]:
    """Run a command; return those that it names as the next ones."""
    output = cwd / "output"
    output.unlink(missing_ok=True)
    process = FORKS.Process(target=run_in_fork, args=(line, cwd, output), daemon=True)
    process.start()
    process.join()
    text = output.read_text()
    assert process.exitcode == 0, f"{line}\n{text}"
    found = re.search(r"^next:? +(.+)$", text, re.MULTILINE)
    return found[1].split("; ") if found else []


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
def test_every_next_command_of_a_recipe_runs(recipe: str, tmp_path: Path) -> None:
    if recipe == "finetune":  # its base
        (line,) = run(shlex.join(["lmdist-prepare", *corpus(tmp_path, recipe), "-o", "data/demo"]), tmp_path)
        run(f"{line} --run_folder runs/demo {TINY}", tmp_path)
    (train_line,) = run(
        shlex.join(["lmdist-prepare", *corpus(tmp_path, recipe), "--recipe", recipe, "-o", "data/my text"]), tmp_path
    )
    assert train_line == f"lmdist-train --config {recipe} --data.folder 'data/my text' --run_folder 'runs/my text'"
    *evaluations, export_line = run(f"{train_line} {TINY}", tmp_path)
    assert len(evaluations) == (recipe != "tutorial"), "the tutorial holds no text back"
    for line in evaluations:
        assert run(line, tmp_path) == []
    (generate_line,) = run(export_line, tmp_path)
    assert generate_line == "lmdist-generate 'bundles/my text'"
    assert run(f"{generate_line} --max-new-tokens 5", tmp_path) == []


def test_the_next_training_does_not_meet_a_run_that_is_there(tmp_path: Path) -> None:
    """After the quickstart, as it were: runs/news exists, and of other words."""
    (tmp_path / "runs/news").mkdir(parents=True)
    (line,) = run(shlex.join(["lmdist-prepare", *corpus(tmp_path, "demo"), "-o", "data/news"]), tmp_path)
    assert line == "lmdist-train --data.folder data/news --run_folder runs/news-2"

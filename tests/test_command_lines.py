"""Options as people spell them: with dashes or underscores, and with a mistake, which is answered with what was meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lmdist import config
from lmdist.command_line import CommandParser
from lmdist.errors import UsageError
from lmdist.job import launcher
from lmdist.text import prepare
from lmdist.tracking import sync
from lmdist.training import evaluate
from lmdist_export import export, generate, score, serve
from support.failures import only_line

PARSERS: list[Any] = [module.parser() for module in (prepare, launcher, sync, evaluate, export, generate, score, serve)]


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.prog)
def test_underscores_are_dashes_in_every_option_of_every_command(parser: CommandParser) -> None:
    for option in parser.options:
        if option.startswith("--"):
            other = "--" + option[2:].replace("-", "_")
            assert parser.dashed([f"{other}=a_b", other, "a_b", "--", other]) == [f"{option}=a_b", option, "a_b", "--", other]


def test_both_spellings_are_parsed() -> None:
    for word in ("--max-new-tokens", "--max_new_tokens"):
        assert generate.parser().parse_args(["bundle", word, "7"]).max_new_tokens == 7
    for word in ("--batch-size", "--batch_size"):
        assert score.parser().parse_intermixed_args(["bundle", word, "7", "file_1"]).batch_size == 7
    for words in (["--run_folder=a_b-c", "--data.global_batch", "4"], ["--run-folder=a_b-c", "--data.global-batch", "4"]):
        recipe = config.load(words)
        assert (recipe.run_folder, recipe.data.global_batch) == ("a_b-c", 4)
    arguments, flags = launcher.parser().parse_known_args(["--nproc_per_node=2", "--run-folder=x"])
    assert (arguments.nproc_per_node, flags) == ("2", ["--run-folder=x"])


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["--data.foldr=data/news"], "--data.folder"),
        (["--hidden-size=8"], "--model.hidden_size"),
        (["--epochs=3"], "--training.epochs"),
        (["--restart=3"], "--restarts"),
        (["--nproc=3"], "--nproc-per-node"),
    ],
)
def test_a_misspelled_flag_of_a_training(arguments: list[str], meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, line = only_line(launcher.main, capsys, *arguments)
    assert code == 64
    assert f"; did you mean {meant}? (see --help)" in line


def test_a_misspelled_option_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    for module, arguments, meant in (
        (prepare, ["a.csv", "-o", "out", "--tokeniser=whitespace"], "--tokenizer"),
        (evaluate, ["run", "--splt=test"], "--split"),
        (export, ["run", "-o", "bundle", "--precison=int8"], "--precision"),
        (generate, ["bundle", "--temprature=0.7"], "--temperature"),
        (score, ["bundle", "--sentense"], "--sentences"),
    ):
        code, line = only_line(module.main, capsys, *arguments)
        assert code == 64
        assert f"; did you mean {meant}? " in line
    assert "did you mean" not in only_line(evaluate.main, capsys, "run", "--quux")[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[data]\nfoldr = 'x'\n", "[data] has no foldr; did you mean folder?"),
        ("[trainings]\nepochs = 2\n", "has trainings, which is no setting; did you mean training?"),
        ("run_foldr = 'x'\n", "has run_foldr, which is no setting; did you mean run_folder?"),
        ("[data\n", "is not a recipe: "),
    ],
)
def test_a_misspelled_key_of_a_recipe(text: str, message: str, tmp_path: Path) -> None:
    recipe = tmp_path / "my.toml"
    recipe.write_text(text)
    with pytest.raises(UsageError) as error:
        config.load(["--config", str(recipe)])
    assert str(error.value).startswith(f"{recipe}")
    assert message in str(error.value)


def test_a_recipe_is_known_by_its_name_and_a_file_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert config.load(["--config=tutorial"]).data.batching == "windows"
    (tmp_path / "tutorial").mkdir()  # a folder is no recipe
    assert config.load(["--config", "tutorial.toml"]).data.batching == "windows"
    (tmp_path / "demo").write_text("[data]\nwindow = 3\n")
    assert config.load(["--config", "demo"]).data.window == 3
    assert config.read_section("wikitext2-small", "prepare", config.Recipe().prepare.__class__)["unknown"] == "file"
    with pytest.raises(FileNotFoundError, match=r"launch/demos\.toml does not exist; lmdist has demo, .*tutorial"):
        config.load(["--config", "launch/demos.toml"])


def test_the_shown_options_have_one_spelling() -> None:
    for parser in PARSERS:
        assert not [option for option in parser.options if "_" in option]

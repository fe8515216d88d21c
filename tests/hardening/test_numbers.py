"""Every number of every command and recipe has a range; what is outside is one line with its name, and no traceback."""

from __future__ import annotations

import dataclasses
import json
import math
from argparse import Action
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from lmdist import config
from lmdist.bounds import Bounds, bounds_of
from lmdist.config import RecipeParser
from lmdist.errors import UsageError
from lmdist.job import agent, launcher
from lmdist.settings import ReadSettings, Recipe
from lmdist.text import prepare
from lmdist.training import evaluate
from lmdist_export import export, generate, score, serve
from lmdist_export.options import PARAMS
from support.jobs import SMALL, loop_here, small_data
from support.small_bundles import make_bundle

VALUES = ["-1", "0", "nan", "1e400", "1e20", str(10**20), "1e-320", "", "word"]
NAMES = ["", "word"]
"""Values of options that are no numbers."""
SECTIONS: dict[str, Any] = {name: kind for name, kind in get_type_hints(Recipe).items() if dataclasses.is_dataclass(kind)}


def numbers_of(kind: type) -> Iterator[str]:
    """Yield the fields of a dataclass that hold a number, or None."""
    for name, hint in get_type_hints(kind).items():
        if {int, float} & {hint, *get_args(hint)} and hint is not bool:
            yield name


NUMBERS = list(numbers_of(Recipe)) + [
    f"{section}.{name}" for section, kind in SECTIONS.items() for name in numbers_of(kind) if name != "rules"
]


@pytest.mark.parametrize("kind", [Recipe, *SECTIONS.values(), ReadSettings], ids=lambda kind: kind.__name__)
def test_every_number_of_a_recipe_has_a_range_that_a_checkpoint_can_hold(kind: type) -> None:
    for name in numbers_of(kind):
        bounds = bounds_of(kind).get(name)
        assert isinstance(bounds, Bounds), name
        assert not any(value in bounds for value in (math.inf, -math.inf, math.nan, 2**63, -(2**63) - 1)), name


def test_every_number_of_a_generation_has_a_range() -> None:
    for row in PARAMS.values():
        if row.type in (int, float) and not row.is_list:
            assert row.bounds, row.name
            assert math.inf not in row.bounds, row.name


# --- recipes -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parser() -> Iterator[RecipeParser]:
    """A parser that is built once: that is most of the time."""
    built = config.parser()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "parser", lambda: built)
        yield built


def read(parser: RecipeParser, *words: str) -> Recipe:
    """Read the flags of a training."""
    values = parser.instantiate(parser.parse_args(list(words)))
    return Recipe(**{key: value for key, value in vars(values).items() if key != "config"})


def takes(name: str, value: float) -> bool:
    """Return whether a setting takes a number; another one is refused by its name."""
    section, _, field = name.rpartition(".")
    kind = SECTIONS.get(section, Recipe)
    if isinstance(value, float) and get_type_hints(kind)[field] is int:
        return False
    try:
        kind(**{field: value})
    except UsageError as error:
        message = str(error)
    else:
        return True
    assert field in message
    assert "must be" in message or "need" in message or "leave" in message, message
    return False


@pytest.mark.usefixtures("parser")
def test_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is refused, or a training of two steps works with it: all that take the same value together."""
    monkeypatch.chdir(tmp_path)
    small_data(tmp_path / "data")
    assert not any(takes(name, value) for name in NUMBERS for value in (math.nan, math.inf, -math.inf, 10**20, 1e20))
    # By their texts: a training takes 1e-320 for 0.
    taken = {text: [name for name in NUMBERS if takes(name, json.loads(text))] for text in ("-1", "0", "1e-320")}
    assert taken["-1"] == ["seed", "prepare.seed"]
    assert len(taken["0"]) > 20
    steps = ["--training.steps=2", "--data.folder=data", "--data.batching=windows"]
    for value in taken:
        flags = [f"--{name}={value}" for name in taken[value] if name not in ("training.steps", "schedule.momentum_high")]
        loop_here(*SMALL, *steps, f"--run_folder={value}", *flags)


@pytest.mark.parametrize("name", ["seed", "data.window", "optimizer.clip", "model.dropout_input"])
def test_texts_that_are_no_number_of_a_setting(name: str, parser: RecipeParser, capsys: pytest.CaptureFixture[str]) -> None:
    assert parser
    for value in [*VALUES, "9" * 5_000]:
        if value not in ("-1", "0", "1e-320"):
            message = failure(capsys, [f"--{name}={value}"])
            assert "\n" not in message
            assert name.rpartition(".")[2] in message
            assert "must be" in message or "expected" in message, message


def test_texts_that_name_a_folder(parser: RecipeParser) -> None:
    for name in ("run_folder", "data.folder"):
        for value in ("", "a\0b"):
            with pytest.raises(
                UsageError, match=rf"{name} is {value!r}; the name of a folder is expected".replace("\\", r"\\")
            ):
                read(parser, f"--{name}={value}")


RECIPES = {
    "huge": f"seed = {'9' * 5_000}",
    "beyond": f"seed = {10**20}",
    "infinite": "[optimizer]\nlearning_rate = inf",
    "nan": "[sample]\ntemperature = nan",
    "float for int": "[data]\nwindow = 1e20",
    "brackets": "seed = " + "[" * 50_000,
    "NUL": 'run_folder = "a\\u0000b"',
    "NUL in data": '[data]\nfolder = "a\\u0000b"',
    "empty": 'run_folder = ""',
}


@pytest.mark.usefixtures("parser")
@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "own.toml"
    path.write_text(RECIPES[name])
    message = failure(capsys, [f"--config={path}"])
    assert "\n" not in message
    assert len(message) < 1_000


def test_a_recipe_that_is_not_in_utf_8(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_bytes(b'run_folder = "\xff"')
    with pytest.raises(UsageError, match=r"own\.toml is not a recipe: 'utf-8' codec can't decode"):
        config.load([f"--config={tmp_path / 'own.toml'}"])


def failure(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    """Return the message with which a command line of a training is refused."""
    capsys.readouterr()
    with pytest.raises((UsageError, SystemExit)) as refused:
        config.load(words)
    assert getattr(refused.value, "exit_code", getattr(refused.value, "code", None)) == 64
    return capsys.readouterr().err.strip() or str(refused.value)


# --- commands ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_bundle(folder, tokenizer="wordpunct")
    (folder / "text").write_text("the cat said\n\nit is not so\n\nthe dog\n\nthe cat is here\n" * 9)
    (folder / "lists").write_text("1\tthe cat\t-1\n1\tthe dog\t-2\n")
    return folder


COMMANDS: dict[str, tuple[Any, str]] = {
    "generate": (generate, "bundle --prompt=the --max-new-tokens=2 --json"),
    "score": (score, "bundle lists --nbest --best"),
    "score next": (score, "bundle text"),
    "serve": (serve, "none --port=0"),  # whose checks come first
    "evaluate": (evaluate, "runs/small --file=text --device=cpu"),
    "export": (export, "none -o other"),  # whose checks come first
    "prepare": (prepare, "text -o other --tokenizer=wordpunct --overwrite --workers=1"),
}


def options_of(module: Any) -> list[Action]:
    """Return the options of a command that take a value of their own choice."""
    options = module.parser()._option_string_actions.values()
    return list({action.dest: action for action in options if action.nargs != 0 and not action.choices}.values())


@pytest.mark.parametrize("name", COMMANDS)
def test_options(name: str, world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each value of each option is refused in one line with the option's name, or the command works, or lacks a file."""
    monkeypatch.chdir(world)
    module, words = COMMANDS[name]
    for option in options_of(module):
        flag = max(option.option_strings, key=len)
        for value in VALUES if option.type in (int, float) else NAMES:
            check_option(
                module.main, [*words.split(), f"{flag}={value}"], flag, is_number=option.type in (int, float), capsys=capsys
            )


def check_option(main: Any, words: list[str], flag: str, *, is_number: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a command with an option."""
    capsys.readouterr()
    code: Any = 0
    try:
        main(words)
    except SystemExit as stop:
        code = stop.code
    except BaseException as error:
        raise AssertionError(words[-1][:100]) from error
    lines = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    assert (code in (64, 65, 66), len(lines)) == ((True, 1) if code else (False, 0)), (words[-1][:100], code, lines)
    if code == 64 and is_number:
        assert flag in lines[0] or flag[2:].replace("-", "_") in lines[0], (words[-1][:100], lines)


@pytest.mark.usefixtures("parser")
def test_options_of_the_launcher(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun's own are refused by the agent, before a rank is started."""
    monkeypatch.setattr(launcher, "start_agent", lambda arguments, ranks, logs, flags: pytest.fail("an agent is started"))
    for flag, values in (
        ("--restarts", ("-1", "nan", "inf", "1e20", str(10**20), "9" * 5_000, "word", "")),
        ("--nnodes", ("-1", "0", "nan", "inf", "1e20", "9" * 5_000, "word", "\u00b2")),
        ("--nproc-per-node", (str(10**20), "9" * 5_000, "21")),  # of a global batch of 20
    ):
        for value in values:
            check_option(launcher.main, ["--training.device=cpu", f"{flag}={value}"], flag, is_number=True, capsys=capsys)
    for flag in ("--nproc-per-node", "--nnodes", "--node-rank", "--master-port"):
        for value in ("-1", "nan", "inf", "1e20", str(10**20), "9" * 5_000, "word", ""):
            with pytest.raises(UsageError, match=flag[2:].replace("-", "[-_]")):
                agent.read_arguments([f"{flag}={value}", "-m", "lmdist.train"])

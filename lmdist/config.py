"""Settings from defaults < recipe file < flags, for every command that reads a recipe.

`load` reads the whole recipe of a training job with jsonargparse; the resolved recipe is saved with the run, so that
`--config runs/NAME/recipe.toml` does the same again. The recipes of launch/ lie in the wheel too, and are known by their names:
`--config demo`. A command of one section, such as lmdist-prepare, has a flag for each
of its settings by `add_flags`, and reads the section of a recipe by `read_section`. Names, types, defaults and help come from
the dataclasses in settings.py. This module does not know what the settings mean.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
import tomllib
from collections.abc import Collection, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from lmdist.command_line import CommandParser, did_you_mean, respelled
from lmdist.errors import EXIT_USAGE, MissingInputError, UsageError, escaped
from lmdist.settings import PrepareSettings, Recipe

IN_WHEEL, IN_CHECKOUT = Path(__file__).parent / "recipes", Path(__file__).parents[1] / "launch"
RECIPES = IN_WHEEL if IN_WHEEL.is_dir() else IN_CHECKOUT
"""The recipes that come with lmdist."""


class RecipeParser(ArgumentParser):
    """jsonargparse, with the project's exit code and one line for wrong usage."""

    other_options: Collection[str] = ()
    """Options of the command that are not the recipe's, which a misspelled one may be meant for."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line and exit with code 64."""
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
        known = [*(f"--{key}" for key in named_settings(Recipe())), *self.other_options]
        hint = did_you_mean(unknown[1], known) if unknown else ""
        sys.stderr.write(f"{self.prog}: error: {escaped(readable(message))}{hint} (see --help)\n")
        sys.exit(EXIT_USAGE)


def readable(message: str) -> str:
    """Return an error of jsonargparse in one line: which setting it is, its value, what is expected."""
    line = re.sub(r"<class '(\w+)'>", r"\1", " ".join(message.split()))
    line = re.sub(r'Parser key "(\S+)": Exceeds the limit.*', r"\1 has thousands of digits; one of 64 bits is expected", line)
    line = re.sub(r"(Got|Given) value:$", r"\1 value: nothing", line)
    line = re.sub(r"typing\.Literal\[(.+?)\]", r"one of \1", line)
    line = re.sub(
        r'(Parser key "\S+": ).+ Union .+\[(\w+), NoneType\].+ Given value: (.*)', r"\1Expected a \2. Got value: \3", line
    )
    return re.sub(r'Parser key "(\S+)": Expected an? (.+?)\. Got value: (.*)', r"\1 is \3; \2 is expected", line)


def parser() -> RecipeParser:
    """Return the parser of `python -m lmdist.train`."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    built = RecipeParser(
        prog="lmdist.train",
        parser_mode="toml",
        usage="torchrun --nproc_per_node=N -m lmdist.train [--config RECIPE.toml] [--section.key VALUE ...]",
        description="Train a word-level LSTM language model on N GPUs or CPU processes. "
        "Without torchrun, python -m lmdist.train runs one process.",
        epilog="With no argument it trains on the demo corpus.",
    )
    names = ", ".join(recipe_names())
    built.add_argument(
        "--config", action="config", help=f"a recipe: a file, or the name of one of these: {names}; flags win over it"
    )
    built.add_class_arguments(Recipe)
    return built


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with lmdist."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def find_recipe(name: str) -> Path:
    """Return the file of a recipe: the file itself where it exists, else the one of this name that comes with lmdist."""
    if Path(name).is_file():
        return Path(name)
    known = recipe_names()
    if name.removesuffix(".toml") in known:
        return RECIPES / f"{name.removesuffix('.toml')}.toml"
    raise MissingInputError(f"the recipe {name} does not exist; lmdist has {', '.join(known)}, which need no path")


def load(argv: Sequence[str] | None = None, *, quiet: bool = False, other_options: Collection[str] = ()) -> Recipe:
    """Return the recipe that the command line asks for; exits for --help and for wrong usage, silently where `quiet`."""
    with (
        open(os.devnull, "w") as nowhere,
        redirect_stdout(nowhere if quiet else sys.stdout),
        redirect_stderr(nowhere if quiet else sys.stderr),
    ):
        files, flags = recipes_and_flags(argv)
        for file in files:
            check_keys(file)
        built = parser()
        built.other_options = other_options
        # The last argument wins with jsonargparse, so recipes come first.
        words = [*(f"--config={file}" for file in files), *flags]
        values = built.instantiate(built.parse_args(words))
    return Recipe(**{key: value for key, value in vars(values).items() if key != "config"})


def recipes_and_flags(argv: Sequence[str] | None) -> tuple[list[Path], list[str]]:
    """Return the recipes that a command line names, and its other words, as the settings are spelled."""
    recipes = CommandParser(prog="lmdist.train", add_help=False, allow_abbrev=False)
    recipes.add_argument("--config", action="append", default=[])
    found, flags = recipes.parse_known_args(argv)
    return [find_recipe(name) for name in found.config], respelled(flags, "-", "_")


def check_keys(file: Path) -> None:
    """Raise UsageError for a key of a recipe that is no setting, with the one that is most like it."""
    sections = get_type_hints(Recipe)
    for key, value in read_toml(file).items():
        if key not in sections:
            raise UsageError(
                f"{file} has {key}, which is no setting{did_you_mean(key, [*sections, *named_settings(Recipe())])}"
            )
        if isinstance(value, dict) and dataclasses.is_dataclass(sections[key]):
            check_section(file, key, value, [field.name for field in dataclasses.fields(sections[key])])


def check_section(file: Path, name: str, values: dict[str, Any], known: list[str]) -> None:
    """Raise UsageError for a key of [name] in a recipe that is none of those known."""
    for key in values:
        if key not in known:
            hint = did_you_mean(key, known) or f"; it has {', '.join(known)}"
            raise UsageError(f"{file}: [{name}] has no {key}{hint}")


def read_toml(file: Path) -> dict[str, Any]:
    """Return the content of a recipe."""
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:  # ValueError: not TOML or UTF-8, or a number of 5,000 digits
        raise UsageError(f"{file} is not a recipe: {error}") from None


# --- commands of one section ---------------------------------------------------------------------------------------


def add_flags(parser: argparse._ActionsContainer, section: type) -> None:
    """Add a flag for each setting of a section, `--text-column` for `text_column`; `inputs` are the positional arguments.

    The parser's result has only what was given where its `argument_default` is SUPPRESS, so that a recipe can lie below it.
    """
    help_of, hints = descriptions(section), get_type_hints(section)
    for setting in dataclasses.fields(section):
        flag, kind = f"--{setting.name.replace('_', '-')}", hints[setting.name]
        shown = "" if setting.default in ("", 0) and kind is not bool else f" (default: {setting.default})"
        text = (help_of[setting.name].rstrip(".") + shown).replace("%", "%%")
        if setting.name == "inputs":
            parser.add_argument(setting.name, nargs="*", metavar="INPUT", help=help_of[setting.name])
        elif setting.metadata.get("repeated"):
            parser.add_argument(flag, action="append", metavar="NAME", help=text)
        elif list[str] in get_args(kind):
            parser.add_argument(flag, nargs="+", metavar="FILE", help=text)
        elif kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        elif get_origin(kind) is Literal:
            parser.add_argument(flag, choices=get_args(kind), help=text)
        else:
            parser.add_argument(flag, type=kind, metavar="VALUE", help=text)


def descriptions(section: type) -> dict[str, str]:
    """Return the docstring under each field of a dataclass and of those it inherits from."""
    from docstring_parser import parse_from_object

    kinds = [kind for kind in reversed(section.__mro__) if dataclasses.is_dataclass(kind)]
    return {field.arg_name: field.description or "" for kind in kinds for field in parse_from_object(kind).params}


def read_section(recipe: str, name: str, section: type) -> dict[str, Any]:
    """Return what [name] of a recipe sets, with the types of `section`; an error names the file and what is wrong in it."""
    path = find_recipe(recipe)
    values = read_toml(path).get(name, {})
    if not isinstance(values, dict):
        raise UsageError(f"{path}: [{name}] is expected to be a section")
    check_section(path, name, values, [field.name for field in dataclasses.fields(section)])
    built = ArgumentParser(exit_on_error=False)
    built.add_class_arguments(section)
    try:
        return dict(vars(built.parse_object(values, defaults=False)))
    except ArgumentError as error:
        raise UsageError(f"{path}: {name}.{readable(str(error))}") from None


def by_hand(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a recipe's [prepare] sets by hand: nothing in one that was saved with a run, for it has every setting."""
    return {} if values.keys() >= PrepareSettings().stored().keys() else values


def prepare_by_hand(argv: Sequence[str] | None) -> dict[str, Any]:
    """Return what the command line of a training sets in `prepare`, which may be a default, by its recipes and flags."""
    files, flags = recipes_and_flags(argv)
    given: dict[str, Any] = {}
    for file in files:
        given |= by_hand(read_section(str(file), "prepare", PrepareSettings))
    return given | vars(parser().parse_args(flags, defaults=False).get("prepare", argparse.Namespace()))


# --- the resolved recipe -------------------------------------------------------------------------------------------


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as plain values, without credentials: they are stored and shown."""
    return {**dataclasses.asdict(recipe), "prepare": recipe.prepare.stored()}


def as_toml(recipe: Recipe) -> str:
    """Return the recipe as a file that `--config` reads; addresses in it lack their passwords and queries."""
    import toml

    return toml.dumps(as_dict(recipe))


def named_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe with its keys as the flags name them: `model.hidden_size`."""
    return named_values(as_dict(recipe))


def named_values(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a recipe's sections in the same way."""
    pairs: dict[str, Any] = {}
    for key, value in values.items():
        pairs.update({f"{key}.{name}": inner for name, inner in value.items()} if isinstance(value, dict) else {key: value})
    return pairs

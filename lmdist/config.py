"""Settings from defaults < recipe file < flags, for every command that reads a recipe.

`load` reads the whole recipe of a training job with jsonargparse; the resolved recipe is saved with the run, so that
`--config runs/NAME/recipe.toml` does the same again. A command of one section, such as lmdist-prepare, has a flag for each
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
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from lmdist.errors import EXIT_USAGE, CommandParser, MissingInputError, UsageError, escaped
from lmdist.settings import Recipe


class RecipeParser(ArgumentParser):
    """jsonargparse, with the project's exit code and one line for wrong usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line and exit with code 64."""
        sys.stderr.write(f"{self.prog}: error: {escaped(readable(message))} (see --help)\n")
        sys.exit(EXIT_USAGE)


def readable(message: str) -> str:
    """Return an error of jsonargparse in one line: which setting it is, its value, what is expected."""
    line = re.sub(r"<class '(\w+)'>", r"\1", " ".join(message.split()))
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
        epilog="With no argument it trains on the demo corpus. launch/ has recipes to start from.",
    )
    built.add_argument("--config", action="config", help="a recipe, such as launch/demo.toml; flags win over it")
    built.add_class_arguments(Recipe)
    return built


def load(argv: Sequence[str] | None = None, *, quiet: bool = False) -> Recipe:
    """Return the recipe that the command line asks for; exits for --help and for wrong usage, silently where `quiet`."""
    with (
        open(os.devnull, "w") as nowhere,
        redirect_stdout(nowhere if quiet else sys.stdout),
        redirect_stderr(nowhere if quiet else sys.stderr),
    ):
        recipes = CommandParser(prog="lmdist.train", add_help=False, allow_abbrev=False)
        recipes.add_argument("--config", action="append", default=[])
        found, flags = recipes.parse_known_args(argv)
        for file in found.config:
            if not Path(file).is_file():
                raise MissingInputError(f"the recipe {file} does not exist; launch/ has recipes to start from")
        built = parser()
        # The last argument wins with jsonargparse, so recipes come first.
        values = built.instantiate(built.parse_args([*(f"--config={file}" for file in found.config), *flags]))
    return Recipe(**{key: value for key, value in vars(values).items() if key != "config"})


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


def read_section(path: Path, name: str, section: type) -> dict[str, Any]:
    """Return what [name] of a recipe sets, with the types of `section`; an error names the file and what is wrong in it."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8")).get(name, {})
    except FileNotFoundError:
        raise MissingInputError(f"the recipe {path} does not exist") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError, OSError) as error:
        raise UsageError(f"{path} is not a recipe: {error}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path}: [{name}] is expected to be a section")
    known = [field.name for field in dataclasses.fields(section)]
    for key in values:
        if key not in known:
            raise UsageError(f"{path}: [{name}] has no {key}; it has {', '.join(known)}")
    built = ArgumentParser(exit_on_error=False)
    built.add_class_arguments(section)
    try:
        return dict(vars(built.parse_object(values, defaults=False)))
    except ArgumentError as error:
        raise UsageError(f"{path}: {name}.{readable(str(error))}") from None


# --- the resolved recipe -------------------------------------------------------------------------------------------


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as plain values."""
    return dataclasses.asdict(recipe)


def as_toml(recipe: Recipe) -> str:
    """Return the recipe as a file that `--config` reads."""
    import toml

    return toml.dumps(as_dict(recipe))


def flat(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe with its keys as the flags name them: `model.hidden_size`."""
    pairs: dict[str, Any] = {}
    for key, value in as_dict(recipe).items():
        pairs.update({f"{key}.{name}": inner for name, inner in value.items()} if isinstance(value, dict) else {key: value})
    return pairs

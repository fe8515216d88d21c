"""The recipe of a run: defaults < recipe file < flags, read by one `load`.

The resolved recipe is saved with the run, so that `--config runs/NAME/recipe.toml` does the same again.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, set_parsing_settings

from lmdist.errors import EXIT_USAGE, MissingInputError
from lmdist.settings import Recipe

FINISHED = "finished.toml"
"""In a run's folder once all is done: the recipe that it was trained by to the end, with `resume` auto."""


class RecipeParser(ArgumentParser):
    """jsonargparse, with the project's exit code and one line for wrong usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line and exit with code 64."""
        line = " ".join(str(message).split())
        sys.stderr.write(f"{self.prog}: error: {line} (see --help)\n")
        sys.exit(EXIT_USAGE)


def parser() -> RecipeParser:
    """The parser of `python -m lmdist.train`."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    made = RecipeParser(
        prog="lmdist.train",
        parser_mode="toml",
        usage="torchrun --nproc_per_node=N -m lmdist.train [--config RECIPE.toml] [--section.key VALUE ...]",
        description="Train a word-level LSTM language model on N GPUs or CPU processes. "
        "Without torchrun, python -m lmdist.train runs one process.",
        epilog="With no argument it trains on the demo corpus. Recipes to start from lie in launch/.",
    )
    made.add_argument("--config", action="config", help="a recipe, such as launch/demo.toml; flags win over it")
    made.add_class_arguments(Recipe)
    return made


def load(argv: Sequence[str] | None = None, *, quiet: bool = False) -> Recipe:
    """The recipe that the command line asks for; exits where it asks for help or is wrong, which `quiet` does in silence."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for before, word in pairwise(["", *arguments]):
        file = word if before == "--config" else word.removeprefix("--config=") if word.startswith("--config=") else ""
        if file and not Path(file).is_file():
            raise MissingInputError(f"the recipe {file} is not there; launch/ has some to start from")
    made = parser()
    with (
        open(os.devnull, "w") as nowhere,
        redirect_stdout(nowhere if quiet else sys.stdout),
        redirect_stderr(nowhere if quiet else sys.stderr),
    ):
        values = made.instantiate(made.parse_args(arguments))
    return Recipe(**{key: value for key, value in vars(values).items() if key != "config"})


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values."""
    return dataclasses.asdict(recipe)


def as_toml(recipe: Recipe) -> str:
    """The recipe as a file that `--config` reads."""
    import toml

    return toml.dumps(as_dict(recipe))


def is_finished(recipe: Recipe) -> bool:
    """Whether a run that may be gone on with was trained to its end, by this very recipe."""
    finished = Path(recipe.run_folder) / FINISHED
    return recipe.resume == "auto" and finished.is_file() and finished.read_text("utf-8", "replace") == as_toml(recipe)


def flat(recipe: Recipe) -> dict[str, Any]:
    """The recipe with its keys as the flags name them: `model.hidden_size`."""
    pairs: dict[str, Any] = {}
    for key, value in as_dict(recipe).items():
        pairs.update({f"{key}.{name}": inner for name, inner in value.items()} if isinstance(value, dict) else {key: value})
    return pairs

"""Where a run starts, if not from random parameters alone: another model's weights, word by word, and word vectors.

    facts = start(model, recipe, folder)        # on rank 0; the others get all parameters from there, as they always do

A matrix with a row for each word (the embedding, the projection, the clusters of an adaptive head) is taken row by row by
word, so the vocabularies may differ; all else is taken as it is. The facts of what was taken from where are in each checkpoint
of the run, which is resumed without its base.

Shapes: V vocabulary, R rows of a parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast, get_type_hints

import torch
from torch import Tensor, nn

import lmdist
from lmdist.errors import DataError, UsageError
from lmdist.model.language_model import LanguageModel
from lmdist.settings import MODEL_SIZES, ModelSettings, Recipe
from lmdist.text.given_vocabulary import CHOICES
from lmdist.text.tokenizer import WordTokenizer
from lmdist.text.vectors import BY_LOWERCASE, read_vectors
from lmdist.text.vocabulary import Vocabulary
from lmdist.tracking.metadata import read_metadata, run_id_of
from lmdist.training.checkpoints.format import StartedFrom
from lmdist.training.checkpoints.read import open_checkpoint, parameters_file
from lmdist.training.checkpoints.retain import find_checkpoint, run_of
from lmdist.training.data import DataFolder

NOISE = 0.1
"""The standard deviation of what is added to the row of a new word, relative to that of the rows it is the mean of."""
SPECIAL = 2
"""<unk> and <eos>, which every vocabulary has."""


@dataclass(frozen=True)
class Base:
    """The model that a run starts from."""

    name: str
    """As the user names it."""
    model: LanguageModel
    vocabulary: Vocabulary
    tokenizer: WordTokenizer
    origin: Mapping[str, Any]
    """Its run, step, run_id and sha256, as StartedFrom has them."""


def start(model: LanguageModel, recipe: Recipe, folder: DataFolder) -> StartedFrom | None:
    """Replace the random parameters of `model` by what the recipe starts from; return the facts, None where it names nothing.

    The vocabulary is that of the data folder. Raise UsageError, DataError or MissingInputError for what cannot be taken.
    """
    if not (recipe.init_from or recipe.init.embeddings):
        return None
    facts: dict[str, Any] = {name: kind() for name, kind in get_type_hints(StartedFrom).items()}
    source = torch.full((model.vocabulary_size,), -1)  # (V): the id of each word in the base; -1 is none
    if recipe.init_from:
        base = load_base(recipe.init_from)
        check_base(base, recipe.model, folder)
        source = torch.tensor([base.vocabulary.ids.get(word, -1) for word in folder.vocabulary.words])
        shared = int((source >= 0).sum())
        if shared == SPECIAL:
            raise UsageError(f"init_from {base.name} has none of the words of {folder.path}: name other data")
        facts |= {"base": base.name, **base.origin}
        facts |= {"words_shared": shared, "words_new": len(source) - shared, "words_left": len(base.vocabulary) - shared}
        take_weights(model, base.model, source, recipe.seed)
    if recipe.init.embeddings:
        facts |= take_vectors(model, Path(recipe.init.embeddings), folder.vocabulary, source < 0)
    return cast("StartedFrom", facts)


def lines_of(facts: StartedFrom | None) -> list[str]:
    """Return the facts as lines of the console."""
    lines = []
    if facts and facts["base"]:
        lines.append(
            "  init   from {base} ({run}, step {step:,}): {words_shared:,} words keep their rows, {words_new:,} are new, "
            "{words_left:,} of its words are left out".format_map(facts)
        )
    if facts and facts["vectors"]:
        share = facts["vectors_taken"] / max(1, facts["vectors_words"])
        lines.append(
            "  init   vectors of {vectors}: of {vectors_taken:,} of {vectors_words:,} words".format_map(facts)
            + f"{' that are new' if facts['base'] else ''} ({share:.1%}), {facts['vectors_by_lowercase']:,} in another spelling"
        )
    return lines


# --- the base ------------------------------------------------------------------------------------------------------


def load_base(name: str) -> Base:
    """Return the base that a recipe names: a run, a checkpoint, a bundle, or a registered model, models:/NAME@ALIAS."""
    return lmdist.base_of_bundle(name) or base_of_checkpoint(name, find_checkpoint(Path(name)))


def base_of_checkpoint(name: str, path: Path) -> Base:
    """Return a checkpoint as a base; its parameters are their average over the steps, where it holds one."""
    found, run = open_checkpoint(path), run_of(path)
    manifest = found.manifest
    origin = {
        "run": (run or path.resolve()).name,
        "step": manifest["progress"]["step"],
        "sha256": manifest["files"][parameters_file(manifest)]["sha256"],
        "run_id": run_id_of(read_metadata(run)) if run else "",
    }
    return Base(name, found.model(), found.vocabulary, found.tokenizer, origin)


def check_base(base: Base, settings: ModelSettings, folder: DataFolder) -> None:
    """Raise UsageError unless the base has the sizes of the recipe's model, and the data folder its tokenizer."""
    theirs, ours = sizes_of(base.model.settings), sizes_of(settings)
    if theirs != ours:
        differing = {name: str(value).lower() for name, value in theirs.items() if value != ours[name]}
        flags = " ".join(f"--model.{name} {value}" for name, value in differing.items())
        now = ", ".join(f"model.{name} {str(ours[name]).lower()}" for name in differing)
        raise UsageError(f"init_from {base.name} is a model of other sizes than the recipe's ({now}): give {flags}")
    for name in CHOICES:
        before, now = getattr(base.tokenizer.settings, name), getattr(folder.tokenizer.settings, name)
        if before != now:
            raise UsageError(
                f"init_from {base.name} read text with {name} {before}, and {folder.path} was prepared with {now}: prepare "
                f"it with {name} {before}, or with --vocabulary and the folder of the base"
            )
    theirs_saved, ours_saved = (model and model.saved for model in (base.tokenizer.model, folder.tokenizer.model))
    if theirs_saved != ours_saved:
        raise UsageError(
            f"init_from {base.name} has other pieces of words than {folder.path}: prepare it with --vocabulary and the "
            "folder of the base"
        )


def sizes_of(settings: ModelSettings) -> dict[str, Any]:
    """Return what decides the shapes of a model's parameters, its vocabulary aside, by the names of the settings."""
    sizes = {name: getattr(settings, name) for name in MODEL_SIZES}
    return sizes | {"hidden_size": settings.layer_sizes[0]}  # of a single tied layer the setting says nothing


# --- rows by word --------------------------------------------------------------------------------------------------


@torch.no_grad()
def take_weights(model: LanguageModel, base: LanguageModel, source: Tensor, seed: int) -> None:
    """Copy the parameters of `base`, a model of the same sizes; `source` (V) has the id there of each word of `model`, or -1.

    The row of a new word is the mean of the rows of all words that are taken, plus noise by `seed`.
    """
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = word_rows(model), word_rows(base)
    parameters = dict(base.named_parameters())
    for name, value in model.named_parameters():
        before = parameters[name]
        if name in ours:
            before = by_word(value.cpu(), before, ours[name], theirs[name], source, generator)
        value.copy_(before)


def word_rows(model: LanguageModel) -> dict[str, range]:
    """Return the parameters that have a row for each of some words, by name, and the ids of these words, which come first."""
    projection, words = model.projection, range(model.vocabulary_size)
    if isinstance(projection, nn.Linear):
        return dict.fromkeys(("embedding.weight", "projection.weight", "projection.bias"), words)
    frequent, clusters = range(projection.cutoffs[0]), list(pairwise(projection.cutoffs))
    return {
        "embedding.weight": words,
        "projection.head.weight": frequent,  # and a row for each cluster
        "projection.head.bias": frequent,
        **{f"projection.tail.{number}.1.weight": range(*ends) for number, ends in enumerate(clusters)},
    }


def by_word(random: Tensor, before: Tensor, ours: range, theirs: range, source: Tensor, generator: torch.Generator) -> Tensor:
    """Return a parameter (R, ...) with the rows of `before`, the base's, for the words that both have in it.

    `ours` and `theirs` are the ids of the words in the two; `source` is as in `take_weights`. Where no word is shared, as in a
    small cluster of rare words, the words keep their `random` rows.
    """
    assert len(random) - len(ours) == len(before) - len(theirs), (random.shape, before.shape, ours, theirs)
    rows = source[ours.start : ours.stop] - theirs.start
    known = (source[ours.start : ours.stop] >= 0) & (rows >= 0) & (rows < len(theirs))
    taken = before[rows[known]]
    words = random[: len(ours)].clone()
    words[known] = taken
    if len(taken):
        noise = torch.randn(len(words) - len(taken), *words.shape[1:], generator=generator)
        words[~known] = taken.mean(0) + NOISE * taken.std(0, correction=0) * noise
    return torch.cat([words, before[len(theirs) :]])


@torch.no_grad()
def take_vectors(model: LanguageModel, path: Path, vocabulary: Vocabulary, wanted: Tensor) -> dict[str, Any]:
    """Copy the vectors of a file into the embedding, of the words in the mask `wanted` (V); return the facts."""
    found = read_vectors(path, vocabulary, model.settings.embedding_size)
    taken = torch.from_numpy(found.matches > 0) & wanted
    if not taken.any() and wanted.any():
        raise DataError(f"init.embeddings {path} has a vector of none of the {int(wanted.sum()):,} words")
    weight = model.embedding.weight
    weight[taken.to(weight.device)] = torch.from_numpy(found.rows)[taken].to(weight.device)
    spelled = torch.from_numpy(found.matches == BY_LOWERCASE) & wanted
    return {
        "vectors": str(path),
        "vectors_words": int(wanted.sum()),
        "vectors_taken": int(taken.sum()),
        "vectors_by_lowercase": int(spelled.sum()),
    }

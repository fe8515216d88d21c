"""What the models of an ensemble, or a single one with a neural cache, predict of each token of a text.

    members = measure_members(models, tokens, valid, streams, cache_size, world)    # a model in memory at a time
    nats, figures = combined(list(members))

lmdist-evaluate prints the figures. Theta and the weight of a cache are tuned here and saved with their runs, where
lmdist-export finds them. This module does not know where the text is from.

Shapes: N tokens of the text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from lmdist.cache_settings import NeuralCache, write_tuned
from lmdist.console import log
from lmdist.errors import DataError
from lmdist.model.language_model import LanguageModel
from lmdist.perplexity import perplexity
from lmdist.text.data_folder import VOCABULARY
from lmdist.text.token_files import Tokens
from lmdist.training.checkpoints.read import Checkpoint, parameters_file
from lmdist.training.checkpoints.retain import run_of
from lmdist.training.distributed import World
from lmdist.training.neural_cache import log_mean, mixed, token_log_probabilities, tune


class Member(NamedTuple):
    """A model of an ensemble, or the only one: what it predicts of each token (N)."""

    static_nats: float
    """Per token, without a cache."""
    log_probabilities: Tensor
    """With the cache, if there is one."""
    cache: NeuralCache | None


def check_same_vocabulary(checkpoints: Sequence[Checkpoint]) -> None:
    """Raise DataError unless all checkpoints have the words and ids of the first."""
    first, *others = checkpoints
    for other in others:
        if other.contents[VOCABULARY] != first.contents[VOCABULARY]:
            raise DataError(
                f"{other.path} has another vocabulary than {first.path}: the models of an ensemble need the same one"
            )


def measure_members(
    models: Iterable[tuple[Checkpoint, LanguageModel]],
    tokens: Tokens | np.ndarray,
    valid: np.ndarray | None,
    streams: int,
    cache_size: int,
    world: World,
    command: str,
) -> Iterator[Member]:
    """Yield what each model predicts of each of `tokens` (N), one model after the other.

    With a `valid` text each has a cache of `cache_size` tokens, which is tuned on it and saved.
    The models are given with the checkpoints that they are of; `command` is named in the log.
    """
    for checkpoint, model in models:
        model.to(world.device)
        if valid is None:
            static, _ = token_log_probabilities(model, tokens, streams, world.device)
            member = Member(-float(static.mean()), static, None)
        else:
            log(f"{checkpoint.path}: tuning a cache of {cache_size:,} tokens on valid", command)
            cache = tune(model, valid, streams, world.device, cache_size)
            save_tuned(checkpoint, cache, command)
            static, cached = token_log_probabilities(model, tokens, streams, world.device, cache.size, [cache.theta])
            member = Member(-float(static.mean()), mixed(static, cached[0], cache.weight), cache)
        del model  # before the next one is read
        yield member


def combined(members: Sequence[Member]) -> tuple[float, dict[str, Any]]:
    """Return nats per token of the averaged probabilities, and figures of the models and their caches."""
    nats = -float(log_mean([member.log_probabilities for member in members]).mean())
    figures: dict[str, list[Any]] = {}
    if len(members) > 1:
        figures["perplexities"] = [perplexity(-float(member.log_probabilities.mean())) for member in members]
    caches = [member.cache for member in members if member.cache]
    if caches:
        figures |= {
            "perplexity_without_cache": [perplexity(member.static_nats) for member in members],
            "cache": [cache.size for cache in caches],
            "cache_theta": [cache.theta for cache in caches],
            "cache_weight": [cache.weight for cache in caches],
        }
    return nats, {name: values if len(members) > 1 else values[0] for name, values in figures.items()}


def save_tuned(checkpoint: Checkpoint, cache: NeuralCache, command: str) -> None:
    """Write the parameters of a cache into the run of a checkpoint; log where that is not possible."""
    run, manifest = run_of(checkpoint.path), checkpoint.manifest
    if run is None:
        log(f"{checkpoint.path} is not in the folder of a run, so theta and weight are not saved", command)
        return
    try:
        write_tuned(run, manifest["files"][parameters_file(manifest)]["sha256"], cache)
    except OSError as error:
        log(f"warning: theta and weight are not saved: {error.strerror}", command)

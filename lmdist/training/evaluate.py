"""Perplexity that compares with other models': `lmdist-evaluate RUN_OR_CHECKPOINT [--split test | --file TEXT]`.

One stream with the state carried from the first token to the last, each word and each end mark predicted once: exp(total
nats / tokens). Two perplexities compare only at the same rate of unknown words, so the rate is reported as well, and as a
baseline the perplexity of the unigram model of the training text.

    lmdist-evaluate runs/a --cache 2000     tunes a neural cache on the valid split and applies it once (neural_cache.py)
    lmdist-evaluate runs/a runs/b runs/c    averages the probabilities of several models: an ensemble
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lmdist.bounds import at_least, between, check
from lmdist.console import log, shown, table
from lmdist.errors import CommandParser, DataError, UsageError, exit_on_error
from lmdist.neural_cache import MAX_SIZE, NeuralCache, write_tuned
from lmdist.perplexity import perplexity

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from lmdist.model.language_model import LanguageModel
    from lmdist.signals import StopRequest
    from lmdist.training.distributed import World
    from lmdist.training.metrics import NatsTotal

COMMAND = "lmdist-evaluate"
TUNING_TOKENS = 500_000
"""Of the valid split, at most, for the two numbers of a cache."""


def evaluate(
    model: LanguageModel, tokens: np.ndarray, streams: int, window: int, world: World, stop: StopRequest | None = None
) -> NatsTotal:
    """Return the summed nats of `tokens`, read as `streams` streams divided over the ranks; a `stop` request cuts it short."""
    import torch

    from lmdist.model.loss import IGNORED, summed_nats
    from lmdist.training.data import Streams
    from lmdist.training.metrics import NatsTotal

    was_training = model.training
    model.eval()
    nats = NatsTotal(world)
    # A rank reads entire streams. If the ranks do not divide their number, some read one more; no rank waits for another.
    part = slice(world.rank * streams // world.size, (world.rank + 1) * streams // world.size)
    batches = Streams(tokens, streams, window)
    with torch.no_grad():
        state = model.initial_state(part.stop - part.start)
        for step in range(batches.steps_per_epoch if part.stop > part.start else 0):
            if stop and stop.requested:
                break
            batch = batches.batch(step, part)
            inputs, targets = batch.tensors_on(world.device)
            hidden, state = model(inputs, state)
            nats.add(summed_nats(hidden, model.projection, targets), int((batch.targets != IGNORED).sum()))
    model.train(was_training)
    return nats


def unigram_nats(train: np.ndarray, tokens: np.ndarray, vocabulary_size: int) -> float:
    """Return nats per token of the unigram model of `train`, with add-one smoothing."""
    import numpy as np

    counts = np.bincount(train, minlength=vocabulary_size) + 1
    nats = -np.log(counts / counts.sum())
    return float(nats @ np.bincount(tokens, minlength=vocabulary_size) / len(tokens))


def parser() -> argparse.ArgumentParser:
    """Return the command line of lmdist-evaluate."""
    command = CommandParser(
        prog=COMMAND,
        description="Measure the perplexity of a trained model: one stream, the state carried on, each token counted once.",
    )
    command.add_argument(
        "checkpoints",
        nargs="+",
        type=Path,
        metavar="CHECKPOINT",
        help="a run (runs/NAME: its best checkpoint is taken) or a checkpoint; of several, probabilities are averaged",
    )
    command.add_argument("--split", choices=("train", "valid", "test"), help="a split of the data folder (default: test)")
    command.add_argument("--file", help="in place of a split: a text file, or any file that lmdist-prepare reads")
    command.add_argument("--data", type=Path, help="the data folder (default: the one the model was trained on)")
    command.add_argument(
        "--cache",
        type=int,
        default=0,
        metavar="TOKENS",
        help="add a neural cache of so many tokens (2000 is usual; default: 0, none): theta and weight are tuned on the valid "
        "split and saved with the run, where lmdist-export finds them",
    )
    command.add_argument("--streams", type=int, default=1, help="read the text as so many streams: faster, a little worse")
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where it runs (default: auto)")
    command.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    return command


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    arguments = parser().parse_args(argv)
    with exit_on_error(COMMAND):
        check("--cache", arguments.cache, between(0, MAX_SIZE, "0 is none"))
        if arguments.file and (arguments.split or (arguments.data and not arguments.cache)):
            raise UsageError("--file takes the place of --split and --data: give one or the other")
        check("--streams", arguments.streams, at_least(1))
        result = measure(arguments)
        if arguments.json:
            sys.stdout.write(json.dumps(result) + "\n")
        else:
            sys.stdout.write(table({key.replace("_", " "): printed(value) for key, value in result.items()}, width=22))


def printed(value: Any) -> str:
    """Return a figure, or several in a row, as people read it."""
    return ", ".join(map(shown, value)) if isinstance(value, list) else shown(value)


def tokens_of_file(checkpoint: Path, file: str) -> np.ndarray:
    """Return the ids of a file, (N,), tokenized as the training text was, with an end mark after each document."""
    import numpy as np

    from lmdist.text.data_folder import TEXT, VOCABULARY
    from lmdist.text.documents import Documents, find_files
    from lmdist.text.readers import ReadOptions
    from lmdist.text.tokenizer import WordTokenizer
    from lmdist.text.vocabulary import END_ID, Vocabulary

    tokenizer = WordTokenizer.load(checkpoint / TEXT)
    vocabulary = Vocabulary.load(checkpoint / VOCABULARY)
    ids: list[int] = []
    for document in Documents(find_files([file]), ReadOptions(lines=tokenizer.settings.tokenizer == "whitespace")):
        ids += vocabulary.encode(tokenizer.tokenize(document.text))
        ids.append(END_ID)
    return np.array(ids, dtype=np.uint32)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of a model, or of an ensemble, on a text."""
    import numpy as np

    from lmdist.text.vocabulary import UNKNOWN_ID
    from lmdist.training.checkpoints.read import load_model
    from lmdist.training.checkpoints.retain import find_checkpoint
    from lmdist.training.data import DataFolder
    from lmdist.training.distributed import join_job

    paths = [find_checkpoint(path) for path in arguments.checkpoints]
    model, manifest = load_model(paths[0])
    check_same_vocabulary(paths)
    world = join_job(arguments.device, global_batch=1, accumulation=1, timeout_seconds=120)
    folder = None
    if arguments.cache or not arguments.file:
        folder = DataFolder(arguments.data or Path(manifest["recipe"]["data"]["folder"]))
        folder.check_vocabulary(manifest)
    if arguments.file:
        tokens = tokens_of_file(paths[0], arguments.file)
        name = arguments.file
    else:
        assert folder
        name = arguments.split or "test"
        tokens = folder.tokens(name)
    if len(tokens) < arguments.streams:
        raise DataError(f"{name} has {len(tokens)} tokens; at least {arguments.streams} are needed")
    valid = folder.tokens("valid")[:TUNING_TOKENS] if folder and arguments.cache else None
    start_time = time.perf_counter()
    if len(paths) == 1 and not arguments.cache:
        nats = evaluate(model.to(world.device), tokens, arguments.streams, 256, world).mean()
        figures: dict[str, Any] = {}
    else:
        models = (load_model(path)[0] if number else model for number, path in enumerate(paths))
        members = list(measure_members(zip(paths, models, strict=True), tokens, valid, arguments, world))
        nats, figures = combined(members)
    seconds = time.perf_counter() - start_time
    if not math.isfinite(nats):
        raise DataError(f"{paths[0]}: the loss on {name} is {nats}, so its weights are too large for a trained model")
    result: dict[str, Any] = {
        **({"checkpoint": str(paths[0])} if len(paths) == 1 else {"checkpoints": [*map(str, paths)]}),
        "text": name,
        "perplexity": perplexity(nats),
        "nats_per_token": nats,
        **figures,
        "words": len(tokens),
        "unknown_rate": float(np.mean(tokens == UNKNOWN_ID)),
        "vocabulary": model.vocabulary_size,
        "tokens_per_second": len(paths) * (len(tokens) + (0 if valid is None else len(valid))) / seconds,
    }
    if folder and not arguments.file and folder.has("train"):
        unigram = unigram_nats(folder.tokens("train"), tokens, model.vocabulary_size)
        result["unigram_perplexity"] = perplexity(unigram)
    return result


# --- caches and ensembles ------------------------------------------------------------------------------------------


class Member(NamedTuple):
    """A model of an ensemble, or the only one: what it predicts of each token (N)."""

    static_nats: float
    """Per token, without a cache."""
    log_probabilities: Tensor
    """With the cache, if there is one."""
    cache: NeuralCache | None


def check_same_vocabulary(paths: Sequence[Path]) -> None:
    """Raise DataError unless all checkpoints have the same words with the same ids."""
    from lmdist.text.data_folder import VOCABULARY
    from lmdist.training.checkpoints.read import read_manifest

    first, *others = (read_manifest(path)["files"][VOCABULARY]["sha256"] for path in paths)
    for path, other in zip(paths[1:], others, strict=True):
        if other != first:
            raise DataError(f"{path} has another vocabulary than {paths[0]}: the models of an ensemble need the same one")


def measure_members(
    models: Iterable[tuple[Path, LanguageModel]],
    tokens: np.ndarray,
    valid: np.ndarray | None,
    arguments: argparse.Namespace,
    world: World,
) -> Iterator[Member]:
    """Yield what each model predicts of each token, a model at a time; with `valid` its cache is tuned and saved."""
    from lmdist.training.neural_cache import mixed, token_log_probabilities, tune

    for path, model in models:
        model.to(world.device)
        if valid is None:
            static, _ = token_log_probabilities(model, tokens, arguments.streams, world.device)
            yield Member(-float(static.mean()), static, None)
            continue
        log(f"{path}: tuning a cache of {arguments.cache:,} tokens on valid", COMMAND)
        cache = tune(model, valid, arguments.streams, world.device, arguments.cache)
        save_tuned(path, cache)
        static, cached = token_log_probabilities(model, tokens, arguments.streams, world.device, cache.size, [cache.theta])
        yield Member(-float(static.mean()), mixed(static, cached[0], cache.weight), cache)


def combined(members: Sequence[Member]) -> tuple[float, dict[str, Any]]:
    """Return nats per token of the averaged probabilities, and figures of the models and their caches."""
    from lmdist.training.neural_cache import log_mean

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


def save_tuned(path: Path, cache: NeuralCache) -> None:
    """Write the parameters of a cache into the run of a checkpoint; log where that is not possible."""
    from lmdist.tracking.run_folder import CHECKPOINTS
    from lmdist.training.checkpoints.read import read_manifest

    if path.resolve().parent.name != CHECKPOINTS:
        log(f"{path} is not in the folder of a run, so theta and weight are not saved", COMMAND)
        return
    try:
        write_tuned(path.resolve().parent.parent, read_manifest(path)["progress"]["step"], cache)
    except OSError as error:
        log(f"warning: theta and weight are not saved: {error.strerror}", COMMAND)


if __name__ == "__main__":
    main()

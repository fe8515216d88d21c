"""Perplexity that compares with other models': `lmdist-evaluate RUN_OR_CHECKPOINT [--split test | --file TEXT]`.

One stream with the state carried from the first token to the last, each word and each end mark predicted once: exp(total
nats / tokens), and per word and byte of the original text (perplexity.py), which compare between tokenizers too. Two
perplexities compare only at the same rate of unknown words, so the rate is reported as well, and as a baseline the perplexity
of the unigram model of the training text.

    lmdist-evaluate runs/a --cache 2000     tunes a neural cache on the valid split and applies it once (neural_cache.py)
    lmdist-evaluate runs/a runs/b runs/c    averages the probabilities of several models: an ensemble
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lmdist.bounds import between, check
from lmdist.cache_settings import MAX_SIZE
from lmdist.command_line import CommandParser, exit_on_error
from lmdist.console import log, shown, table
from lmdist.counted import counted
from lmdist.cpus import limit_threads
from lmdist.credentials import without_credentials
from lmdist.errors import DataError, MissingInputError, UsageError
from lmdist.perplexity import TextSize, per_word_and_byte, perplexity

if TYPE_CHECKING:
    import numpy as np

    from lmdist.settings import ReadSettings
    from lmdist.text.counting import FoundIds
    from lmdist.text.token_files import Tokens
    from lmdist.training.checkpoints.read import Checkpoint

COMMAND = "lmdist-evaluate"
TUNING_TOKENS = 500_000
"""Of the valid split, at most, for the two numbers of a cache."""


def parser() -> argparse.ArgumentParser:
    """Return the command line of lmdist-evaluate."""
    from lmdist.config import add_flags
    from lmdist.settings import ReadSettings

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
    command.add_argument("--file", help="in place of a split: a file as lmdist-prepare reads it, or - for stdin")
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
    add_flags(command.add_argument_group("how --file is read, as by lmdist-prepare"), ReadSettings)
    return command


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    with exit_on_error(COMMAND):
        arguments = parser().parse_args(argv)
        check("--cache", arguments.cache, between(0, MAX_SIZE, "0 is none"))
        if arguments.file is not None and (arguments.split or (arguments.data and not arguments.cache)):
            raise UsageError("--file takes the place of --split and --data: give one or the other")
        check("--streams", arguments.streams, between(1, 1_000_000))
        read_settings(arguments)  # a mistake in its flags is reported before anything is read
        limit_threads()
        from lmdist.training.distributed import full_memory_reported

        with full_memory_reported("lower --streams or --cache"):
            result, checkpoint, meta = measure(arguments)
        if arguments.json:
            sys.stdout.write(json.dumps(json_numbers(result)) + "\n")
        else:
            rows = {key.replace("_", " "): printed(value) for key, value in result.items() if key != "words"}
            sys.stdout.write(table(rows, width=22))
        sys.stdout.flush()
        if checkpoint and meta:
            add_to_run(arguments, result, checkpoint, meta)


def printed(value: Any) -> str:
    """Return a figure, or several in a row, as people read it."""
    if isinstance(value, dict):
        return ", ".join(f"{count:,} {name}" for name, count in value.items()) or "0"
    return ", ".join(map(shown, value)) if isinstance(value, list) else shown(value)


def json_numbers(value: Any) -> Any:
    """Return figures with null in place of a number that is not finite, for JSON has no such numbers."""
    if isinstance(value, dict):
        return {name: json_numbers(figure) for name, figure in value.items()}
    if isinstance(value, list):
        return [json_numbers(figure) for figure in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_settings(arguments: argparse.Namespace) -> ReadSettings:
    """Return how --file is read; raise UsageError for a flag that says so where no file is given."""
    from lmdist.settings import ReadSettings

    names = [setting.name for setting in fields(ReadSettings)]
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if given and arguments.file is None:
        raise UsageError(f"--{next(iter(given)).replace('_', '-')} says how --file is read: give --file too, or leave it out")
    return ReadSettings(**given)


def read_file(checkpoint: Checkpoint, file: str, settings: ReadSettings) -> FoundIds:
    """Return what lmdist-prepare would make of a file, with the tokenizer and the vocabulary of a checkpoint."""
    from lmdist.text.counting import find_ids
    from lmdist.text.documents import Documents
    from lmdist.text.finding import find_files
    from lmdist.text.sources import ReadOptions

    documents = Documents(find_files([file]), ReadOptions.of(settings, checkpoint.tokenizer.settings))
    documents.check()
    found = find_ids(documents, checkpoint.tokenizer, checkpoint.vocabulary)
    documents.check_losses()
    for note in documents.notes:
        log(f"note: {note}", COMMAND)
    return found


class Texts(NamedTuple):
    """The text that is measured, and what belongs to it."""

    name: str
    tokens: Tokens | np.ndarray
    """(N)"""
    valid: np.ndarray | None
    """What a cache is tuned on, if there is to be one."""
    train: Tokens | None
    """What a unigram model is counted from, if the text is a split beside it."""
    figures: dict[str, Any]
    """What else there is to say of a file."""
    meta: dict[str, Any] | None
    """The meta.json of the data folder that the text is a split of."""
    size: TextSize | None
    """Of the original text, where it was counted."""


def read_texts(arguments: argparse.Namespace, checkpoint: Checkpoint) -> Texts:
    """Return the texts that the command line names, as ids of the checkpoint's vocabulary."""
    from lmdist.training.data import folder_of_model

    of_file = None
    if arguments.file is not None:
        found = read_file(checkpoint, arguments.file, read_settings(arguments))
        figures = {"documents": found.documents, "skipped": found.skipped}
        of_file = Texts(without_credentials(arguments.file), found.tokens, None, None, figures, None, found.size)
        if not arguments.cache:
            return of_file
    folder = folder_of_model(checkpoint.manifest, arguments.data, "" if arguments.cache else ", or a text by --file")
    if arguments.cache and not folder.has("valid"):
        raise UsageError(f"--cache is tuned on the valid split, and {folder.path} has none: name a folder with one by --data")
    valid = folder.tokens("valid")[:TUNING_TOKENS] if arguments.cache else None
    if of_file:
        return of_file._replace(valid=valid)
    name = arguments.split or "test"
    if not folder.has(name):
        raise MissingInputError(
            f"{folder.path} has no {name} split: give --split {' or '.join(folder.meta['splits'])}, or --file"
        )
    if arguments.cache and name == "valid":
        log("warning: valid is the split that the cache is tuned on; --split test gives a figure to report", COMMAND)
    train = folder.tokens("train") if folder.has("train") else None
    return Texts(name, folder.tokens(name), valid, train, {}, folder.meta, folder.text_size(name))


def measure(arguments: argparse.Namespace) -> tuple[dict[str, Any], Checkpoint | None, dict[str, Any] | None]:
    """Return the figures of a model, or of an ensemble, on a text; the checkpoint, of one model; and `Texts.meta`."""
    from lmdist.model.precision import set_fp32
    from lmdist.training.checkpoints.read import check_numbers, open_checkpoint, parameters_file
    from lmdist.training.checkpoints.retain import find_checkpoint
    from lmdist.training.distributed import World, choose_device
    from lmdist.training.ensemble import check_same_vocabulary, combined, measure_members
    from lmdist.training.measuring import evaluate
    from lmdist.training.neural_cache import WINDOW

    checkpoints = [open_checkpoint(find_checkpoint(path)) for path in arguments.checkpoints]
    check_same_vocabulary(checkpoints)
    world = World(0, 1, choose_device(arguments.device))  # whatever WORLD_SIZE says, as in the pod of a training job
    set_fp32("ieee")  # the same figure on every device
    for checkpoint in checkpoints:
        check_numbers(checkpoint.files, parameters_file(checkpoint.manifest))  # before a long text is read
    texts = read_texts(arguments, checkpoints[0])
    for name, tokens in ((texts.name, texts.tokens), ("valid", texts.valid)):
        if tokens is not None and len(tokens) < arguments.streams:
            raise DataError(f"{name} has {counted(len(tokens), 'token')}; at least {arguments.streams} are needed")
    if len(checkpoints) == 1 and texts.valid is None:
        model = checkpoints[0].model().to(world.device)
        start_time = time.perf_counter()
        nats, figures = evaluate(model, texts.tokens, arguments.streams, WINDOW, world).mean(), {}
    else:
        start_time = time.perf_counter()
        models = ((checkpoint, checkpoint.model()) for checkpoint in checkpoints)  # one in memory at a time
        how = arguments.streams, arguments.cache, world, COMMAND
        nats, figures = combined(list(measure_members(models, texts.tokens, texts.valid, *how)))
    seconds = time.perf_counter() - start_time
    if not math.isfinite(nats):
        raise DataError(
            f"{checkpoints[0].path}: the loss on {texts.name} is {nats}, so its weights are too large for a trained model"
        )
    paths = [checkpoint.path for checkpoint in checkpoints]
    result = result_of(paths, texts, nats, figures, checkpoints[0].manifest["vocabulary_size"], seconds)
    return result, checkpoints[0] if len(checkpoints) == 1 else None, texts.meta


def result_of(
    paths: Sequence[Path], texts: Texts, nats: float, figures: dict[str, Any], vocabulary_size: int, seconds: float
) -> dict[str, Any]:
    """Return all that is printed: of the models at `paths`, which have `nats` per token and the `figures` of `combined`."""
    from lmdist.text.vocabulary import UNKNOWN_ID
    from lmdist.training.measuring import counts_of, unigram_nats

    num_unknown = counts_of(texts.tokens, vocabulary_size)[UNKNOWN_ID]
    num_read = len(texts.tokens) + (0 if texts.valid is None else len(texts.valid))
    result: dict[str, Any] = {
        **({"checkpoint": str(paths[0])} if len(paths) == 1 else {"checkpoints": [*map(str, paths)]}),
        "text": texts.name,
        "perplexity": perplexity(nats),
        "nats_per_token": nats,
        **per_word_and_byte(nats * len(texts.tokens), texts.size),
        **figures,
        **texts.figures,
        "tokens": len(texts.tokens),
        "words": len(texts.tokens),  # the former name of the tokens, which may be pieces of words
        **(texts.size.as_figures() if texts.size else {}),
        "unknown_rate": float(num_unknown / len(texts.tokens)),
        "vocabulary": vocabulary_size,
        "tokens_per_second": len(paths) * num_read / seconds,
    }
    if texts.train is not None:
        result["unigram_perplexity"] = perplexity(unigram_nats(texts.train, texts.tokens, vocabulary_size))
    return result


def add_to_run(arguments: argparse.Namespace, result: dict[str, Any], checkpoint: Checkpoint, meta: dict[str, Any]) -> None:
    """Add the figures of one model on the test split of its own data to its run, and so to MLflow; `meta` is of the data."""
    from lmdist.tracking.figures import add_figures
    from lmdist.training.checkpoints.retain import run_of

    manifest = checkpoint.manifest
    if result["text"] == "test" and (run := run_of(checkpoint.path)) and meta["files"] == manifest["data"]["files"]:
        static = result.get("perplexity_without_cache", result["perplexity"])
        cached = {"perplexity_with_cache": result["perplexity"]} if "cache" in result else {}
        size = TextSize.read(meta["splits"]["test"])
        # A figure of many streams is a little worse than the exact one of a single stream: the row says which it is.
        figures = {"perplexity": static, "unknown_rate": result["unknown_rate"], "streams": arguments.streams, **cached}
        figures |= per_word_and_byte(math.log(static) * result["tokens"], size)
        add_figures(run, manifest["progress"]["step"], figures, COMMAND)


if __name__ == "__main__":
    main()

"""Perplexity that compares with other models': `lmdist-evaluate RUN_OR_CHECKPOINT [--split test | --file TEXT]`.

One stream with the state carried from the first token to the last, each word and each end mark predicted once: exp(total
nats / tokens). Two perplexities compare only at the same rate of unknown words, so the rate is reported as well, and as a
baseline the perplexity of the unigram model of the training text.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdist.bounds import at_least, check
from lmdist.console import shown, table
from lmdist.errors import CommandParser, DataError, UsageError, exit_on_error

if TYPE_CHECKING:
    import numpy as np

    from lmdist.model.language_model import LanguageModel
    from lmdist.signals import StopRequest
    from lmdist.training.distributed import World
    from lmdist.training.metrics import NatsTotal

COMMAND = "lmdist-evaluate"


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
    command.add_argument("checkpoint", type=Path, help="a run (runs/NAME: its best checkpoint is taken) or a checkpoint")
    command.add_argument("--split", choices=("train", "valid", "test"), help="a split of the data folder (default: test)")
    command.add_argument("--file", help="in place of a split: a text file, or any file that lmdist-prepare reads")
    command.add_argument("--data", type=Path, help="the data folder (default: the one the model was trained on)")
    command.add_argument("--streams", type=int, default=1, help="read the text as so many streams: faster, a little worse")
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where it runs (default: auto)")
    command.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    return command


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    arguments = parser().parse_args(argv)
    with exit_on_error(COMMAND):
        if arguments.file and (arguments.split or arguments.data):
            raise UsageError("--file takes the place of --split and --data: give one or the other")
        check("--streams", arguments.streams, at_least(1))
        result = measure(arguments)
        if arguments.json:
            sys.stdout.write(json.dumps(result) + "\n")
        else:
            sys.stdout.write(table({key.replace("_", " "): shown(value) for key, value in result.items()}, width=22))


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
    """Return the figures of a model on a text."""
    import numpy as np

    from lmdist.perplexity import perplexity
    from lmdist.text.vocabulary import UNKNOWN_ID
    from lmdist.training.checkpoints.read import load_model
    from lmdist.training.checkpoints.retain import find_checkpoint
    from lmdist.training.data import DataFolder
    from lmdist.training.distributed import join_job

    path = find_checkpoint(arguments.checkpoint)
    model, manifest = load_model(path)
    world = join_job(arguments.device, global_batch=1, accumulation=1, timeout_seconds=120)
    model.to(world.device)
    folder = None
    if arguments.file:
        tokens = tokens_of_file(path, arguments.file)
        name = arguments.file
    else:
        folder = DataFolder(arguments.data or Path(manifest["recipe"]["data"]["folder"]))
        folder.check_vocabulary(manifest)
        name = arguments.split or "test"
        tokens = folder.tokens(name)
    if len(tokens) < arguments.streams:
        raise DataError(f"{name} has {len(tokens)} tokens; at least {arguments.streams} are needed")
    start_time = time.perf_counter()
    nats = evaluate(model, tokens, arguments.streams, 256, world).mean()
    seconds = time.perf_counter() - start_time
    if not math.isfinite(nats):
        raise DataError(f"{path}: the loss on {name} is {nats}, so its weights are too large for a trained model")
    result: dict[str, Any] = {
        "checkpoint": str(path),
        "text": name,
        "perplexity": perplexity(nats),
        "nats_per_token": nats,
        "words": len(tokens),
        "unknown_rate": float(np.mean(tokens == UNKNOWN_ID)),
        "vocabulary": model.vocabulary_size,
        "tokens_per_second": len(tokens) / seconds,
    }
    if folder and folder.has("train"):
        unigram = unigram_nats(folder.tokens("train"), tokens, model.vocabulary_size)
        result["unigram_perplexity"] = perplexity(unigram)
    return result


if __name__ == "__main__":
    main()

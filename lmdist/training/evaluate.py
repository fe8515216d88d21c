"""Perplexity that anyone can compare: `lmdist-evaluate RUN_OR_CHECKPOINT [--split test | --file TEXT]`.

One stream with the state carried from the first word to the last, every word and every end mark predicted once, exp(total
nats / words). Beside it stands the rate of unknown words, without which no two perplexities compare, and the unigram model
of the same training text, which knows how often words come and nothing else.
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

from lmdist.errors import CommandParser, DataError, UsageError, exit_on_error

if TYPE_CHECKING:
    import numpy as np

    from lmdist.model.language_model import LanguageModel
    from lmdist.signals import StopRequest
    from lmdist.training.distributed import World
    from lmdist.training.metrics import Nats


def evaluate(
    model: LanguageModel, tokens: np.ndarray, streams: int, window: int, world: World, stop: StopRequest | None = None
) -> Nats:
    """Summed nats of `tokens` read as `streams` streams side by side, shared out over the ranks; a `stop` cuts it short."""
    import torch

    from lmdist.model.loss import IGNORED, summed_nats
    from lmdist.training.data import Streams
    from lmdist.training.metrics import Nats

    was_training = model.training
    model.eval()
    nats = Nats(world)
    # Ranks take whole streams; where they do not divide evenly some take one more, and no rank waits for another.
    rows = slice(world.rank * streams // world.size, (world.rank + 1) * streams // world.size)
    batches = Streams(tokens, streams, window)
    with torch.no_grad():
        state = model.initial_state(rows.stop - rows.start)
        for step in range(batches.steps_per_epoch if rows.stop > rows.start else 0):
            if stop and stop.requested:
                break
            batch = batches.batch(step, rows)
            inputs, targets = batch.words(world.device)
            hidden, state = model(inputs, state)
            nats.add(summed_nats(hidden, model.projection, targets), int((batch.targets != IGNORED).sum()))
    model.train(was_training)
    return nats


def unigram_nats(train: np.ndarray, tokens: np.ndarray, vocabulary_size: int) -> float:
    """Nats a word of the model that draws each word as often as it stands in `train`, one added to each count."""
    import numpy as np

    counts = np.bincount(train, minlength=vocabulary_size) + 1
    nats = -np.log(counts / counts.sum())
    return float(nats @ np.bincount(tokens, minlength=vocabulary_size) / len(tokens))


def parser() -> argparse.ArgumentParser:
    """The command line of lmdist-evaluate."""
    made = CommandParser(
        prog="lmdist-evaluate",
        description="Measure the perplexity of a trained model: one stream, the state carried on, every word counted once.",
    )
    made.add_argument("checkpoint", type=Path, help="a run (runs/NAME: its best checkpoint is taken) or a checkpoint")
    made.add_argument("--split", choices=("train", "valid", "test"), help="a split of the data folder (default: test)")
    made.add_argument("--file", help="in place of a split: a text file, or any file that lmdist-prepare reads")
    made.add_argument("--data", type=Path, help="the data folder (default: the one the model was trained on)")
    made.add_argument("--streams", type=int, default=1, help="cut the text into so many streams: faster, a little worse")
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where it runs (default: auto)")
    made.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    arguments = parser().parse_args(argv)
    with exit_on_error("lmdist-evaluate"):
        if arguments.file and (arguments.split or arguments.data):
            raise UsageError("--file takes the place of --split and --data: give one or the other")
        if arguments.streams < 1:
            raise UsageError(f"--streams is {arguments.streams}; it must be at least 1")
        result = measure(arguments)
        if arguments.json:
            sys.stdout.write(json.dumps(result) + "\n")
        else:
            sys.stdout.write("".join(f"{key.replace('_', ' '):<22}{shown(value)}\n" for key, value in result.items()))


def shown(value: Any) -> str:
    """A figure as people read it."""
    if isinstance(value, float):
        return f"{value:,.4f}" if abs(value) < 10 else f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def tokens_of_file(checkpoint: Path, file: str) -> np.ndarray:
    """The ids of a file's words, found as the model's training text was cut into words; an end mark after each document."""
    import numpy as np

    from lmdist.text.documents import Documents, find_files
    from lmdist.text.readers import ReadOptions
    from lmdist.text.tokenizer import WordTokenizer
    from lmdist.text.vocabulary import END_ID, Vocabulary

    tokenizer = WordTokenizer.load(checkpoint / "text.json")
    vocabulary = Vocabulary.load(checkpoint / "vocab.txt")
    ids: list[int] = []
    for document in Documents(find_files([file]), ReadOptions(lines=tokenizer.settings.tokenizer == "whitespace")):
        ids += vocabulary.encode(tokenizer.tokenize(document.text))
        ids.append(END_ID)
    return np.array(ids, dtype=np.uint32)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of a model on a text."""
    import numpy as np

    from lmdist.perplexity import perplexity
    from lmdist.text.vocabulary import UNKNOWN_ID
    from lmdist.training import checkpoint
    from lmdist.training.data import Folder
    from lmdist.training.distributed import start

    path = checkpoint.find(arguments.checkpoint)
    model, manifest = checkpoint.load_model(path)
    world = start(arguments.device, global_batch=1, accumulation=1, timeout_seconds=120)
    model.to(world.device)
    folder = None
    if arguments.file:
        tokens = tokens_of_file(path, arguments.file)
        name = arguments.file
    else:
        folder = Folder(arguments.data or Path(manifest["recipe"]["data"]["folder"]))
        folder.check_vocabulary(manifest)
        name = arguments.split or "test"
        tokens = folder.tokens(name)
    if len(tokens) < arguments.streams:
        raise DataError(f"{name} has {len(tokens)} words; at least {arguments.streams} are needed")
    began = time.perf_counter()
    nats = evaluate(model, tokens, arguments.streams, 256, world).mean()
    seconds = time.perf_counter() - began
    if not math.isfinite(nats):
        raise DataError(f"{path}: the loss on {name} is {nats}, so its weights are too large to be of a trained model")
    result: dict[str, Any] = {
        "checkpoint": str(path),
        "text": name,
        "perplexity": perplexity(nats),
        "nats_a_word": nats,
        "words": len(tokens),
        "unknown_rate": float(np.mean(tokens == UNKNOWN_ID)),
        "vocabulary": model.vocabulary_size,
        "words_a_second": len(tokens) / seconds,
    }
    if folder and folder.has("train"):
        unigram = unigram_nats(folder.tokens("train"), tokens, model.vocabulary_size)
        result["unigram_perplexity"] = perplexity(unigram)
    return result


if __name__ == "__main__":
    main()

"""How long a checkpoint stops the training: written while the ranks wait, against copied and written in the background.

    python benchmarks/checkpointing.py [--quick] [--json benchmarks/results/checkpointing-MACHINE-DATE.json]

Each round saves either way, the second in the middle of training steps, which shows what the writing thread takes from them
and, since it has a lower priority, what they take from it. The pause is what the ranks wait for; AdamW keeps two more numbers
per parameter, so a checkpoint has 12 bytes per parameter.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from corpora import write_data_folder
from lmdist import config
from lmdist.model.language_model import LanguageModel
from lmdist.model.loss import summed_nats
from lmdist.settings import ModelSettings, Recipe
from lmdist.training.checkpoints.format import Progress
from lmdist.training.checkpoints.retain import remove_old
from lmdist.training.checkpoints.write import Saver, Snapshot, take_snapshot, write_checkpoint
from lmdist.training.data import DataFolder
from origin import add_json_option, collect_rows, command_line

CASES = {
    "demo, 128-256-128 tied, V 10k": (ModelSettings(), 10_000),
    "2x1024, V 33k": (ModelSettings(embedding_size=1024, hidden_size=1024, tied=False), 33_278),
}


def main() -> None:
    """Measure each case, print a table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="3 rounds of the small case")
    add_json_option(parser)
    arguments = parser.parse_args()
    cases = dict(list(CASES.items())[:1]) if arguments.quick else CASES
    rounds = 3 if arguments.quick else arguments.rounds
    command = command_line(parser, arguments)
    with collect_rows(arguments.json, ("lmdist", "torch", "safetensors"), command) as rows:
        for case, (settings, vocabulary_size) in cases.items():
            with tempfile.TemporaryDirectory() as scratch:
                rows += measure(case, settings, vocabulary_size, Path(scratch), rounds)
    for row in rows:
        print(f"{row['case']:<32}{row['variant']:<44}{row['value']:>9.1f} {row['unit']} {row['ratio']:>8.2f}")


def measure(case: str, settings: ModelSettings, vocabulary_size: int, scratch: Path, rounds: int) -> list[dict[str, Any]]:
    """Return the rows of one size of model."""
    data = DataFolder(write_data_folder(scratch / "data", {"train": np.zeros(1)}, vocabulary_size))
    model = LanguageModel(settings, vocabulary_size)
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(vocabulary_size, (20, 35))
    state = model.initial_state(20)

    def step() -> None:
        hidden, _ = model(tokens, state)
        (summed_nats(hidden, model.projection, tokens) / tokens.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()

    def snapshot(number: int) -> Snapshot:
        return take_snapshot(Progress(number), model, optimizer, state)

    def steps_until_written() -> Iterator[float]:
        while saver.thread and saver.thread.is_alive():
            yield seconds(step)

    step()
    recipe = config.as_dict(Recipe(model=settings))
    saver = Saver(scratch / "background", recipe, data, keep=2)
    pauses: dict[str, list[float]] = {"written while the ranks wait": [], "copied, written in the background": []}
    alone: list[float] = []
    beside: list[float] = []
    lasted: list[float] = []
    for number in range(rounds):
        pauses["written while the ranks wait"].append(
            seconds(lambda number=number: write_checkpoint(scratch / "waiting", snapshot(number), recipe, data))
        )
        alone += [seconds(step) for _ in range(3)]
        pauses["copied, written in the background"].append(seconds(lambda number=number: saver.save(snapshot(number))))
        lasted.append(seconds(lambda: beside.extend(steps_until_written())))
        remove_old(scratch / "waiting", 1)
    size = sum(parameter.numel() for parameter in model.parameters()) * 12 / 2**20
    rows = [
        row(f"{case}: pause", variant, values, pauses["written while the ranks wait"]) for variant, values in pauses.items()
    ]
    rows += [
        row(f"{case}: a step", variant, values, alone)
        for variant, values in {"nothing being written": alone, "beside the writing": beside}.items()
    ]
    rows.append(row(f"{case}: on the disk", "steps beside it", lasted, pauses["written while the ranks wait"]))
    return [{**result, "checkpoint_mib": round(size, 1)} for result in rows]


def row(case: str, variant: str, values: list[float], baseline: list[float]) -> dict[str, Any]:
    """Return a row of the table: medians, in milliseconds."""
    return {
        "case": case,
        "variant": "baseline: " + variant if values is baseline else variant,
        "value": round(1000 * statistics.median(values), 2),
        "unit": "ms",
        "spread": round(1000 * (max(values) - min(values)), 2),
        "ratio": round(statistics.median(baseline) / statistics.median(values), 3),
    }


def seconds(action: Callable[[], object]) -> float:
    """Return the seconds an action takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()

"""What each part of a recipe is worth: the recipe without it, trained for the same time.

    python benchmarks/ablations.py launch/ptb.toml variants.toml --data ../data/ptb --minutes 10 --json
    python benchmarks/ablations.py --quick           # a generated text, two variants, some seconds each: does it run?

variants.toml has a table of settings for each variant; the names of the tables are those in the printed table:

    ["no dropout of the embedding"]
    "model.dropout_embedding" = 0.0

    ["cosine in place of one-cycle"]
    "schedule.name" = "cosine"

The number of steps of each is set by the speed of a short trial so that it takes --minutes, so a part that slows a step down
has to earn it. All run in turns, the trials too, as in quality.py, and only running time counts. The recipe itself runs
with three seeds; its row is their mean, and its spread, the distance between the best and the worst, says which differences
mean something. The value is the best perplexity on valid; the test is not touched. The ratio is the recipe's perplexity
divided by the variant's: below 1 the part helps.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import tomllib
from pathlib import Path
from statistics import mean
from typing import Any

from origin import Row, add_json_option, collect_rows, command_line
from quality import PACKAGES, QUIET, System, all_in_turns, data_folder, steps_within, text_facts, training, trials_in_turns

BASE = "baseline"
QUICK_VARIANTS = {"no dropout": {"model.dropout": 0.0}, "half the rate": {"optimizer.learning_rate": 0.0035}}


def main() -> None:
    """Train all variants, print a table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", type=Path, help="a recipe of launch/, or your own")
    parser.add_argument("variants", nargs="?", type=Path, help="a TOML file with a table of settings for each variant")
    parser.add_argument("--data", type=Path, help="a data folder, or a folder with texts (default: the recipe's data folder)")
    parser.add_argument("--minutes", type=float, default=10.0, help="of each variant, about (default: 10)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of the recipe itself (default: 3)")
    parser.add_argument("--nproc", type=int, default=1, help="ranks (default: 1)")
    parser.add_argument("--turn", type=float, default=30.0, help="seconds of a turn (default: 30)")
    parser.add_argument("--quick", action="store_true", help="a small generated text, two seeds, two variants")
    add_json_option(parser)
    arguments = parser.parse_args()
    command = command_line(parser, arguments)
    if arguments.quick:
        arguments.minutes, arguments.seeds, arguments.turn = 0.1, 2, 4.0
    elif not (arguments.recipe and arguments.variants):
        parser.error("a recipe and a file of variants are missing")
    variants = tomllib.loads(arguments.variants.read_text(encoding="utf-8")) if arguments.variants else QUICK_VARIANTS
    name = arguments.recipe.stem if arguments.recipe else "generated"
    with (
        collect_rows(arguments.json, PACKAGES, command, suffix=f"-{name}") as rows,
        tempfile.TemporaryDirectory(prefix="ablations-") as scratch,
    ):
        measure(name, variants, arguments, Path(scratch), rows)
    for row in rows:
        spread = f" +- {row['spread'] / 2:.2f}" if row["spread"] is not None else ""
        print(f"{row['variant']:<44}{row['value']:>9.2f}{spread:<9} ratio {row['ratio']:.3f}   {row['steps']:,} steps")


def measure(
    name: str, variants: dict[str, dict[str, Any]], arguments: argparse.Namespace, scratch: Path, rows: list[Row]
) -> None:
    """Append a row for the recipe and one for each variant; if stopped, those of the variants that have ended."""
    data = data_folder(arguments, scratch)
    launch = [sys.executable, "-m", "lmdist.job.launcher", f"--nproc-per-node={arguments.nproc}", f"--data.folder={data}"]
    launch += [*QUIET, *([f"--config={arguments.recipe}"] if arguments.recipe else [])]
    commands = {
        variant: [*launch, *(f"--{setting}={value}" for setting, value in changes.items())]
        for variant, changes in {BASE: {}, **variants}.items()
    }
    seconds = trials_in_turns(commands, scratch, quick=arguments.quick)
    steps = {variant: steps_within(arguments.minutes, value) for variant, value in seconds.items()}
    systems = [
        training(variant, [*command, f"--seed={seed}", f"--training.steps={steps[variant]}"], scratch / f"run {number} {seed}")
        for number, (variant, command) in enumerate(commands.items())
        for seed in range(1, arguments.seeds + 1 if variant == BASE else 2)
    ]
    try:
        all_in_turns(systems, arguments.turn)
    finally:
        done = [system for system in systems if system.ended and system.curve()]
        rows += ablation_rows(f"{name} valid", done, steps, text_facts(data, "valid"))


def ablation_rows(case: str, systems: list[System], steps: dict[str, int], facts: dict[str, Any]) -> list[Row]:
    """Return a row for each variant that has ended: the best perplexity, the mean of it where there are several seeds."""
    best: dict[str, list[float]] = {}
    minutes: dict[str, list[float]] = {}
    for system in systems:
        best.setdefault(system.name, []).append(min(value for _, value in system.curve()))
        minutes.setdefault(system.name, []).append(system.minutes)
    base = mean(best[BASE]) if BASE in best else None
    return [
        {
            "case": case,
            "variant": variant,
            "value": round(mean(values), 3),
            "unit": "perplexity",
            "spread": round(max(values) - min(values), 3) if len(values) > 1 else None,
            "ratio": round(base / mean(values), 4) if base else None,
            "peak_mib": max(system.peak_mib for system in systems if system.name == variant),
            "minutes": round(mean(minutes[variant]), 2),
            "steps": steps[variant],
            "seeds": len(values),
            **facts,
        }
        for variant, values in best.items()
    ]


if __name__ == "__main__":
    main()

"""Words against pieces of words: the same text and the same settings, trained for the same time.

    python benchmarks/pieces.py ../data/bbc-news --minutes 5 --json
    python benchmarks/pieces.py --quick              # generated texts, tiny models, some seconds each: does it run?

A folder with files for train, valid and test is prepared once with words, as lmdist-prepare does by default, and once with each
kind and number of pieces in PIECES, learned from its train file. The model and all else are lmdist's defaults, or those of
--recipe; one seed. The number of steps of each is set by the speed of a short trial so that it takes --minutes. The trials run
in turns, and so do the trainings, --turn seconds each, on one core of the machine: whatever else the machine does slows all of
them down alike. Only the time that a training runs counts.

The value is the perplexity per word of the original text, on test, of the checkpoint with the best validation: one stream, the
state carried on, each end of a document a word. Perplexities per token do not compare. Words that the model does not know are
<unk>, which is easy to predict and tells no reader what stands there: their rate stands beside it. The ratio is that of words
divided by it; the bundle is that of lmdist-export in fp32.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from finetuning import TINY, generated, last_training, launch
from lmdist.perplexity import TextSize
from lmdist.storage.reading import read_json
from origin import Row, add_json_option, collect_rows, command_line
from quality import (
    PACKAGES,
    QUIET,
    System,
    all_in_turns,
    run,
    split_files,
    steps_within,
    training,
    trials_in_turns,
)

WORDS = "baseline"
PIECES = {"bpe": (8_000, 16_000), "unigram": (8_000,)}
QUICK_PIECES = {"unigram": (300,)}
QUICK_MINUTES, QUICK_TURN = 0.04, 4.0


def main() -> None:
    """Measure, print a table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", type=Path, help="a folder with files for train, valid and test")
    parser.add_argument("--recipe", help="a recipe for the trainings (default: none, lmdist's defaults)")
    parser.add_argument("--minutes", type=float, default=5.0, help="of each training, about (default: 5)")
    parser.add_argument("--turn", type=float, default=30.0, help="seconds of a turn (default: 30)")
    parser.add_argument("--quick", action="store_true", help="generated texts, tiny models, few pieces")
    add_json_option(parser)
    arguments = parser.parse_args()
    command = command_line(parser, arguments)
    if arguments.quick:
        arguments.minutes, arguments.turn = QUICK_MINUTES, QUICK_TURN
    elif not arguments.text:
        parser.error("a folder with files for train, valid and test is missing, such as ../data/bbc-news")
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # and all that it starts
    with (
        collect_rows(arguments.json, PACKAGES, command) as rows,
        tempfile.TemporaryDirectory(prefix="pieces-") as scratch,
    ):
        measure(arguments, Path(scratch), rows)
    for row in rows:
        print(
            f"{row['case']:<16}{row['variant']:<16}{row['value']:>9,.1f} a word  {row['bits_per_byte']:.3f} bits a byte  "
            f"unknown {row['unknown_rate']:.2%}  {row['tokens_per_word']:.2f} tokens a word  "
            f"{row['bundle_bytes'] / 1e6:.1f} MB  {row['steps']:,} steps in {row['minutes']:.1f} minutes"
        )


def measure(arguments: argparse.Namespace, scratch: Path, rows: list[Row]) -> None:
    """Append a row for words and one for each kind and number of pieces."""
    text = generated(scratch / "text", "abcdef", 60) if arguments.quick else arguments.text
    folders = prepared(text, QUICK_PIECES if arguments.quick else PIECES, scratch)
    common = [*QUIET, "--training.device=cpu", *([f"--config={arguments.recipe}"] if arguments.recipe else [])]
    common += TINY if arguments.quick else []
    commands = {name: launch([*common, f"--data.folder={data}"]) for name, data in folders.items()}

    seconds = trials_in_turns(commands, scratch, quick=arguments.quick)

    def system(name: str) -> System:
        steps = steps_within(arguments.minutes, seconds[name])
        print(f"{name}: {seconds[name]:.3f} s a step, {steps:,} steps", file=sys.stderr)
        return training(name, [*commands[name], f"--training.steps={steps}"], scratch / f"run of {name}")

    systems = [system(name) for name in commands]
    all_in_turns(systems, arguments.turn)
    for ended in systems:
        rows.append(row_of(f"{text.name} test", ended, folders[ended.name]))
        rows[-1]["ratio"] = round(rows[0]["value"] / rows[-1]["value"], 4)


def prepared(text: Path, pieces: dict[str, tuple[int, ...]], scratch: Path) -> dict[str, Path]:
    """Return the data folders by what their tokens are: words first."""
    splits = [f"--{split}={path}" for split, path in split_files(text).items()]
    variants: dict[str, list[str]] = {WORDS: []}
    for kind, sizes in pieces.items():
        variants |= {f"{size:,} {kind}": [f"--tokenizer={kind}", f"--vocabulary-size={size}"] for size in sizes}
    folders = {name: scratch / f"data of {name}" for name in variants}
    for name, flags in variants.items():
        run([sys.executable, "-m", "lmdist.text.prepare", *splits, *flags, "-o", str(folders[name])])
    return folders


def row_of(case: str, system: System, data: Path) -> Row:
    """Return the row of a training that has ended: its test figures, and the size of its bundle."""
    folder = system.metrics.parent
    evaluate = [sys.executable, "-m", "lmdist.training.evaluate", str(folder), "--split=test", "--json"]
    found: dict[str, Any] = json.loads(run(evaluate))
    meta = read_json(data / "meta.json")
    size = TextSize.read(meta["splits"]["test"])
    assert size is not None
    return {
        "case": case,
        "variant": system.name,
        "value": round(found["perplexity_per_word"], 3),
        "unit": "perplexity per word",
        "spread": None,
        "ratio": None,
        "peak_mib": system.peak_mib,
        "minutes": round(system.minutes, 2),
        "perplexity": round(found["perplexity"], 3),
        "bits_per_byte": round(found["bits_per_byte"], 4),
        "unknown_rate": round(found["unknown_rate"], 5),
        "tokens_per_word": round(found["words"] / size.words, 4),
        "vocabulary": meta["vocabulary_size"],
        "bundle_bytes": bundle_bytes(folder, data.with_name(f"bundle of {system.name}")),
        **last_training(folder),
    }


def bundle_bytes(run_folder: Path, bundle: Path) -> int:
    """Return the size of the bundle that a run is exported to."""
    run([sys.executable, "-m", "lmdist_export.export", str(run_folder), "-o", str(bundle), "--data=none"])
    return sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file())


if __name__ == "__main__":
    main()

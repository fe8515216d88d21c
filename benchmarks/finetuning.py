"""Fine-tuning on a small text against training from scratch on it, and what the model forgets.

    python benchmarks/finetuning.py ../data/bbc-news --minutes 2 --json        # the base: the demo, trained first
    python benchmarks/finetuning.py ../data/news-sample --base runs/bbc        # or a run that exists
    python benchmarks/finetuning.py --quick                                    # generated texts, a tiny model: does it run?

The small text is the first --words of the train file of a folder with files for train, valid and test. It is prepared three
times: with the base's words (`--vocabulary`), with its new words behind them (`--extend`), and with words of its own. On each
of the three the same model is trained from scratch and from the base (`init_from`), so within a case the tokens, the unknown
words and the work of a step are the same; between cases they are not, and no perplexities compare.

At equal time both take the number of steps that takes --minutes, by the speed of a short trial. At convergence both have the
schedule `plateau` and end when --patience validations in a row are not better. Each has a learning rate of its own: --rate for
the base's weights, the recipe's from scratch. The value is the test perplexity of the checkpoint with the best validation; the
ratio is that of scratch divided by it.

Forgetting: the perplexity on the base's own test text, of the base and of the model that was trained on with its words.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lmdist.settings import MODEL_SIZES, SPLITS
from lmdist.storage.reading import read_json
from lmdist.tracking.run_folder import METRICS, read_metrics
from origin import Row, add_json_option, collect_rows, command_line
from quality import PACKAGES, QUIET, run, split_files, text_facts, trial_seconds

SCRATCH, TUNED = "baseline", "fine-tuned"
TINY = ["--model.embedding_size=16", "--model.hidden_size=24", "--data.global_batch=8", "--training.log_every=5"]
QUICK_STEPS = 40
MOST_EPOCHS = 60
"""Of a training to convergence, which patience ends before."""


class Folders(NamedTuple):
    """The small text in a vocabulary, and the flags that its models have in common."""

    case: str
    data: Path
    flags: list[str]


def main() -> None:
    """Measure, print a table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", type=Path, help="a folder with files for train, valid and test")
    parser.add_argument("--base", type=Path, help="the run to start from (default: the recipe demo is trained)")
    parser.add_argument("--words", type=int, default=100_000, help="of the train file, the first ones (default: 100,000)")
    parser.add_argument("--minutes", type=float, default=2.0, help="of a training at equal time, about (default: 2)")
    parser.add_argument("--rate", type=float, default=0.002, help="learning rate from the base's weights (default: 0.002)")
    parser.add_argument("--patience", type=int, default=4, help="validations at convergence (default: 4)")
    parser.add_argument("--set", action="append", default=[], metavar="SETTING", help="such as model.dropout=0.4; repeatable")
    parser.add_argument("--quick", action="store_true", help="generated texts, a tiny model, few steps")
    add_json_option(parser)
    arguments = parser.parse_args()
    if not (arguments.quick or arguments.text):
        parser.error("a folder with files for train, valid and test is missing, such as ../data/bbc-news")
    command = command_line(parser, arguments)
    with (
        collect_rows(arguments.json, PACKAGES, command) as rows,
        tempfile.TemporaryDirectory(prefix="finetuning-") as scratch,
    ):
        measure(arguments, Path(scratch), rows)
    for row in rows:
        print(
            f"{row['case']:<44}{row['variant']:<12}{row['value']:>9,.2f}  ratio {row['ratio']:.3f}  "
            f"unknown {row['unknown_rate']:.2%}"
        )


def measure(arguments: argparse.Namespace, scratch: Path, rows: list[Row]) -> None:
    """Append the rows of each vocabulary as soon as they are there, and those of what was forgotten."""
    text, base = arguments.text, arguments.base
    common = [*QUIET, "--training.device=cpu", *(f"--{setting}" for setting in arguments.set)]
    if arguments.quick:
        text = generated(scratch / "text", "abcdef", 60)
        common += TINY
    if base is None:
        base = train_base(arguments, scratch, common)
    settings = tomllib.loads((base / "recipe.toml").read_text(encoding="utf-8"))
    common += [f"--model.{name}={str(settings['model'][name]).lower()}" for name in MODEL_SIZES]
    tuned: Path | None = None
    for folders in prepared(text, base, arguments.words, scratch, common):
        seconds = 1.0 if arguments.quick else trial_seconds(launch(folders.flags), scratch / "trial", quick=False)
        steps = QUICK_STEPS if arguments.quick else max(50, round(arguments.minutes * 60 / seconds))
        ends = {f"{steps * seconds / 60:.1f} minutes": [f"--training.steps={steps}"]}
        most = ["--training.epochs=2"] if arguments.quick else [f"--training.epochs={MOST_EPOCHS}"]
        if not (arguments.quick and tuned):
            ends["convergence"] = ["--schedule.name=plateau", f"--training.patience={arguments.patience}", *most]
        for when, flags in ends.items():
            case = f"{folders.case}, {when}"
            reference = 0.0
            for variant, more in ((SCRATCH, []), (TUNED, from_base(base, arguments.rate))):
                folder = scratch / "runs" / f"{len(rows)}"
                run([*launch(folders.flags), *flags, *more, f"--run_folder={folder}"])
                value = test_perplexity(folder)
                reference = reference or value
                rows.append(row_of(case, variant, value, reference, folders.data, folder))
                if tuned is None and variant == TUNED:
                    tuned = folder
    assert tuned is not None
    own = Path(settings["data"]["folder"])
    before, after = test_perplexity(base), test_perplexity(tuned, "--data", str(own))
    for variant, value, folder in ((SCRATCH, before, base), (TUNED, after, tuned)):
        rows.append(row_of("the base's own test text", variant, value, before, own, folder))


def train_base(arguments: argparse.Namespace, scratch: Path, common: list[str]) -> Path:
    """Train the base: the recipe demo, or with --quick a tiny model of generated text; return its run."""
    folder, data = scratch / "base", scratch / "base-data"
    source = [str(generated(scratch / "base-text", "abcd", 60) / "train.csv")] if arguments.quick else ["demo", "--recipe=demo"]
    run([sys.executable, "-m", "lmdist.text.prepare", *source, "-o", str(data)])
    flags = [f"--training.steps={QUICK_STEPS}"] if arguments.quick else []
    run([*launch([*common, f"--data.folder={data}"]), *flags, f"--run_folder={folder}"])
    print(f"the base: test perplexity {test_perplexity(folder):,.2f}", file=sys.stderr)
    return folder


def prepared(text: Path, base: Path, words: int, scratch: Path, common: Sequence[str]) -> Iterator[Folders]:
    """Yield the small text with the base's words, with new ones behind them, and with its own."""
    files = split_files(text)
    train = files["train"]
    files["train"] = cut(train, words, scratch / f"train-{words}{train.suffix}")
    splits = [f"--{split}={path}" for split, path in files.items()]
    base_words = [f"--vocabulary={base}"]
    cases = {"the base's words": base_words, "with --extend": [*base_words, "--extend"], "its own words": []}
    for number, (case, flags) in enumerate(cases.items()):
        data = scratch / f"data-{number}"
        flags = flags or tokenizer_flags(read_json(scratch / "data-0" / "meta.json")["text"])
        run([sys.executable, "-m", "lmdist.text.prepare", *splits, *flags, "-o", str(data)])
        yield Folders(f"{text.name}, {case}", data, [*common, f"--data.folder={data}"])


def tokenizer_flags(settings: dict[str, Any]) -> list[str]:
    """Return the flags of lmdist-prepare by which text is tokenized as in another folder."""
    flags = [f"--tokenizer={settings['tokenizer']}", f"--clean={settings['clean']}"]
    return [*flags, "--lowercase"] if settings["lowercase"] else flags


def cut(path: Path, words: int, target: Path) -> Path:
    """Write the first rows of a CSV, or lines of another file, that have so many words together; return the file."""
    left = words
    with path.open(encoding="utf-8", newline="") as source, target.open("w", encoding="utf-8", newline="") as file:
        rows = csv.reader(source) if path.suffix == ".csv" else ([line.rstrip("\n")] for line in source)
        writer = csv.writer(file)
        for row in rows:
            writer.writerow(row) if path.suffix == ".csv" else file.write(f"{row[0]}\n")
            left -= sum(len(cell.split()) for cell in row)
            if left <= 0:
                break
    return target


def generated(folder: Path, letters: str, documents: int) -> Path:
    """Write files for train, valid and test with sentences of invented words; return the folder."""
    folder.mkdir(parents=True)
    for seed, split in enumerate(SPLITS):
        chance = random.Random(seed)
        words = [left + right for left in letters for right in letters]
        with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["title", "content"])
            for number in range(documents):
                start = chance.randrange(len(words))
                text = " ".join(words[(start + 3 * place + chance.randrange(2)) % len(words)] for place in range(40))
                writer.writerow([f"{split} {number}", f"{number} {text}."])
    return folder


def launch(flags: Sequence[str]) -> list[str]:
    """Return the command of a training on one rank."""
    return [sys.executable, "-m", "lmdist.job.launcher", "--nproc-per-node=1", *flags]


def from_base(base: Path, rate: float) -> list[str]:
    """Return the flags of a run that starts from the base."""
    return [f"--init_from={base}", f"--optimizer.learning_rate={rate:g}"]


def test_perplexity(folder: Path, *flags: str) -> float:
    """Return the test perplexity of a run: one stream, each token once."""
    evaluate = [sys.executable, "-m", "lmdist.training.evaluate", str(folder), "--split=test", "--json"]
    return json.loads(run([*evaluate, *flags]))["perplexity"]


def row_of(case: str, variant: str, value: float, reference: float, data: Path, folder: Path) -> Row:
    """Return the row of a model: its perplexity on the test split of a data folder, and how long it was trained."""
    last = last_training(folder)
    return {
        "case": case,
        "variant": variant,
        "value": round(value, 3),
        "unit": "perplexity",
        "spread": None,
        "ratio": round(reference / value, 4),
        "peak_mib": None,
        **last,
        **text_facts(data, "test"),
    }


def last_training(folder: Path) -> dict[str, Any]:
    """Return the steps and the tokens of a run."""
    last = [row for row in read_metrics(folder / METRICS) if "train/tokens" in row][-1]
    return {"steps": last["step"], "trained_tokens": last["train/tokens"]}


if __name__ == "__main__":
    main()

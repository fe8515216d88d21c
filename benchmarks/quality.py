"""The perplexity that a recipe reaches beside the unigram model's: trains by torchrun, evaluates, writes rows of data.

    python benchmarks/quality.py launch/demo.toml --json benchmarks/results/quality-MACHINE-DATE.json
    python benchmarks/quality.py launch/wikitext2-small.toml --epochs 1
    python benchmarks/quality.py launch/demo.toml --quick          # 60 steps: does it run?

The data folder that the recipe names must exist, except the demo's, which is prepared. The value of a row is a perplexity;
`ratio` is that of the unigram model, the baseline, divided by it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from origin import facts, processor, write_rows

PACKAGES = ("lmdist", "torch", "numpy", "nltk")


def main() -> None:
    """Train each recipe, measure, print a table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", type=Path)
    parser.add_argument("--epochs", type=float, help="in place of the recipe's")
    parser.add_argument("--quick", action="store_true", help="60 steps")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--plot", type=Path, help="write the loss curve of the last recipe here")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for recipe in arguments.recipes:
            run = Path(scratch) / recipe.stem
            rows += measure(recipe, run, arguments)
            if arguments.plot:
                shutil.copyfile(run / "loss.png", arguments.plot)
    for row in rows:
        print(f"{row['case']:<34}{row['variant']:<12}{row['value']:>10,.2f}  ratio {row['ratio']:.2f}")
    if arguments.json:
        write_rows(arguments.json, rows)


def measure(recipe: Path, run: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of one recipe."""
    length = [f"--training.epochs={arguments.epochs}"] if arguments.epochs else []
    length = ["--training.steps=60"] if arguments.quick else length
    train = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={arguments.ranks}", "-m", "lmdist.train"]
    train += [f"--config={recipe}", f"--run_folder={run}", f"--training.device={arguments.device}", *length]
    huge_pages = {**os.environ, "THP_MEM_ALLOC_ENABLE": "1"}  # as lmdist-train sets it
    subprocess.run([sys.executable, *train, "--tracking.mlflow=false"], check=True, env=huge_pages)
    command = f"python benchmarks/quality.py {recipe}" + (f" --epochs {arguments.epochs:g}" if arguments.epochs else "")
    rows = []
    for split in ("valid", "test"):
        evaluate = ["-m", "lmdist.training.evaluate", str(run), f"--split={split}", "--json", f"--device={arguments.device}"]
        done = subprocess.run([sys.executable, *evaluate], check=True, stdout=subprocess.PIPE, text=True)
        figures = json.loads(done.stdout)
        beside = {
            "case": f"{recipe.stem} {split}" + (f", epoch {arguments.epochs:g}" if arguments.epochs else ""),
            "unit": "perplexity",
            "spread": None,
            "peak_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024,
            "words": figures["words"],
            "unknown_rate": figures["unknown_rate"],
            **facts(PACKAGES, command),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {arguments.ranks} ranks, {processor()}",
        }
        baseline = figures["unigram_perplexity"]
        rows.append({**beside, "variant": "baseline", "value": baseline, "ratio": 1.0})
        rows.append({**beside, "variant": "lmdist", "value": figures["perplexity"], "ratio": baseline / figures["perplexity"]})
    return rows


if __name__ == "__main__":
    main()

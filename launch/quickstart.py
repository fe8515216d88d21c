"""The demo corpus from CSV to generated text, by the commands a user would type: `make quickstart`.

Each command is printed before it runs. A data folder that exists is used, and an interrupted training is resumed.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

from lmdist.console import table
from lmdist.tracking.address import LOCAL_PAGE, run_path
from lmdist.tracking.metadata import read_metadata
from lmdist.tracking.run_folder import METRICS, read_metrics

RUN, BUNDLE, TEXT = Path("runs/demo"), Path("bundles/demo"), Path("sample.txt")
BIN = Path(sys.executable).parent


def command(line: str, *, capture: bool = False) -> str:
    """Print a command and run it; return its output where `capture`. Exit with its code if it fails."""
    print(f"\n$ {line}", flush=True)
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    stdout = subprocess.PIPE if capture else None
    # No command is to wait for text on a stdin that is left open, as in CI.
    done = subprocess.run(shlex.split(line), env=environment, stdin=subprocess.DEVNULL, stdout=stdout, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout or ""


def main() -> None:
    """Prepare, train, evaluate, export and generate, then print the results."""
    began = time.monotonic()
    if not Path("data/demo").exists():
        command("lmdist-prepare --recipe launch/demo.toml -o data/demo")
    command("lmdist-train --config launch/demo.toml --resume auto --restarts 2")
    figures = json.loads(command(f"lmdist-evaluate {RUN} --streams 10 --json", capture=True))
    command(f"lmdist-export {RUN} -o {BUNDLE} --overwrite")
    command(f"lmdist-generate {BUNDLE} --max-new-tokens 1000 --ignore-eos --seed 1 -o {TEXT}")

    metadata = read_metadata(RUN)
    page = LOCAL_PAGE + (run_path(metadata["experiment_id"], metadata["run_id"]) if "run_id" in metadata else "")
    speeds = [row["train/tokens_per_second"] for row in read_metrics(RUN / METRICS) if "train/tokens_per_second" in row]
    speed = statistics.median(speeds)
    results = {
        "test perplexity": f"{figures['perplexity']:,.1f}; the unigram model has {figures['unigram_perplexity']:,.1f}",
        "training": f"{speed:,.0f} tokens/s; the whole chain took {time.monotonic() - began:.0f} s",
        "text": f"{TEXT}, 1,000 words",
        "run": str(RUN),
        "loss curve": str(RUN / "loss.png"),
        "bundle": str(BUNDLE),
        "MLflow database": "mlflow.db",
        "MLflow server": f"{os.path.relpath(BIN)}/mlflow ui --backend-store-uri sqlite:///mlflow.db",
        "MLflow page": page,
    }
    print(f"\n{table(results)}", end="")
    print(f"\n{' '.join(TEXT.read_text(encoding='utf-8').split()[:40])} ...")


if __name__ == "__main__":
    main()

"""Peak memory of lmdist-prepare and of training, on a CSV of 250 MB and on a quarter of it.

    python benchmarks/large.py [--megabytes 250] [--json benchmarks/results/large-MACHINE-DATE.json]
    python benchmarks/large.py --quick          # 12 MB, to see that it works

The CSV repeats the demo corpus, each time with some of its words replaced by others and some by new ones. Memory is that of a
command and all its child processes (USS), sampled four times a second. The pages of the token file that training has read
count as its own, although the system reclaims them when it needs memory: 2 bytes a token.
"""

from __future__ import annotations

import argparse
import csv
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from lmdist.text.demo import COLUMNS, articles
from origin import Row, add_json_option, collect_rows, command_line

# What is measured is memory; a validation on a twentieth of this text takes minutes.
SPLITS = ["--valid-fraction", "0.002", "--test-fraction", "0.002"]
TRAIN = "--training.steps=150 --training.device=cpu --training.log_every=10 --tracking.mlflow=false --sample.words=0"


def main() -> None:
    """Write both CSVs, prepare and train on them, print a table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=250)
    parser.add_argument("--tokenizer", default="word_tokenize")
    parser.add_argument("--quick", action="store_true", help="12 megabytes")
    add_json_option(parser)
    arguments = parser.parse_args()
    whole = 12 if arguments.quick else arguments.megabytes
    command = command_line(parser, arguments)
    with (
        collect_rows(arguments.json, ("lmdist", "torch", "nltk"), command) as rows,
        tempfile.TemporaryDirectory() as name,
    ):
        scratch = Path(name)
        for megabytes in (whole // 4, whole):
            file = scratch / f"{megabytes}.csv"
            words = write_csv(file, megabytes * 1_000_000)
            prepare = ["-m", "lmdist.text.prepare", str(file), "-o", f"data-{megabytes}", "--tokenizer", arguments.tokenizer]
            seconds, peak = watch([*prepare, "--vocabulary-size", "10000", *SPLITS], scratch)
            case = {"megabytes": megabytes, "words": words}
            rows.append(row_of("prepare", seconds, case, peak, rows))
            job = ["-m", "lmdist.train", f"--data.folder=data-{megabytes}", f"--run_folder=run-{megabytes}", *TRAIN.split()]
            seconds, peak = watch(job, scratch)
            rows.append(row_of("train", seconds, case, peak, rows))
            file.unlink()
    for row in rows:
        print(
            f"{row['case']:<10}{row['variant']:<9}{row['words']:>12,} words{row['value']:>8.1f} s   "
            f"peak {row['peak_mib']:>5} MiB, {row['peak_ratio']:.2f} of the quarter's"
        )


def row_of(case: str, seconds: float, text: dict[str, int], peak_mib: int, before: list[Row]) -> Row:
    """Return the row of a command on a text; the first row of the same case is its baseline, that of a quarter of the text."""
    row = {"case": case, "variant": f"{text['megabytes']} MB", "value": round(seconds, 1), **text, "peak_mib": peak_mib}
    quarter = next((other for other in before if other["case"] == case), row)
    ratio, peak_ratio = quarter["value"] / row["value"], row["peak_mib"] / quarter["peak_mib"]
    return {**row, "unit": "s", "spread": None, "ratio": round(ratio, 3), "peak_ratio": round(peak_ratio, 3)}


def write_csv(path: Path, size: int) -> int:
    """Write a CSV of `size` bytes; return the number of its words, separated by whitespace."""
    generator = random.Random(1)
    source = list(articles())
    vocabulary = [word for row in source for word in row[-1].split()]
    words, copy = 0, 0
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        while file.tell() < size:
            copy += 1
            for number, row in enumerate(source):
                if file.tell() >= size:
                    break
                text = row[-1].split(" ")
                for place in generator.sample(range(len(text)), len(text) // 20):
                    text[place] = generator.choice(vocabulary)
                text[generator.randrange(len(text))] = f"name{generator.randrange(10**9)}"
                writer.writerow([number, copy * 10_000 + number, f"{row[2]}, copy {copy}", *row[3:-1], " ".join(text)])
                words += sum(len(line.split()) for line in text)
    return words


def watch(command: list[str], cwd: Path, beside: Sequence[int] = ()) -> tuple[float, int]:
    """Run a command; return its seconds and the peak memory in MiB of all its processes, and those `beside` it, together."""
    began, peak = time.perf_counter(), 0
    with (cwd / "log").open("w") as log:
        child = subprocess.Popen([sys.executable, *command], cwd=cwd, stdout=log, stderr=log)
    while child.poll() is None:
        used = 0
        try:
            of_command = [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]
            for process in [*of_command, *map(psutil.Process, beside)]:
                used += process.memory_full_info().uss
        except psutil.Error:
            pass  # one of them has just exited
        peak = max(peak, used)
        time.sleep(0.25)
    assert child.returncode == 0, (cwd / "log").read_text()[-2000:]
    return time.perf_counter() - began, peak >> 20


if __name__ == "__main__":
    main()

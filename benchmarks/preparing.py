"""Tokenization and lmdist-prepare: words/s of text against NLTK's, peak memory against the size of the text.

    python benchmarks/preparing.py [--csv NEWS.csv] [--json benchmarks/results/preparing-MACHINE-DATE.json] [--plot FILE.png]
    python benchmarks/preparing.py --quick          # less text, of two sizes

First one text is tokenized on one core: by NLTK, which is the baseline, by a WordFinder with an empty cache, and by the same
one again, in turns; that all find the same words is asserted. The text is the demo corpus, or the CSV. Then lmdist-prepare runs
on CSVs of growing size as in large.py: with one process, and where the text is large with one for each CPU, in shards one after
the other, and on a Dask cluster of two workers (where Dask is installed), in turns; that all write the same bytes is asserted.
What several processes can gain at most on the machine is measured beside them: commands of one process, as many at once as
there are CPUs, each with a text of its own. A ratio is the median of those of the rounds, in which one process is followed at
once by the others. Words are counted at whitespace. Memory is that of a command and all its child processes, or of a command
and the workers of its cluster (USS), sampled four times a second. Core-hours are the time multiplied by the number of
processes, also while only one of them works.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from nltk.tokenize.destructive import NLTKWordTokenizer
from nltk.tokenize.punkt import PunktSentenceTokenizer

from large import watch, write_csv
from lmdist.cpus import available_cpus
from lmdist.extras import is_installed
from lmdist.storage.reading import read_json
from lmdist.text.demo import articles
from lmdist.text.documents import Documents
from lmdist.text.finding import find_files
from lmdist.text.inputs import ONE_PROCESS_BYTES
from lmdist.text.tokenizer import train_punkt
from lmdist.text.words import WordFinder, punkt_parameters
from origin import add_json_option, collect_rows, command_line

MEGABYTES = (12, 56, 250)  # 2, 9 and 40 million words
QUICK_MEGABYTES = (3, 42)
ROUNDS_OF_SEVERAL = 3  # where processes are compared: the speed of a machine that others share changes within a minute
SHARDS = 4
DASK_WORKERS = 2


class Way(NamedTuple):
    """How a text is prepared."""

    name: str
    processes: int
    """That work at a time."""
    commands: list[list[str]]
    """One after the other."""
    copies: int = 1
    """Each command runs so many times at once, for a text of its own; the seconds are those of a text."""


def main() -> None:
    """Measure, print a table, write the rows and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", help="tokenize this, in place of the demo corpus")
    parser.add_argument("--words", type=int, default=200_000, help="so many of them at most (default: 200,000)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="2 rounds with 40,000 words, and CSVs of 3 and 42 MB")
    add_json_option(parser)
    parser.add_argument("--plot", type=Path, help="write the picture here")
    arguments = parser.parse_args()
    command = command_line(parser, arguments)
    if arguments.quick:
        arguments.rounds, arguments.words = 2, 40_000
    with collect_rows(arguments.json, ("lmdist", "nltk", "regex"), command) as rows:
        rows += tokenize(arguments.csv, arguments.words, arguments.rounds)
        for row in prepare(QUICK_MEGABYTES if arguments.quick else MEGABYTES):
            rows.append(row)
    for row in rows:
        peak = f"peak {row['peak_mib']:>5,} MiB" if row["peak_mib"] else ""
        print(
            f"{row['case']:<42}{row['variant']:<36}{row['value']:>10,} {row['unit']:<8}{row['ratio']:>7.2f}"
            f"{row['words'] / row['seconds']:>12,.0f} words/s   {peak}"
        )
    if arguments.plot:
        plot(rows, arguments.plot)


def tokenize(csv: str | None, most: int, rounds: int) -> list[dict[str, Any]]:
    """Return the rows of tokenization on one core."""
    texts = [document.text for document in Documents(find_files([csv]))] if csv else [row[-1] for row in articles()]
    punkt = train_punkt(texts)
    words = count = 0
    while count < len(texts) and words < most:
        words += len(texts[count].split())
        count += 1
    texts = texts[:count]
    find_sentences = PunktSentenceTokenizer(punkt_parameters(punkt)).tokenize
    find_words = NLTKWordTokenizer().tokenize

    def nltk(text: str) -> list[str]:
        return [word for sentence in find_sentences(text) for word in find_words(sentence)]

    seconds: dict[str, list[float]] = {"baseline": [], "lmdist, empty cache": [], "lmdist, filled cache": []}
    for _ in range(rounds):
        finder = WordFinder(punkt)
        found = []
        for values, function in zip(seconds.values(), (nltk, finder, finder), strict=True):
            began = time.perf_counter()
            found.append(each(function, texts))
            values.append(time.perf_counter() - began)
        assert found[0] == found[1] == found[2]
    baseline = statistics.median(seconds["baseline"])
    return [
        {
            "case": f"tokenizing {'news' if csv else 'the demo corpus'}",
            "variant": variant,
            "value": round(words / statistics.median(values)),
            "unit": "words/s",
            "spread": round(words / min(values) - words / max(values)),
            "ratio": round(baseline / statistics.median(values), 2),
            "peak_mib": None,
            "words": words,
            "seconds": round(statistics.median(values), 3),
        }
        for variant, values in seconds.items()
    ]


def each(function: Callable[[str], list[str]], texts: list[str]) -> list[int]:
    """Return a hash of the words of each text: millions of words in memory would slow down the variant that comes second."""
    return [hash(tuple(function(text))) for text in texts]


def prepare(sizes: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Yield the rows of lmdist-prepare: the same text by one process, by worker processes, in shards and on a Dask cluster."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        for megabytes in sizes:
            file = scratch / f"{megabytes}.csv"
            words = write_csv(file, megabytes * 1_000_000)
            several = megabytes * 1_000_000 > ONE_PROCESS_BYTES["word_tokenize"] and available_cpus() > 1
            with dask_workers(DASK_WORKERS if several else 0, scratch) as (address, beside):
                ways = list(variants(str(file), several, address))
                seconds, peaks = in_turns(ways, ROUNDS_OF_SEVERAL if several else 1, scratch, address, beside)
            meta = read_json(scratch / "data" / "meta.json")
            tokens = sum(facts["tokens"] for facts in meta["splits"].values())
            for variant, processes, _, copies in ways:
                middle = statistics.median(seconds[variant])
                ratios = [one / this for one, this in zip(seconds["baseline"], seconds[variant], strict=True)]
                yield {
                    "case": f"lmdist-prepare, {words / 1e6:.1f} million words",
                    "variant": variant,
                    "value": round(middle, 1),
                    "unit": "s",
                    "spread": round(max(seconds[variant]) - min(seconds[variant]), 1) if several else None,
                    "ratio": round(statistics.median(ratios), 2),
                    "ratios": [round(ratio, 2) for ratio in ratios],
                    "peak_mib": peaks[variant],
                    "words": words,
                    "tokens": tokens,
                    "seconds": round(middle, 3),
                    "megabytes": megabytes,
                    "workers": processes,
                    "same_bytes": copies == 1,
                    "core_hours_per_billion_tokens": round(processes * middle / 3600 / (tokens / 1e9), 3),
                }
            file.unlink()


def in_turns(
    ways: list[Way], rounds: int, scratch: Path, address: str, beside: list[int]
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Return the seconds of each way in each round, and its peak memory in MiB; all must write the same bytes."""
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    peaks = dict.fromkeys(seconds, 0)
    bytes_of_one: dict[str, bytes] = {}
    for _ in range(rounds):
        for variant, _, commands, copies in ways:
            if copies > 1:
                measured = [at_once(command, copies, scratch) for command in commands]
            else:
                measured = [watch(command, scratch, beside if address in command else ()) for command in commands]
            seconds[variant].append(sum(took for took, _ in measured))
            peaks[variant] = max(peaks[variant], *(peak for _, peak in measured))
            found = {path.name: path.read_bytes() for path in (scratch / "data").iterdir() if path.name != "meta.json"}
            bytes_of_one = bytes_of_one or found
            assert found == bytes_of_one, f"{variant}: not the bytes of one process"
            shutil.rmtree(scratch / "data.shards", ignore_errors=True)
    return seconds, peaks


def at_once(command: list[str], copies: int, folder: Path) -> tuple[float, int]:
    """Run a command several times at once, each in a folder of its own; return the seconds for each, and the peak in MiB."""
    folders = [folder / f"copy-{number}" for number in range(copies)]
    for one in folders:
        one.mkdir(exist_ok=True)
    with ThreadPoolExecutor(copies) as threads:
        found = [*threads.map(lambda one: watch(command, one), folders)]
    for one in folders:
        shutil.rmtree(one)
    return max(seconds for seconds, _ in found) / copies, sum(peak for _, peak in found)


def variants(file: str, several: bool, address: str) -> Iterator[Way]:
    """Yield the ways to prepare a file, that of one process first."""
    start = ["-m", "lmdist.text.prepare", file, "-o", "data", "--overwrite"]
    alone = [*start, "--workers", "1"]
    yield Way("baseline", 1, [alone])
    if several:
        workers = available_cpus()
        yield Way(f"{workers} worker processes", workers, [[*start, "--workers", str(workers)]])
        yield Way(f"{workers} commands at once, a text each", workers, [alone], copies=workers)
        shards = [[*start, "--shard", f"{index}/{SHARDS}"] for index in range(SHARDS)]
        yield Way(f"{SHARDS} shards, one after the other", 1, [*shards, [*start, "--merge", "--workers", "1"]])
    if address:
        name = f"{DASK_WORKERS} Dask workers, {SHARDS} shards"
        yield Way(name, DASK_WORKERS, [[*start, "--scheduler", address, "--shards", str(SHARDS)]])


@contextmanager
def dask_workers(number: int, folder: Path) -> Iterator[tuple[str, list[int]]]:
    """Yield the address of a scheduler and the processes of its workers, of one thread each; "" where Dask is not installed."""
    if not number or not is_installed("distributed"):
        yield "", []
        return
    place = folder / "scheduler.json"
    options = ["--scheduler-file", str(place), "--no-dashboard", "--host", "127.0.0.1"]
    commands = [
        ["dask_scheduler", *options, "--port", "0"],
        *[["dask_worker", *options, "--nthreads", "1", "--no-nanny"]] * number,
    ]
    with ExitStack() as stack:
        processes = []
        for name, *arguments in commands:
            log = stack.enter_context((folder / f"{name}.log").open("ab"))
            line = [sys.executable, "-m", f"distributed.cli.{name}", *arguments]
            processes.append(subprocess.Popen(line, cwd=folder, stdout=log, stderr=log))
            stack.callback(processes[-1].wait)
            stack.callback(processes[-1].kill)
        while not (place.exists() and place.read_text()):
            assert processes[0].poll() is None, (folder / "dask_scheduler.log").read_text()
            time.sleep(0.1)
        yield read_json(place)["address"], [process.pid for process in processes[1:]]
        place.unlink()


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot words/s and memory against the size of the text."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (speed, memory) = pyplot.subplots(1, 2, figsize=(9, 4), layout="constrained")
    prepared = [row for row in rows if "workers" in row]
    for variant in dict.fromkeys(row["variant"] for row in prepared):
        of_these = [row for row in prepared if row["variant"] == variant]
        millions = [row["words"] / 1e6 for row in of_these]
        label = "1 process" if variant == "baseline" else variant
        speed.plot(millions, [row["words"] / row["seconds"] / 1e6 for row in of_these], "o-", label=label)
        memory.plot(millions, [row["peak_mib"] for row in of_these], "o-")
    for axes, title in ((speed, "lmdist-prepare: million words/s"), (memory, "peak memory, MiB")):
        axes.set(title=title, xlabel="million words", xlim=0, ylim=0)
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()

"""Write the pages' tables, of results from benchmarks/results and of options from the code: `python benchmarks/readme.py`.

A page shows a table of the first machine that has results for it, with AMX if there is any; benchmarks/results/README.md shows
one for each. A table's head names the machine and the days. A table stands between two comments, `<!-- NAME: ... -->` and
`<!-- /NAME -->`; NAME is a function below. With --check nothing is written, and it fails where a page is not what it would
write; a test does that.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from lmdist_export.options import GENERATION, REQUEST, Row

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (
    ROOT / "README.md",
    RESULTS / "README.md",
    *(
        ROOT / "docs" / f"{name}.md"
        for name in (
            "quality",
            "preparing",
            "reliability",
            "training",
            "training-internals",
            "finetuning",
            "scaling",
            "sampling",
            "sampling-internals",
            "scoring",
            "serving",
            "bundle",
        )
    ),
)
FILE = re.compile(r"(.+?)-(cpu\d+-(?:no)?amx|[a-z0-9]+)-(\d{4}-\d\d-\d\d)\.json")
"""The name of a run's file: benchmark, machine, day."""
BLOCK = re.compile(r"(<!-- (\w+): .*? -->\n).*?(<!-- /\2 -->)", re.DOTALL)


class Machine(str):
    """The name of a machine, and the days of the rows that `results` has returned of it."""

    __slots__ = ("days",)

    def __init__(self, _: str) -> None:
        self.days: set[str] = set()

    def in_words(self) -> str:
        """Return it as tables name it, with the days of their rows."""
        cpu = re.fullmatch(r"cpu(\d+)-(no)?amx", self)
        name = f"{cpu[1]} cores, {'no ' if cpu[2] else ''}AMX" if cpu else self
        first, last = min(self.days), max(self.days)
        return f"machine: {name}; {first if first == last else f'{first} to {last}'}"


def machines() -> list[Machine]:
    """The machines of the committed runs: CPUs first, those with AMX before those without."""
    found = {Machine(name[2]) for path in RESULTS.glob("*.json") if (name := FILE.fullmatch(path.name))}
    return sorted(found, key=lambda machine: (not machine.startswith("cpu"), "noamx" in machine, machine))


def results(machine: Machine, benchmark: str) -> list[list[dict[str, Any]]]:
    """The rows of a benchmark's committed runs on a machine: of each kind (such as torture-two-hosts), the newest one.

    Quick runs and those that were stopped do not count.
    """
    runs: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(RESULTS.glob(f"{benchmark}-*.json")):
        name = FILE.fullmatch(path.name)
        if name and name[2] == machine and not name[1].endswith("-quick"):
            rows = json.loads(path.read_text(encoding="utf-8"))
            if not any(row.get("partial") for row in rows):
                runs[name[1]] = rows
                machine.days.add(name[3])
    return list(runs.values())


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *rows))


def highlights() -> str:
    """Return the README's lines on quality, speed and reliability: of each, the first machine that has results."""
    quality, training, sampling, torture = map(first_results, ("quality", "training", "sampling", "torture"))
    demo = {row["variant"]: row for row in quality if row["case"] == "demo test"}
    trained = [row for row in training if row["variant"] == "lmdist" and row["case"].endswith("V 33k")]
    int8, fp32 = (
        [row for row in sampling if (row["variant"], row["unit"]) == (way, "tokens/s") and row["case"].startswith("M: ")]
        for way in ("lmdist int8", "lmdist fp32")
    )
    recoveries = [row["value"] for row in torture if row["unit"] == "s"]
    assert all(row["same"] for row in torture if row["variant"] == "all"), "a killed run has other parameters"
    core = f"one CPU core{' with AMX' if trained[0].get('amx') else ''}"
    lines = (
        f"**[Quality](docs/quality.md)**: the demo has a test perplexity of {demo['lmdist']['value']:.1f} after "
        f"{demo['lmdist']['minutes']:.1f} minutes of training on one CPU core; a 5-gram model of the same text has "
        f"{demo['KN-5']['value']:.1f}.",
        f"**[Speed](docs/training.md#speed)** on {core}, against plain PyTorch: training {ratios(trained)} times as fast, "
        f"[sampling](docs/sampling.md#speed) {ratios(int8)} times in int8 and {ratios(fp32)} times in fp32.",
        f"**[Reliability](docs/reliability.md)**: jobs that were killed {len(recoveries)} times (a rank, the launcher, a "
        "machine, its network) ended with the same parameters as those that were not; training went on after "
        f"{median(recoveries):.0f} s (median), {max(recoveries):.0f} s at most.",
    )
    return "".join(f"* {line}\n" for line in lines)


def ratios(rows: list[dict[str, Any]]) -> str:
    """Return the lowest and the highest ratio."""
    values = [row["ratio"] for row in rows]
    return f"{min(values):.1f} to {max(values):.1f}"


def first_results(benchmark: str) -> list[dict[str, Any]]:
    """Return all rows of a benchmark on the first machine that has some."""
    return next(rows for machine in machines() if (rows := [row for run in results(machine, benchmark) for row in run]))


def quality(machine: Machine, split: str = "") -> str:
    """Return the perplexities of each text and split: of lmdist, and of those that it is compared with where they were run."""
    rows = [row for run in results(machine, "quality") for row in run]
    shown = [name for name in COMPARED if any(row["variant"] == name for row in rows)]
    timed = any(row.get("minutes") for row in rows)
    lines = []
    for ours in (row for row in rows if row["variant"] == "lmdist" and split in row["case"]):
        here = {row["variant"]: row["value"] for row in rows if row["case"] == ours["case"]}
        minutes = [f"{ours['minutes']:,.1f}" if ours.get("minutes") else ""] if timed else []
        cells = [f"{here[name]:,.1f}" if name in here else "" for name in shown]
        cached = f" ({here['lmdist, cache']:,.1f} with a cache)" if "lmdist, cache" in here else ""
        lines.append([ours["case"], f"{ours['unknown_rate']:.1%}", *minutes, *cells, f"**{ours['value']:,.1f}**{cached}"])
    head = ["recipe, split", "unknown words", *(["minutes"] if timed else []), *(COMPARED[name] for name in shown)]
    return markdown([*head, "lmdist"], lines)


def quality_summary(machine: Machine) -> str:
    """Return those of the test splits."""
    return quality(machine, "test")


def ablations(machine: Machine) -> str:
    """Return what each part of a recipe is worth at equal time."""
    lines = []
    for run in results(machine, "ablations"):
        base = next(row for row in run if row["variant"] == "baseline")
        for row in run:
            spread = f" ± {row['spread'] / 2:,.1f}" if row["spread"] is not None else ""
            name = f"the recipe ({row['seeds']} seeds)" if row is base else row["variant"]
            difference = "" if row is base else f"{row['value'] - base['value']:+,.1f}"
            cells = [f"{row['minutes']:,.1f}", f"{row['steps']:,}", f"{row['value']:,.1f}{spread}", difference]
            lines.append([row["case"], name, *cells])
    table = markdown(["recipe, split", "variant", "minutes", "steps", "perplexity", "difference"], lines)
    return ABLATIONS + table if lines else ""


ABLATIONS = """## What each part is worth

`benchmarks/ablations.py` trains a recipe without one of its parts for the same time: a part that slows a step down has to earn
it. The recipe itself has several seeds; half of the distance between the best and the worst is behind the ±.

"""


COMPARED = {"unigram": "unigram model", "KN-5": "5-gram model", "baseline": "pytorch/examples"}
"""The variants that lmdist is compared with, and their names in the table."""


def reliability(machine: Machine) -> str:
    """Return a row for each torture run and for the states of an MLflow server."""
    rows = []
    for *kills, whole in results(machine, "torture"):
        kinds = ", ".join(dict.fromkeys(row["variant"] for row in kills))
        rows.append([f"{len(kills)} kills of one job ({kinds}), {ranks(whole)}", whole["note"]])
    for run in results(machine, "tracking"):
        states = [row["variant"] for row in run if row["case"] == "exit delay"]
        figures = {case: [row for row in run if row["case"] == case] for case in {row["case"] for row in run}}
        lost = sum(row["value"] for case in LOST for row in figures[case])
        p99 = max(row["ratio"] for row in figures[STEP] if row["ratio"])
        alone = next(row for row in figures[STEP] if row["variant"] == "off")
        rows.append(
            [
                f"an MLflow server that is {', '.join(states)}",
                f"step p99 at most {p99:.2f} of that without MLflow, "
                f"whose own spread is {alone['spread'] / alone['value']:.0%}; "
                f"exit delayed by at most {max(row['value'] for row in figures['exit delay']):.1f} s; "
                f"{lost:.0f} points missing or duplicate after `lmdist-sync`",
            ]
        )
    return markdown(["test", "result"], rows)


def ranks(row: dict[str, Any]) -> str:
    """Return the job of a torture run, from the name of its machine: "1 host x 2 ranks"."""
    return re.sub(r"\b1 (host|rank)\(?s\)?", r"1 \1", row["machine"].split(", ")[-1]).replace("(s)", "s")


def checkpointing(machine: Machine) -> str:
    """Return how long a checkpoint blocks the training, and what its writing costs the steps beside it."""
    rows = []
    for run in results(machine, "checkpointing"):
        for case in dict.fromkeys(row["case"] for row in run if row["case"].endswith("pause")):
            waiting, copied = (row for row in run if row["case"] == case)
            _, beside = (row for row in run if row["case"] == case.replace(": pause", ": a step"))
            pauses = [f"{copied['value']:,.0f} ms", f"{waiting['value']:,.0f} ms", f"{1 / beside['ratio']:.2f}"]
            rows.append([f"{copied['checkpoint_mib']:,.0f} MiB ({case.removesuffix(': pause')})", *pauses])
    head = ["checkpoint", "blocks the training for", "if the ranks waited for the disk", "a step beside the writing, relative"]
    return markdown(head, rows)


def memory(machine: Machine) -> str:
    """Return the peak memory of training on a large text, and on a quarter of it (preparing has a benchmark of its own)."""
    rows = [
        [f"{row['megabytes']} MB, {row['words']:,} words", f"{row['peak_mib']:,} MiB"]
        for run in results(machine, "large")
        for row in run
        if row["case"] == "train"
    ]
    return markdown(["CSV", "peak memory of a training"], rows)


LOST = ("missing after lmdist-sync", "twice after lmdist-sync")
STEP = "step p99 after 10 s"


def kills(machine: Machine) -> str:
    """Return a table of every kill of every torture run."""
    rows = [
        [
            f"{whole['case']}, {ranks(whole)}",
            row["case"],
            row["variant"],
            row["note"],
            f"{row['value']:.1f} s",
        ]
        for *kills, whole in results(machine, "torture")
        for row in kills
    ]
    return markdown(["run", "when", "kind", "target", "recovery"], rows)


def outages(machine: Machine) -> str:
    """Return a table of the tracking benchmark with a row for each state of the server."""
    rows = []
    cases: list[str] = []
    for run in results(machine, "tracking"):
        cases = list(dict.fromkeys(row["case"] for row in run))
        for state in dict.fromkeys(row["variant"] for row in run):
            here = {row["case"]: row for row in run if row["variant"] == state}
            rows.append([state, *(shown(here[case]) if case in here else "" for case in cases)])
    return markdown(["state", *cases], rows)


def shown(row: dict[str, Any]) -> str:
    """A figure with its unit, and its ratio to the baseline."""
    ratio = f" ({row['ratio']:.2f})" if row["ratio"] and row["unit"] == "ms" else ""
    if row["unit"] == "of those expected":
        return f"{row['value']:.0%}"
    if row["unit"] == "runs":
        return "yes" if row["value"] == 1 else "no"
    digits = "z.1f" if row["unit"] in ("ms", "s") else "g"
    return f"{row['value']:{digits}} {row['unit']}{ratio}"


def preparing(machine: Machine) -> str:
    """Words/s of tokenization, and what lmdist-prepare costs in one process and in several."""
    rows = []
    for row in (row for run in results(machine, "preparing") for row in run):
        memory = f"{row['peak_mib']:,} MiB" if row["peak_mib"] else ""
        variant = row["variant"]
        if variant == "baseline":
            variant = "1 process" if "workers" in row else "NLTK"
        speed = f"{row['words'] / row['seconds']:,.0f}"
        same = "the same" if row.get("same_bytes") and row["variant"] != "baseline" else ""
        cost = f"{row['core_hours_per_billion_tokens']:.2f}" if "core_hours_per_billion_tokens" in row else ""
        rows.append([row["case"], variant, f"{row['seconds']:,.1f} s", speed, f"{row['ratio']:.2f}x", memory, same, cost])
    columns = ["what", "how", "time", "words/s", "ratio", "peak memory", "bytes", "core-hours per billion tokens"]
    filled = [number for number in range(len(columns)) if any(row[number] for row in rows)]  # not so in an older run
    return markdown([columns[number] for number in filled], [[row[number] for number in filled] for row in rows])


def finetuning(machine: Machine) -> str:
    """Return the test perplexities from scratch and from a base, of each vocabulary, and of the base's own text."""
    lines = []
    for run in results(machine, "finetuning"):
        for scratch, tuned in zip(run[::2], run[1::2], strict=True):
            values = [f"{row['value']:,.1f} ({row['steps']:,} steps)" for row in (scratch, tuned)]
            difference = f"{tuned['value'] / scratch['value'] - 1:+.0%}"
            lines.append([scratch["case"], f"{scratch['unknown_rate']:.1%}", *values, difference])
    head = ["text, vocabulary, how long", "unknown words", "from scratch", "from the base", "difference"]
    return markdown(head, lines)


def pieces(machine: Machine) -> str:
    """Return what words and pieces of words lead to at equal time."""
    lines = [
        [
            "words" if row["variant"] == "baseline" else f"{row['variant']} pieces",
            *(f"{row['vocabulary']:,}", f"{row['minutes']:.1f}", f"{row['steps']:,}", f"{row['trained_tokens'] / 1e6:.2f} M"),
            *(f"**{row['value']:,.1f}**", f"{row['bits_per_byte']:.3f}", f"{row['unknown_rate']:.1%}"),
            *(f"{row['perplexity']:,.1f}", f"{row['tokens_per_word']:.2f}", f"{row['bundle_bytes'] / 1e6:.1f} MB"),
        ]
        for run in results(machine, "pieces")
        for row in run
    ]
    head = ["tokens", "vocabulary", "minutes", "steps", "tokens read", "perplexity per word", "bits per byte", "unknown tokens"]
    return PIECES + markdown([*head, "perplexity per token", "tokens a word", "bundle"], lines) if lines else ""


PIECES = """**Words or pieces?** The same text and settings, four to five and a half minutes each (in the column), one core and
one seed (`benchmarks/pieces.py`), on test. Models of pieces compare with each other by these figures. The words' model does
not compare with them: an unknown word counts as the `<unk>` that it predicts, which is easier than the word. Take words for
readable text from a small corpus, and pieces where no word may be lost (names, morphology, a recognizer's units):

"""


def training(machine: Machine) -> str:
    """Return speed and memory of all cases on a CPU, also per token of the corpus."""
    rows = []
    for run in results(machine, "training"):
        measured = [row for row in run if row["unit"].endswith("tokens/s") and "persistent_kernel" not in row]
        cases = dict.fromkeys(row["case"] for row in measured)
        rows += [[case, *speeds([row for row in measured if row["case"] == case])] for case in cases]
    head = [
        "model, batch size x tokens, vocabulary",
        "plain PyTorch",
        "lmdist",
        "lmdist, adaptive head",
        "memory: plain, lmdist, adaptive",
    ]
    return markdown(head, rows)


def training_speed(machine: Machine) -> str:
    """Return the cases of training, each token read once."""
    head, rule, *lines = training(machine).splitlines(keepends=True)
    return "".join([head, rule, *(line for line in lines if "per token of the corpus" not in line)])


def speed(machine: Machine) -> str:
    """Return those with the vocabulary of WikiText-2."""
    head, rule, *lines = training_speed(machine).splitlines(keepends=True)
    return "".join([head, rule, *(line for line in lines if "V 33k" in line)])


def speeds(rows: list[dict[str, Any]]) -> list[str]:
    """Return the tokens per second of each variant of a case, and memory; a baseline that was not run has no row."""
    baseline = [row for row in rows if row["variant"].startswith("baseline")]
    others = [row for row in rows if row not in baseline]
    cells = [f"{row['value']:,.0f} tokens/s" + (f" (**{row['ratio']:.1f}x**)" if row["ratio"] else "") for row in others]
    return [
        f"{baseline[0]['value']:,.0f} tokens/s" if baseline else "not run",
        *cells,
        *[""] * (2 - len(cells)),
        ", ".join([*([] if baseline else ["not run"]), *(f"{row['peak_mib']:,}" for row in rows)]) + " MiB",
    ]


def parts(machine: Machine) -> str:
    """Return the share of a step that each part takes, and its distance from its floor."""
    rows = []
    for run in results(machine, "training"):
        pieces = [row for row in run if row["variant"].startswith("part: ")]
        for case in dict.fromkeys(row["case"] for row in pieces):
            here = [row for row in pieces if row["case"] == case]
            whole = sum(row["value"] for row in here)
            cells = [f"{row['value'] / whole:.0%}" + (f" ({row['ratio']:.1f})" if row["ratio"] else "") for row in here]
            rows.append([case, *cells])
    return markdown(["case", "LSTM (of its floor)", "head (of its floor)", "clipping and update"], rows)


def sampling(machine: Machine) -> str:
    """Return the speed of the baseline, and the ratios of the other ways to it."""
    ways = [name for name in SAMPLING if any(row["variant"] == name for row in sampling_speed_rows(machine))]
    rows = []
    for case in dict.fromkeys(row["case"] for row in sampling_speed_rows(machine)):
        here = {row["variant"]: row for row in sampling_speed_rows(machine) if row["case"] == case}
        cells = [faster(here[name]) if name in here else "" for name in ways]
        rows.append([*case.split(", batch "), *cells])
    return markdown([MODEL, "batch size", *(SAMPLING[name] for name in ways)], rows)


def sampling_summary(machine: Machine) -> str:
    """The same for the model of middle size and fewer ways."""
    head, rule, *lines = sampling(machine).splitlines(keepends=True)
    return "".join([head, rule, *(line for line in lines if line.startswith("| M: "))])


SAMPLING = {
    "baseline": "torch, a step a token",
    "torch, all tokens again": "torch, all tokens again for each",
    "torch.compile": "torch.compile",
    "onnxruntime, token by token": "onnxruntime, token by token",
    **{f"lmdist {precision}": f"lmdist {precision}" for precision in ("fp32", "fp16", "int8", "int4")},
}
"""The variants, and their names in the tables."""
MODEL = "model: embedding, layers, vocabulary"


def faster(row: dict[str, Any]) -> str:
    """Return the speed of a baseline, or the ratio of another way to it."""
    if row["variant"] == "baseline":
        return f"{row['value']:,.0f} tokens/s"
    return f"**{row['ratio']:.1f}x**" if row["variant"].startswith("lmdist") else f"{row['ratio']:.1f}x"


def sampling_speeds(machine: Machine) -> str:
    """Return speed and memory of every variant, with the spread of the rounds."""
    rows = [
        [
            *row["case"].split(", batch "),
            SAMPLING[row["variant"]],
            f"{row['value']:,.0f} ± {row['spread'] / 2:,.0f}",
            *(f"{row['ratio']:.1f}x", f"{row['peak_mib']:,} MiB"),
        ]
        for row in sampling_speed_rows(machine)
        if row["variant"] in SAMPLING
    ]
    return markdown([MODEL, "batch size", "how", "tokens/s", "ratio", "peak memory"], rows)


def sampling_options(machine: Machine) -> str:
    """Return what the options of sampling cost."""
    rows = []
    for row in sampling_speed_rows(machine):
        way, comma, option = row["variant"].partition(", ")
        if way.startswith("lmdist") and comma:
            (without,) = (
                other for other in sampling_speed_rows(machine) if other["case"] == row["case"] and other["variant"] == way
            )
            of_it = f"{row['value'] / without['value']:.0%}"
            rows.append([*row["case"].split(", batch "), way, option, f"{row['value']:,.0f} tokens/s", of_it])
    return markdown([MODEL, "batch size", "how", "option", "speed", "of that without"], rows)


def sampling_shares(machine: Machine) -> str:
    """Return the share of the machine's limits that is used."""
    found = [row for row in newest_sampling(machine) if row["unit"] == "share" and row["variant"] in SHARES]
    rows = []
    for case, of in dict.fromkeys((row["case"], row["of"]) for row in found):
        here = {row["variant"]: row for row in found if (row["case"], row["of"]) == (case, of)}
        cells = [f"{here[name]['value']:.0%}" if name in here else "" for name in SHARES]
        rows.append([*case.split(", batch "), of, *cells])
    return markdown([MODEL, "batch size", "of the limit of", *(SAMPLING[name] for name in SHARES)], rows)


SHARES = ("baseline", "lmdist fp32", "lmdist int8", "lmdist int4")


def sampling_limits(machine: Machine) -> str:
    """Return the machine's limits, and the times of whole processes."""
    rows = [
        ["`import torch`" if row["variant"] == "baseline" else row["variant"], f"{row['value']:g} {row['unit']}"]
        for row in newest_sampling(machine)
        if row["case"] in ("limit", "start")
    ]
    return markdown(["what", "measured"], rows)


def scoring(machine: Machine) -> str:
    """Return hypotheses per second, and the ratio to the baseline."""
    rows = [
        [
            row["case"],
            {"baseline": "torch, one by one", "torch": "torch, padded batches of 64"}.get(row["variant"], row["variant"]),
            f"{row['value']:,.1f}",
            f"{row['ratio']:.1f}x",
            f"{row['peak_mib']:,} MiB",
        ]
        for run in results(machine, "scoring")
        for row in run
    ]
    return markdown(["model, text", "how", "hypotheses/s", "ratio", "peak memory"], rows)


LATENCIES = {"p50_ms": "p50", "p99_ms": "p99", "first_p50_ms": "first words, p50", "first_p99_ms": "p99"}
SERVING_CPU = {"cpu_ms_per_1000_tokens": "CPU of 1,000 tokens", "client_cpu_ms_per_1000_tokens": "of the clients beside"}


def serving(machine: Machine) -> str:
    """Return throughput and latency of a server by its number of clients; that of first words where they were measured."""
    found = [row for run in results(machine, "serving") for row in run if row["unit"] == "tokens/s"]
    times = [name for name in LATENCIES if any(name in row for row in found)]
    cpu = [name for name in SERVING_CPU if any(name in row for row in found)]
    rows = [
        [
            *row["case"].rsplit(", clients ", 1),
            row.get("how") or {"baseline": "one request at a time", "lmdist": "continuous batching"}[row["variant"]],
            f"{row['value']:,.0f} ({row['ratio']:.0%})",
            *("" if row.get(name) is None else f"{row[name]:,.0f} ms" for name in times),
            *(f"{row[name]:,.0f} ms" if row.get(name) else "" for name in cpu),
            f"{row['peak_mib']:,} MiB",
        ]
        for row in found
    ]
    names = [*(LATENCIES[name] for name in times), *(SERVING_CPU[name] for name in cpu)]
    return markdown(["model", "clients", "how", "tokens/s", *names, "peak memory"], rows)


def serving_limits(machine: Machine) -> str:
    """Return the latency of a short request beside long ones, and a server's memory after many requests."""
    rows = [
        [row["case"], row["how"], f"{row['value']:,.0f} {row['unit']} ({row['ratio']:.1f}x)"]
        for run in results(machine, "serving")
        for row in run
        if row["unit"] != "tokens/s"
    ]
    return markdown(["model, what", "how", "measured"], rows)


def options() -> str:
    """Return the options of generation_config.json in the order in which they are applied."""
    rows = sorted(GENERATION.values(), key=lambda row: (not row.option.order, row.option.order))
    cells = [[str(row.option.order or ""), f"`{row.name}`", flag(row), *default(row), row.option.help] for row in rows]
    return markdown(["step", "option", "flag", "default", "bounds", "what it does"], cells)


def request_options() -> str:
    """Return the options that only a request has."""
    cells = [[str(row.option.order or ""), f"`{row.name}`", flag(row), row.option.help] for row in REQUEST.values()]
    return markdown(["step", "option", "flag", "what it does"], cells)


def generation_config() -> str:
    """Return the fields of generation_config.json."""
    cells = [
        [f"`{row.name}`" + (f" = {row.option.metavar}" if row.option.metavar else ""), *default(row), row.option.help]
        for row in GENERATION.values()
    ]
    return markdown(["field", "as exported", "bounds", "meaning"], cells)


def flag(row: Row) -> str:
    """Return a flag as it is written; an option of generation_config.json alone has none."""
    if not row.option.group:
        return ""
    return f"`{row.flag} {row.option.metavar}`" if row.option.metavar else f"`{row.flag}`"


def default(row: Row) -> tuple[str, str]:
    """Return the default, as JSON, and the bounds of an option."""
    return json.dumps(row.default), str(row.bounds or "")


def precisions(machine: Machine) -> str:
    """Return what each precision costs a trained model."""
    rows = []
    for run in results(machine, "precisions"):
        for variant in dict.fromkeys(row["variant"] for row in run):
            figures = {row["unit"]: row["value"] for row in run if row["variant"] == variant}
            rows.append(
                [
                    "fp32" if variant == "baseline" else variant,
                    f"{figures['perplexity']:,.2f} ({figures['% lost']:+.2f} %)",
                    f"{figures['top-1 agreement']:.1%}",
                    f"{figures['max logit error']:.2g}",
                    f"{figures['MB']:.1f}",
                ]
            )
    return markdown(["precision", "perplexity", "top-1 agreement with torch", "max error of a logit", "MB"], rows)


def newest_sampling(machine: Machine) -> list[dict[str, Any]]:
    """The rows of the newest run of the benchmark of sampling on a machine."""
    return next(iter(results(machine, "sampling")), [])


def sampling_speed_rows(machine: Machine) -> list[dict[str, Any]]:
    """Return those of its rows that are speeds."""
    return [row for row in newest_sampling(machine) if row["unit"] == "tokens/s"]


def curves(machine: Machine) -> str:
    """Return the distance of each path's losses from the plain ones."""
    rows = [[row["variant"], f"{row['loss']:.3f}", f"{row['value']:+.4f}"] for run in results(machine, "curves") for row in run]
    return markdown(["path", "loss at the end, nats per token", "mean distance in the second half"], rows)


def scaling(machine: Machine) -> str:
    """Return the measured steps, a line for each number of ranks."""
    head = ["ranks", "step", "efficiency", "compute", "contention", "exposed", "all-reduce alone", "overlap"]
    return markdown([f"model and batch, {scaling_precision(machine)}", *head], scaling_rows(machine))


def scaling_summary(machine: Machine) -> str:
    """Return what more ranks gain, and the two losses."""
    head = ["ranks", "step", "efficiency", "contention", "exposed"]
    rows = [[*row[:4], *row[5:7]] for row in scaling_rows(machine)]
    return markdown([f"model and batch, {scaling_precision(machine)}", *head], rows)


def scaling_rows(machine: Machine) -> list[list[str]]:
    """Return the cells of each measured step."""
    return [
        [
            *(row["case"], row["variant"].removeprefix("baseline: "), milliseconds(row["value"], row["spread"])),
            *(f"**{row['ratio']:.0%}**", milliseconds(row["compute_ms"], row["compute_spread"]), f"{row['contention']:.2f}"),
            *(milliseconds(row["exposed_ms"], row["exposed_spread"]), milliseconds(row["all_reduce_ms"]), overlap(row)),
        ]
        for row in of_kind(machine, "step")
    ]


def scaling_precision(machine: Machine) -> str:
    """Return the precision of the measured steps."""
    return ", ".join(dict.fromkeys(row["precision"] for row in of_kind(machine, "step")))


def overlap(row: dict[str, Any]) -> str:
    """Return the overlap of a step, if the spread of what is exposed is below an all-reduce."""
    if row["overlap"] is None:
        return ""
    return f"{row['overlap']:.0%}" if row["exposed_spread"] / 2 < row["all_reduce_ms"] else "lost in noise"


def scaling_fit(machine: Machine) -> str:
    """Return what was fitted, and how well it fits."""
    rows = [
        [
            row["variant"],
            f"{row['value']:.0%} {row['unit']}" if row["unit"].startswith("of ") else f"{row['value']:g} {row['unit']}",
        ]
        for row in of_kind(machine, "fit")
    ]
    return markdown(["fitted", "value"], rows)


def scaling_errors(machine: Machine) -> str:
    """Return each measurement that the model was fitted to, beside the prediction."""
    rows = [
        [
            *(row["case"], f"{row['kind']}, {row['variant']}", milliseconds(row["value"]), milliseconds(row["predicted_ms"])),
            f"{row['predicted_ms'] / row['value'] - 1:+.0%}",
        ]
        for kind in ("step", "all-reduce")
        for row in of_kind(machine, kind)
        if "predicted_ms" in row
    ]
    return markdown(["model and batch", "what", "measured", "predicted", "error"], rows)


def scaling_bytes(machine: Machine) -> str:
    """Return the gradients' bytes by the kind of head."""
    rows = [
        [
            *(row["case"], row["variant"].removeprefix("baseline: "), f"{row['dense_mb']:.1f} MB"),
            *(f"{row['vocabulary_share']:.0%}", f"{row['value']:.2f} MB", f"{row['value'] / row['dense_mb']:.0%}"),
        ]
        for row in of_kind(machine, "gradients")
    ]
    rows = list(map(list, dict.fromkeys(map(tuple, rows))))  # each run has counted the same
    return markdown(["model", "head", "all gradients", "of it embedding and projection", "exchanged", "share"], rows)


def scaling_predictions(machine: Machine) -> str:
    """Return some points of the curves, if only the rows of an embedding are reduced that were read, as lmdist does."""
    return markdown(PREDICTED, [cells for cells, all_rows in predicted(machine) if not all_rows])


def scaling_all_rows(machine: Machine) -> str:
    """Return the same if all rows of an embedding that is not tied were reduced."""
    return markdown(PREDICTED, [cells for cells, all_rows in predicted(machine) if all_rows])


RANKS = (2, 8, 32, 128)
PREDICTED = ["predicted for", "compute per step", "network", *(f"{ranks} GPUs" for ranks in RANKS)]


def predicted(machine: Machine) -> list[tuple[list[str], bool]]:
    """Return the cells of each prediction, and whether all rows of the embedding are reduced in it."""
    return [
        (
            [
                *(row["case"], milliseconds(row["compute_ms"]), row["network"]),
                *(" to ".join(f"{curve[row['ranks'].index(ranks)]:.0%}" for curve in row["curves"]) for ranks in RANKS),
            ],
            row["all_rows"],
        )
        for row in of_kind(machine, "prediction")
    ]


def scaling_assumptions(machine: Machine) -> str:
    """Return the assumptions of the predictions."""
    return markdown(["assumed", ""], [[row["variant"], row["note"]] for row in of_kind(machine, "assumption")])


def of_kind(machine: Machine, kind: str) -> list[dict[str, Any]]:
    """The rows of a kind, of all runs of the scaling benchmark."""
    return [row for run in results(machine, "scaling") for row in run if row["kind"] == kind]


def milliseconds(value: float | None, spread: float | None = None) -> str:
    """A time, with half its spread where there is one."""
    if value is None:
        return ""
    return f"{digits(value, 3)} ms" if spread is None else f"{digits(value, 3)} ± {digits(spread / 2, 2)} ms"


def digits(value: float, count: int) -> str:
    """A number with so many significant digits, without an exponent."""
    return f"{float(f'{value:.{count}g}'):,g}"


WRITTEN = (highlights, options, request_options, generation_config)
"""Lines of several results, and tables of the code."""
MEASURED = (
    quality,
    quality_summary,
    ablations,
    reliability,
    checkpointing,
    memory,
    kills,
    outages,
    preparing,
    finetuning,
    pieces,
    training,
    training_speed,
    speed,
    parts,
    curves,
    scoring,
    serving,
    serving_limits,
    precisions,
    sampling,
    sampling_summary,
    sampling_speeds,
    sampling_options,
    sampling_shares,
    sampling_limits,
    scaling,
    scaling_summary,
    scaling_fit,
    scaling_errors,
    scaling_bytes,
    scaling_predictions,
    scaling_all_rows,
    scaling_assumptions,
)
"""Tables of results, of one machine each."""


def measured(table: Callable[[Machine], str], *, each_machine: bool) -> str:
    """Return a table for each machine that has rows for it, or for the first such machine, which its first cell names.

    A table that is the same on another machine, of what is counted and not measured, comes once.
    """
    found: dict[str, Machine] = {}
    for machine in machines():
        text = table(machine)
        if text.count("\n| ") > 1:  # more than its head
            found.setdefault(text, machine)
    texts = [
        re.sub(r"^\| ([^|]+) \|", rf"| \1 ({machine.in_words()}) |", text, count=1, flags=re.MULTILINE)
        for text, machine in found.items()
    ]
    return "\n".join(texts if each_machine else texts[:1])


def main() -> None:
    """Rewrite the pages, or check them."""
    for path in PAGES:
        tables = {function.__name__: function for function in WRITTEN}
        each_machine = path.parent == RESULTS
        tables |= {function.__name__: partial(measured, function, each_machine=each_machine) for function in MEASURED}
        before = path.read_text(encoding="utf-8")
        after = BLOCK.sub(lambda match, tables=tables: match[1] + tables[match[2]]() + match[3], before)
        if after == before:
            continue
        if "--check" in sys.argv:
            sys.exit(f"{path.name} differs from benchmarks/results: run python benchmarks/readme.py")
        path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()

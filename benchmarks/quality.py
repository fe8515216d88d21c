"""Perplexity against minutes: lmdist's recipe and pytorch/examples' own way of training, on the same cores in turns.

    python benchmarks/quality.py launch/ptb.toml --data ../data/ptb --minutes 30 --json --plot ptb.png
    python benchmarks/quality.py --rows benchmarks/results/quality-*-amx-*.json --plot docs/images/quality.png   # only plot
    python benchmarks/quality.py --quick           # a generated text, some seconds each: does it run?

lmdist is `lmdist-train` with the recipe, to the end of its schedule; with --minutes the number of steps is set so that it
takes about as long, by the speed of a short trial. The baseline is pytorch/examples' word_language_model with its defaults in
plain PyTorch: two LSTM layers of 200, untied, dropout 0.2, SGD from rate 20, divided by 4 whenever an epoch does not improve
the validation loss, the gradient's norm clipped to 0.25, batches of 20 x 35, fp32. It trains as long as lmdist did, on as
many threads as lmdist has ranks.

Both run in turns of --turn seconds: all processes of the other are stopped (SIGSTOP), and only the time that a system runs
counts. Its minutes begin with the start of its command; validation and checkpoints are included. A row of a curve is the
perplexity of a validation. Test perplexity is that of the checkpoint with the best validation, taken once: one stream, state
carried on, every token and every <eos> counted. With --cache the same model is tested with a neural cache as well, tuned on
valid.

The floors: the unigram model of the training text, and the 5-gram model with modified Kneser-Ney smoothing, not pruned, that
KenLM's `lmplz` estimates; without `lmplz` on the PATH it has no row. It is given token ids as words, an <eos> ends a line. On
PTB it has 141 (Mikolov 2012): so these perplexities are counted as everyone's.

--data is a data folder, or a folder with files for train, valid and test, which lmdist-prepare reads with the recipe.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from corpora import chain, write_data_folder
from lmdist.perplexity import perplexity
from lmdist.settings import SPLITS
from lmdist.signals import die_with_parent
from lmdist.storage.reading import read_json
from lmdist.text.vocabulary import END_ID, UNKNOWN_ID
from lmdist.tracking.run_folder import read_metrics
from origin import Row, add_json_option, collect_rows, command_line

if TYPE_CHECKING:
    from torch import Tensor

    from lmdist.text.token_files import Tokens
    from training import PlainModel

PACKAGES = ("lmdist", "torch", "numpy")
BASELINE, OURS, KNESER_NEY, UNIGRAM = "baseline", "lmdist", "KN-5", "unigram"
WITH_CACHE = "lmdist, cache"
LABELS = {
    BASELINE: "pytorch/examples",
    OURS: "lmdist",
    KNESER_NEY: "5-gram, modified Kneser-Ney",
    UNIGRAM: "unigram",
}
STYLES: dict[str, dict[str, Any]] = {
    BASELINE: {"color": "#7f7f7f", "marker": "s"},
    OURS: {"color": "#2171b5", "marker": "o", "linewidth": 2},
    KNESER_NEY: {"color": "#e69f00", "linestyle": "--"},
    UNIGRAM: {"color": "black", "linestyle": ":"},
}
QUIET = [
    *("--tracking.mlflow=false", "--sample.words=0", "--sample.final_words=0", "--resume=never"),
    "--training.timeout_seconds=86400",  # a rank may be stopped for longer than the usual patience of its peers
]
TRIAL_STEPS, TRIAL_LOG_STEPS = 120, 20
TRIAL_TURN = 0.5  # seconds
ALONE = 86400.0  # seconds of a turn that nothing interrupts
SHARE_OF_STEPS = 0.93
"""Of a run's time; the rest is the start, validations and checkpoints."""
ORDER = 5


def main() -> None:
    """Measure, print a table, write the rows and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", type=Path, help="a recipe of launch/, or your own")
    parser.add_argument("--data", type=Path, help="a data folder, or a folder with texts (default: the recipe's data folder)")
    parser.add_argument("--minutes", type=float, help="of each system, about (default: as many steps as the recipe says)")
    parser.add_argument("--nproc", type=int, default=1, help="ranks of lmdist, and threads of the baseline (default: 1)")
    parser.add_argument("--turn", type=float, default=30.0, help="seconds of a turn (default: 30)")
    parser.add_argument("--set", action="append", default=[], metavar="SETTING", help="such as model.dropout=0.4; repeatable")
    parser.add_argument("--cache", type=int, default=0, metavar="N", help="also test with a neural cache of N tokens")
    parser.add_argument("--quick", action="store_true", help="a small generated text, about 12 s each")
    parser.add_argument("--rows", nargs="+", type=Path, help="measure nothing: plot the rows of these files")
    add_json_option(parser)
    parser.add_argument("--plot", type=Path, help="plot perplexity against minutes here, a panel a text")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    command = command_line(parser, arguments)
    if arguments.worker:
        die_with_parent()
        train_baseline(**json.loads(arguments.worker))
        return
    if arguments.rows:
        rows: list[Row] = [row for path in arguments.rows for row in json.loads(path.read_text(encoding="utf-8"))]
    else:
        if arguments.quick:
            arguments.minutes, arguments.turn = arguments.minutes or 0.2, min(arguments.turn, 4.0)
        elif not arguments.recipe:
            parser.error("a recipe is missing, such as launch/ptb.toml")
        name = arguments.recipe.stem if arguments.recipe else "generated"
        with (
            collect_rows(arguments.json, PACKAGES, command, suffix=f"-{name}") as rows,
            tempfile.TemporaryDirectory(prefix="quality-") as scratch,
        ):
            measure(name, arguments, Path(scratch), rows)
    for row in rows:
        ratio = f"  ratio {row['ratio']:.2f}" if row["ratio"] else ""
        minutes = f"{row['minutes']:>8.1f} minutes" if row.get("minutes") else ""
        print(f"{row['case']:<28}{row['variant']:<14}{row['value']:>10,.2f}{ratio}{minutes}")
    if arguments.plot:
        plot(rows, arguments.plot)


def measure(name: str, arguments: argparse.Namespace, scratch: Path, rows: list[Row]) -> None:
    """Append the rows of a recipe: those of the curves at once, those of the test when both are trained."""
    data = data_folder(arguments, scratch)
    flags = [f"--data.folder={data}", *QUIET, *(f"--{setting}" for setting in arguments.set)]
    flags += [f"--config={arguments.recipe}"] if arguments.recipe else []
    flags += ["--training.validate_every=20", "--training.log_every=10"] if arguments.quick else []
    launch = [sys.executable, "-m", "lmdist.job.launcher", f"--nproc-per-node={arguments.nproc}", *flags]
    if arguments.minutes:
        seconds = trial_seconds(launch, scratch / "trial", quick=arguments.quick)
        launch.append(f"--training.steps={steps_within(arguments.minutes, seconds)}")
    ours = training(OURS, launch, scratch / "run")
    job = {"data": str(data), "threads": arguments.nproc, "folder": str(scratch / "baseline"), "evaluate": False}
    examples = [sys.executable, __file__, "--worker", json.dumps(job)]
    baseline = System(BASELINE, examples, scratch / "baseline" / "metrics.jsonl", scratch / "baseline.log")
    try:
        take_turns(ours, baseline, arguments.turn)
    finally:
        rows += curve_rows(f"{name} valid", (baseline, ours), data)
    for split in ("valid", "test"):
        rows += floor_rows(f"{name} {split}", data, split)
    job["evaluate"] = True
    run([sys.executable, __file__, "--worker", json.dumps(job)])
    reference = read_json(scratch / "baseline" / "test.json")["perplexity"]
    evaluate = [sys.executable, "-m", "lmdist.training.evaluate", str(scratch / "run"), "--split=test", "--json"]
    figures = json.loads(run([*evaluate, *([f"--cache={arguments.cache}"] if arguments.cache else [])]))
    static = figures["perplexity_without_cache"] if arguments.cache else figures["perplexity"]
    case, place = f"{name} test", (reference, data, "test")
    rows += [row_of(case, baseline, reference, *place), row_of(case, ours, static, *place)]
    if arguments.cache:
        rows.append({**row_of(case, ours, figures["perplexity"], *place), "variant": WITH_CACHE})


def data_folder(arguments: argparse.Namespace, scratch: Path) -> Path:
    """Return the data folder: the given or the recipe's one, or one that is prepared from texts or generated."""
    if arguments.quick and not arguments.data:
        splits = {name: chain(size, 1000, seed) for seed, (name, size) in enumerate(QUICK_TOKENS.items())}
        for tokens in splits.values():
            tokens[19::20] = END_ID
        return write_data_folder(scratch / "data", splits, 1000)
    recipe = f"--recipe={arguments.recipe}"
    if not arguments.data:
        import tomllib

        return Path(tomllib.loads(arguments.recipe.read_text(encoding="utf-8"))["data"]["folder"]).absolute()
    if (arguments.data / "meta.json").exists():
        return arguments.data.absolute()
    texts = split_files(arguments.data)
    prepare = [sys.executable, "-m", "lmdist.text.prepare", recipe, *(f"--{split}={path}" for split, path in texts.items())]
    run([*prepare, "-o", str(scratch / "data")])
    return scratch / "data"


def split_files(folder: Path) -> dict[str, Path]:
    """Return the file of each split in a folder of texts, by the beginning of its name; exit where one is missing."""
    found = {split: next(iter(sorted(folder.glob(f"*{split[:3]}*"))), None) for split in SPLITS}
    if missing := [split for split, path in found.items() if path is None]:
        sys.exit(f"{folder} is neither a data folder nor has it a file for {' and '.join(missing)}")
    return {split: path for split, path in found.items() if path}


QUICK_TOKENS = {"train": 20_000, "valid": 2_000, "test": 2_000}


def run(command: Sequence[str]) -> str:
    """Return what a command prints; if it fails, its messages end the benchmark."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stderr[-4000:]}\n{' '.join(command)} failed")
    return done.stdout


def trial_seconds(launch: list[str], folder: Path, *, quick: bool) -> float:
    """Return the seconds of a step, from the last steps of a short run of the recipe."""
    trial = training("trial", [*launch, *trial_flags(quick=quick)], folder)
    all_in_turns([trial], ALONE)
    seconds = step_seconds(trial)
    shutil.rmtree(folder)
    return seconds


def trial_flags(*, quick: bool) -> list[str]:
    """Return what makes a training a short one, whose speed is that of a longer one."""
    steps, every = (30, 10) if quick else (TRIAL_STEPS, TRIAL_LOG_STEPS)
    return [f"--training.steps={steps}", f"--training.log_every={every}"]


def steps_within(minutes: float, seconds: float) -> int:
    """Return how many steps of so many `seconds` a training has that takes about so many minutes with all else."""
    return max(20, round(SHARE_OF_STEPS * minutes * 60 / seconds))


# --- two systems in turns --------------------------------------------------------------------------------------------


@dataclass
class System:
    """A training whose processes are stopped and continued, and the time that they have run."""

    name: str
    command: list[str]
    metrics: Path
    log: Path
    spans: list[tuple[float, float]] = field(default_factory=list)
    """Beginning and end of each turn, in seconds since 1970, as metrics.jsonl has them."""
    process: subprocess.Popen[str] | None = None
    peak_mib: int = 0

    def take_turn(self, seconds: float) -> bool:
        """Run for so long, or to the end; return whether it has ended."""
        began = time.time()
        if self.process is None:
            with self.log.open("w") as log:
                self.process = subprocess.Popen(self.command, stdout=log, stderr=log, text=True, start_new_session=True)
        else:
            self.signal(signal.SIGCONT)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=seconds)
        if self.process.returncode is None:
            self.signal(signal.SIGSTOP)
        self.spans.append((began, time.time()))
        if self.process.returncode:
            sys.exit(f"{self.log.read_text()[-4000:]}\n{self.name} failed")
        return self.ended

    def signal(self, number: int) -> None:
        """Send a signal to all its processes, parents first."""
        assert self.process is not None
        with suppress(psutil.NoSuchProcess):
            leader = psutil.Process(self.process.pid)
            processes = [leader, *leader.children(recursive=True)]
            memory = 0
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
                    memory += process.memory_info().rss
            self.peak_mib = max(self.peak_mib, memory >> 20)

    def end(self) -> None:
        """Kill its processes."""
        self.signal(signal.SIGKILL)
        if self.process:
            self.process.wait()

    @property
    def ended(self) -> bool:
        """Return whether it has run to its end."""
        return self.process is not None and self.process.returncode == 0

    @property
    def minutes(self) -> float:
        """Return how long it has run."""
        return self.minutes_at(math.inf)

    def minutes_at(self, moment: float) -> float:
        """Return how long it had run at a moment, in seconds since 1970."""
        return sum(max(0.0, min(end, moment) - begin) for begin, end in self.spans) / 60

    def curve(self) -> list[tuple[float, float]]:
        """Return minutes and perplexity of each validation."""
        rows = [row for row in read_metrics(self.metrics) if "valid/perplexity" in row]
        return [(round(self.minutes_at(row["time"]), 3), round(row["valid/perplexity"], 3)) for row in rows]


def take_turns(ours: System, baseline: System, turn: float) -> None:
    """Run both in turns until ours has ended and the baseline has run as long, and has been validated once."""
    try:
        ended = False
        while not (ended and baseline.minutes >= ours.minutes and baseline.curve()):
            ended = ended or ours.take_turn(turn)
            print("; ".join(map(progress, (ours, baseline))), file=sys.stderr)
            if not ended or baseline.minutes < ours.minutes or not baseline.curve():
                baseline.take_turn(min(turn, 60 * (ours.minutes - baseline.minutes)) if baseline.curve() else turn)
    finally:
        ours.end()
        baseline.end()


def all_in_turns(systems: Sequence[System], turn: float) -> None:
    """Run each to its end in turns with the others; however this ends, none of them is left running."""
    try:
        while left := [system for system in systems if not system.ended]:
            for system in left:
                if system.take_turn(turn):
                    print(progress(system), file=sys.stderr)
    finally:
        for system in systems:
            system.end()


def training(name: str, command: list[str], folder: Path) -> System:
    """Return a training into a run folder, not begun yet."""
    return System(name, [*command, f"--run_folder={folder}"], folder / "metrics.jsonl", folder.with_suffix(".log"))


def trials_in_turns(commands: dict[str, list[str]], scratch: Path, *, quick: bool) -> dict[str, float]:
    """Return the seconds of a step of each training, from short trials in many short turns.

    So each is measured over all minutes of the trials: a machine that others share changes its speed by half within one.
    """
    flags = trial_flags(quick=quick)
    trials = [
        training(name, [*command, *flags], scratch / f"trial {number}")
        for number, (name, command) in enumerate(commands.items())
    ]
    all_in_turns(trials, TRIAL_TURN)
    return {trial.name: step_seconds(trial) for trial in trials}


def step_seconds(trial: System) -> float:
    """Return the seconds that a step of a training ran, by the last two thirds of its log lines."""
    logged = [row for row in read_metrics(trial.metrics) if "train/loss" in row]
    first, last = logged[len(logged) // 3], logged[-1]
    return 60 * (trial.minutes_at(last["time"]) - trial.minutes_at(first["time"])) / (last["step"] - first["step"])


def progress(system: System) -> str:
    """Return the minutes and the last perplexity of a system as text."""
    curve = system.curve()
    return f"{system.name} {system.minutes:.1f} minutes, perplexity {curve[-1][1] if curve else math.nan:,.1f}"


# --- the rows --------------------------------------------------------------------------------------------------------


def curve_rows(case: str, systems: Sequence[System], data: Path) -> list[Row]:
    """Return a row for each curve: the best perplexity, and the perplexity of each validation with its minutes."""
    curves = {system.name: system.curve() for system in systems}
    best = {name: min(value for _, value in curve) for name, curve in curves.items() if curve}
    return [
        {**row_of(case, system, best[system.name], best.get(BASELINE), data, "valid"), "curve": curves[system.name]}
        for system in systems
        if system.name in best
    ]


def row_of(case: str, system: System, value: float, baseline: float | None, data: Path, split: str) -> Row:
    """Return the row of a system: its perplexity on a split after its minutes."""
    return {
        "case": case,
        "variant": system.name,
        "value": round(value, 3),
        "unit": "perplexity",
        "spread": None,
        "ratio": round(baseline / value, 3) if baseline else None,
        "peak_mib": system.peak_mib,
        "minutes": round(system.minutes, 2),
        **text_facts(data, split),
    }


def text_facts(data: Path, split: str) -> dict[str, Any]:
    """Return the number of tokens of a split and the rate of the unknown ones."""
    tokens = tokens_of(data, split)
    return {"words": len(tokens), "unknown_rate": round(float(np.mean(tokens == UNKNOWN_ID)), 5)}


def tokens_of(data: Path, split: str) -> np.ndarray:
    """Return the token ids of a split."""
    from lmdist.training.data import DataFolder

    return DataFolder(data).tokens(split)[:]


# --- the floors ------------------------------------------------------------------------------------------------------


def floor_rows(case: str, data: Path, split: str) -> list[Row]:
    """Return the rows of the unigram model and of the 5-gram model, which know little or nothing of what was said before."""
    from lmdist.training.measuring import unigram_nats

    train, tokens = tokens_of(data, "train"), tokens_of(data, split)
    vocabulary_size = read_json(data / "meta.json")["vocabulary_size"]
    nats = {UNIGRAM: unigram_nats(train, tokens, vocabulary_size), KNESER_NEY: kneser_ney_nats(train, tokens)}
    beside = {"unit": "perplexity", "spread": None, "ratio": None, "peak_mib": None, "minutes": None, **text_facts(data, split)}
    return [
        {"case": case, "variant": name, "value": round(perplexity(value), 3), **beside}
        for name, value in nats.items()
        if value is not None
    ]


def kneser_ney_nats(train: np.ndarray, tokens: np.ndarray) -> float | None:
    """Return nats per token of KenLM's 5-gram model; None without `lmplz`."""
    if not shutil.which("lmplz"):
        print("KenLM's lmplz is not on the PATH: no row of the 5-gram model", file=sys.stderr)
        return None
    with tempfile.TemporaryDirectory() as scratch:
        text, arpa = Path(scratch) / "train.txt", Path(scratch) / "model.arpa"
        text.write_text("".join(" ".join(line[1:-1]) + "\n" for line in sentences(train)))
        estimate = ["lmplz", "-o", str(ORDER), "--text", str(text), "--arpa", str(arpa), "--discount_fallback"]
        run([*estimate, "-S", "1G", "-T", scratch])
        lines = list(sentences(tokens))
        log10, backoff = read_arpa(arpa, set(ngrams(lines)))
    total = sum(
        probability(tuple(line[max(0, place - ORDER + 1) : place + 1]), log10, backoff)
        for line in lines
        for place in range(1, len(line))
    )
    return -total * math.log(10) / sum(len(line) - 1 for line in lines)


def sentences(tokens: np.ndarray) -> Iterator[list[str]]:
    """Yield the ids up to each <eos> as words between <s> and </s>; a rest without <eos> ends there, too."""
    line = ["<s>"]
    for token in tokens.tolist():
        if token == END_ID:
            yield [*line, "</s>"]
            line = ["<s>"]
        else:
            line.append(str(token))
    if len(line) > 1:
        yield [*line, "</s>"]


def ngrams(lines: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the n-grams of all orders that occur in lines."""
    for line in lines:
        for place in range(len(line)):
            for order in range(1, ORDER + 1):
                yield " ".join(line[place : place + order])


def read_arpa(path: Path, needed: set[str]) -> tuple[dict[str, float], dict[str, float]]:
    """Return log10 probabilities and back-off weights of the n-grams that are needed, and of <unk>."""
    log10: dict[str, float] = {}
    backoff: dict[str, float] = {}
    with path.open(encoding="utf-8") as file:
        for line in file:
            value, tab, rest = line.rstrip("\n").partition("\t")
            words, _, weight = rest.partition("\t")
            if tab and (words in needed or words == "<unk>"):
                log10[words] = float(value)
                backoff[words] = float(weight or 0)
    return log10, backoff


def probability(words: tuple[str, ...], log10: dict[str, float], backoff: dict[str, float]) -> float:
    """Return the log10 probability of the last word after those before it: Katz's recursion over a back-off model."""
    if (found := log10.get(" ".join(words))) is not None:
        return found
    if len(words) == 1:
        return log10["<unk>"]
    return backoff.get(" ".join(words[:-1]), 0.0) + probability(words[1:], log10, backoff)


# --- the baseline ----------------------------------------------------------------------------------------------------


def train_baseline(data: str, threads: int, folder: str, *, evaluate: bool) -> None:
    """Train as pytorch/examples' word_language_model does, until it is killed; or test the best model of such a training."""
    import torch
    from torch import nn
    from torch.nn import functional

    from lmdist.settings import ModelSettings
    from lmdist.training.data import DataFolder
    from training import PlainModel

    torch.set_num_threads(threads)
    torch.manual_seed(1111)
    source, place = DataFolder(Path(data)), Path(folder)
    model = PlainModel(ModelSettings(200, 200, 2, 0.2, tied=False), source.vocabulary_size)
    if evaluate:
        model.load_state_dict(torch.load(place / "best.pt", weights_only=True))
        nats = nats_of(model, source.tokens("test"), streams=1, window=256)
        (place / "test.json").write_text(json.dumps({"perplexity": perplexity(nats)}))
        return
    place.mkdir()
    for weight in (model.embedding.weight, model.projection.weight):
        nn.init.uniform_(weight, -0.1, 0.1)
    nn.init.zeros_(model.projection.bias)
    tokens = torch.from_numpy(source.tokens("train")[:].astype(np.int64))
    streams = tokens[: len(tokens) // 20 * 20].view(20, -1)  # (B, N)
    rate, best, epoch = 20.0, math.inf, 0
    while True:
        model.train()
        states = None
        for start in range(0, streams.shape[1] - 1, 35):
            length = min(35, streams.shape[1] - 1 - start)
            inputs, targets = streams[:, start : start + length], streams[:, start + 1 : start + 1 + length]
            logits, _, _, states = model(inputs, states)
            model.zero_grad()
            functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.25)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(parameter.grad, alpha=-rate)  # type: ignore[arg-type]
        epoch += 1
        nats = nats_of(model, source.tokens("valid"), streams=10, window=35)
        if nats < best:
            best = nats
            torch.save(model.state_dict(), place / "new.pt")
            (place / "new.pt").replace(place / "best.pt")
        else:
            rate /= 4
        with (place / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": epoch, "time": time.time(), "valid/perplexity": perplexity(nats)}) + "\n")


def nats_of(model: PlainModel, tokens: Tokens, streams: int, window: int) -> float:
    """Return nats per token of a text, cut into streams, each token predicted once and the state carried on."""
    import torch
    from torch.nn import functional

    from lmdist.model.loss import IGNORED
    from lmdist.training.data import Streams

    model.eval()
    batches = Streams(tokens, streams, window)
    states: list[tuple[Tensor, Tensor]] | None = None
    total, counted = 0.0, 0
    with torch.no_grad():
        for number in range(batches.steps_per_epoch):
            batch = batches.batch(number, slice(0, streams))
            logits, _, _, states = model(batch.inputs, states)  # type: ignore[assignment]
            flat, targets = logits.flatten(0, 1), batch.targets.flatten()
            total += float(functional.cross_entropy(flat, targets, ignore_index=IGNORED, reduction="sum"))
            counted += int((targets != IGNORED).sum())
    return total / counted


# --- the picture -----------------------------------------------------------------------------------------------------


def plot(rows: list[Row], picture: Path) -> None:
    """Plot validation perplexity against minutes, a panel a text, with the floors as lines and the test's figures in words."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    cases = list(dict.fromkeys(row["case"] for row in rows if row.get("curve")))
    figure, panels = pyplot.subplots(1, len(cases), figsize=(5.2 * len(cases), 4.2), layout="constrained", squeeze=False)
    for axes, case in zip(panels[0], cases, strict=True):
        name = case.removesuffix(" valid")
        tested = {row["variant"]: row["value"] for row in rows if row["case"] == f"{name} test"}
        for row in (row for row in rows if row["case"] == case):
            variant = row["variant"]
            label = LABELS[variant] + (f": test {tested[variant]:,.1f}" if variant in tested else "")
            if variant == OURS and WITH_CACHE in tested:
                label += f", with a cache {tested[WITH_CACHE]:,.1f}"
            if row.get("curve"):
                axes.plot(*zip(*row["curve"], strict=True), label=label, markersize=4, **STYLES[variant])
            elif variant == KNESER_NEY or row["value"] < 3 * min(tested.values(), default=math.inf):
                axes.axhline(row["value"], label=label, **STYLES[variant])
            else:  # far above: it would flatten the curves
                axes.plot([], [], label=label, **STYLES[variant])
        axes.set(title=name, xlabel="minutes of running time", yscale="log", xlim=0)
        lowest = min(value for row in rows if row["case"] == case and row.get("curve") for _, value in row["curve"])
        axes.set_ylim(lowest * 0.92, lowest * 5)
        for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.tick_params(axis="y", which="minor", labelsize=7)
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    panels[0][0].set_ylabel("perplexity on valid")
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()

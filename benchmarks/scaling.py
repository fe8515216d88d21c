"""How training scales with the ranks: measurements on the devices that are here, and a model fitted to them, to 128 GPUs.

    python benchmarks/scaling.py [--quick] [--device cuda] [--json benchmarks/results/scaling-MACHINE-DATE.json]
    python benchmarks/scaling.py --rows FILE --step-ms 10 --plot docs/images/scaling.svg    # predict again, measure nothing

It starts itself under torchrun for each number of ranks, one after the other, several rounds. The steps are the training
loop's own (without the CUDA graph, which only training on one GPU has), on tokens sampled by Zipf's law. The ranks wait for
each other before each thing that is timed, and the slowest rank's time counts.

    step        forward, backward with DDP's all-reduce, clipping, optimizer
    compute     the same by ranks that exchange nothing (DDP's no_sync): W independent jobs side by side. Against one rank
                these lose to contention for the machine, its memory above all, and not to communication
    all-reduce  as many bytes as the step reduces, alone and in one tensor; and fractions of them, for the fit
    gradients   the bytes that one rank hands to the process group in a step, counted by the profiler in a job of two ranks
    exposed     step - compute, turn by turn: all that DDP adds, the copies into its buckets included
    overlap     1 - exposed / all-reduce, from 0 to 1: the share of the communication that the computation hides

In weak scaling each rank has the batch size of the one rank, in strong scaling the ranks divide it. The model of a step and
its assumptions are in scaling_model.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, distributed
from torch.profiler import profile

from lmdist.command_line import run_as_process
from lmdist.counted import counted
from lmdist.cpus import MEMORY_ENVIRONMENT
from lmdist.model.language_model import LanguageModel
from lmdist.model.loss import summed_nats
from lmdist.model.precision import Precision, choose, configure_precision
from lmdist.settings import DataSettings, ModelSettings, Recipe, TrainingSettings
from lmdist.signals import die_with_parent
from lmdist.training.distributed import World, join_job
from lmdist.training.step import TrainingStep
from origin import add_json_option, collect_rows, command_line
from scaling_model import NETWORKS, Row, bare, fit, frequencies, plot, predict


@dataclass(frozen=True)
class Case:
    """A model, and the batch that one rank reads."""

    settings: ModelSettings
    vocabulary_size: int
    batch_size: int
    window: int


SMALL = ModelSettings(embedding_size=200, hidden_size=200, dropout=0.2)
ADAPTIVE = dataclasses.replace(SMALL, tied=False, head="adaptive")
TUTORIAL = ModelSettings(embedding_size=100, hidden_size=1024, dropout=0.0, tied=False)
CASES = {
    "2x200 tied, V 10k, 20 x 35": Case(SMALL, 10_000, 20, 35),
    "2x200 tied, V 33k, 20 x 35": Case(SMALL, 33_278, 20, 35),
    "2x200 adaptive, V 33k, 20 x 35": Case(ADAPTIVE, 33_278, 20, 35),
    "2x1024 untied, V 33k, 30 x 19": Case(TUTORIAL, 33_278, 30, 19),
}
COUNTED = {
    f"{model}, V {vocabulary}": {
        variant: Case(dataclasses.replace(settings, **changes), vocabulary_size, batch_size, window)
        for variant, changes in {
            "baseline: untied": {"tied": False, "head": "full"},
            "tied": {"tied": True, "head": "full"},
            "adaptive head": {"tied": False, "head": "adaptive"},
        }.items()
        if variant != "tied" or settings.embedding_size == settings.hidden_size  # else its last layer has another size
    }
    for model, settings, batch_size, window in (("2x200", SMALL, 20, 35), ("2x1024", TUTORIAL, 30, 19))
    for vocabulary, vocabulary_size in (("10k", 10_000), ("33k", 33_278))
}
"""The models whose bytes are counted, by the kind of head."""
FRACTIONS = (1, 16, 256, 4096)
"""Parts of the gradients: the sizes of the messages that the model is fitted to."""
WARM_UP, LEAST, MOST, MESSAGES = 3, 3, 200, 12
"""Steps before those that are timed, the fewest and the most of these, and how often a message is timed."""

SHOWN = ("predicted_ms", "dense_mb", "ratio", "compute_ms", "contention", "all_reduce_ms", "exposed_ms", "overlap", "peak_mib")

Figures = dict[str, float]
"""Seconds, by what was timed, and numbers, by what was counted."""
Answer = dict[str, Any]
"""What the ranks of one job have measured, in one round."""


def main() -> None:
    """Measure, fit, predict; print a table, write the rows and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 short rounds of the first case")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ranks", help="such as 1,2,4; by default 1, 2, 4 ... as many as there are devices")
    parser.add_argument("--precision", default="auto", help="as training.precision")
    parser.add_argument("--compression", choices=("none", "bf16"), default="none", help="as training.gradient_compression")
    parser.add_argument("--rounds", type=int, help="3 by default, quick 2")
    parser.add_argument("--seconds", type=float, help="of steps, about, per round and kind of scaling: 4 by default, quick 2")
    parser.add_argument("--bandwidth", type=float, help="GB/s of the network to predict for, in place of three typical ones")
    parser.add_argument("--latency", type=float, default=10.0, help="us per message on it")
    parser.add_argument("--step-ms", type=float, help="compute time of a step to predict for, in place of the measured one")
    parser.add_argument("--rows", type=Path, help="take the measured rows from this file")
    add_json_option(parser)
    parser.add_argument("--plot", type=Path, help="plot the predictions here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        run_as_process(lambda: work(arguments))  # the profiler's thread may still run
    command = command_line(parser, arguments)
    arguments.rounds = arguments.rounds or (2 if arguments.quick else 3)
    arguments.seconds = arguments.seconds or (2.0 if arguments.quick else 4.0)
    networks = {"the given network": (arguments.bandwidth, arguments.latency)} if arguments.bandwidth else NETWORKS
    with collect_rows(arguments.json, ("lmdist", "torch", "numpy"), command, arguments.device) as rows:
        if arguments.rows:
            known = json.loads(arguments.rows.read_text(encoding="utf-8"))
            rows += [row for row in known if row["kind"] in ("step", "all-reduce", "gradients")]
        else:
            measure(arguments, rows)
            gradients(arguments, rows)
        rows += fit(rows) + predict(rows, networks, arguments.step_ms)
    for row in rows:
        show(row)
    if arguments.plot:
        plot(rows, arguments.plot)


def show(row: Row) -> None:
    """Print a row."""
    value = f"{row['value']:>12,.4g} {row['unit']}" if row["value"] is not None else f"  {row['note']}"
    spread = f" +- {row['spread'] / 2:,.3g}" if row["spread"] is not None else ""
    beside = [f"{name} {row[name]:,.4g}" for name in SHOWN if row.get(name) is not None]
    print(f"{row['case']:<32}{row['variant']:<30}{value}{spread}  {', '.join(beside)}")


def measure(arguments: argparse.Namespace, rows: list[Row]) -> None:
    """Append the rows of all cases on all numbers of ranks, which take turns; if stopped, those of the rounds so far."""
    device = torch.device(arguments.device)
    devices = torch.cuda.device_count() if device.type == "cuda" else len(os.sched_getaffinity(0))
    if not devices:
        sys.exit("--device cuda, and torch sees no GPU: check nvidia-smi and the torch build")
    powers_of_two = [1 << power for power in range(devices.bit_length())]
    all_ranks = sorted({1, *map(int, arguments.ranks.split(","))}) if arguments.ranks else powers_of_two
    cases = list(CASES)[:1] if arguments.quick else list(CASES)
    torch.set_num_threads(1)
    precisions = {
        case: choose(arguments.precision, "", device, CASES[case].settings, CASES[case].batch_size).name for case in cases
    }
    answers: dict[tuple[str, int], list[Answer]] = {(case, ranks): [] for case in cases for ranks in all_ranks}
    try:
        for number in range(arguments.rounds):
            for case, ranks in answers:
                print(f"round {number + 1} of {arguments.rounds}: {case}, {counted(ranks, 'rank')}", file=sys.stderr)
                answers[case, ranks].append(run_job({"worker": case, "precision": precisions[case]}, ranks, arguments))
    finally:
        rows += rows_of(answers)


def rows_of(answers: dict[tuple[str, int], list[Answer]]) -> list[Row]:
    """Return the rows of what was measured of each case by each number of ranks, the smallest first."""
    rows: list[Row] = []
    alone: dict[str, Row] = {}
    for (case, ranks), here in answers.items():
        if here:
            messages = [message_row(case, ranks, size, here) for size in here[0]["messages"]]
            steps = [step_row(case, ranks, scaling, here, messages, alone.get(case)) for scaling in here[0]["steps"]]
            alone.setdefault(case, steps[0])
            rows += [*steps, *messages]
    return rows


def run_job(flags: dict[str, Any], ranks: int, arguments: argparse.Namespace) -> Answer:
    """Return what a job of so many ranks, started by torchrun with these flags, measures."""
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "answer.json"
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", __file__]
        flags = {**flags, "answer": answer}
        flags |= {name: getattr(arguments, name) for name in ("device", "compression", "seconds")}
        done = subprocess.run(
            [sys.executable, *torchrun, *(f"--{name}={value}" for name, value in flags.items())],
            env={**os.environ, **MEMORY_ENVIRONMENT, "OMP_NUM_THREADS": "1"},  # as lmdist-train sets them
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(f"{done.stderr}{flags['worker']} on {counted(ranks, 'rank')} failed")
        return json.loads(answer.read_text(encoding="utf-8"))


def step_row(case: str, ranks: int, scaling: str, rounds: list[Answer], messages: list[Row], alone: Row | None) -> Row:
    """Return the row of a step: medians of the rounds' medians, and their spread; `alone` is the row of one rank."""
    milliseconds = {
        key: [1e3 * answer["steps"][scaling][key] for answer in rounds] for key in ("step", "compute", "backward", "exposed")
    }
    step, compute, backward, exposed = (median(values) for values in milliseconds.values())
    all_reduce = max((row["value"] for row in messages), default=None)
    share = 1 / ranks if scaling == "strong" else 1.0
    return {
        "kind": "step",
        "case": case,
        "variant": f"{ranks} ranks, {scaling}" if alone else "baseline: 1 rank",
        "value": round(step, 2),
        "unit": "ms a step",
        "spread": spread(milliseconds["step"]),
        "ratio": round(share * alone["value"] / step, 3) if alone else 1.0,  # the efficiency
        "peak_mib": max(answer["peak_mib"] for answer in rounds),
        "ranks": ranks,
        "compute_ms": round(compute, 2),
        "compute_spread": spread(milliseconds["compute"]),
        "backward_ms": round(backward, 2),
        "contention": round(compute / (share * alone["compute_ms"]), 3) if alone else 1.0,
        "all_reduce_ms": all_reduce,
        "exposed_ms": round(exposed, 2) if all_reduce else None,
        "exposed_spread": spread(milliseconds["exposed"]) if all_reduce else None,
        "overlap": round(min(max(1 - exposed / all_reduce, 0.0), 1.0), 3) if all_reduce else None,
        **rounds[0]["facts"],
        "tokens": rounds[0]["steps"][scaling]["tokens"],
    }


def message_row(case: str, ranks: int, size: str, rounds: list[Answer]) -> Row:
    """Return the row of an all-reduce of `size` bytes alone."""
    values = [1e3 * answer["messages"][size] for answer in rounds]
    row = bare("all-reduce", case, f"{int(size):,} bytes, {ranks} ranks", round(median(values), 4), "ms")
    return {**row, "spread": spread(values), "ranks": ranks, "bytes": int(size), "device": rounds[0]["facts"]["device"]}


def spread(values: list[float]) -> float:
    """Return the distance between the largest and the smallest value."""
    return round(max(values) - min(values), 4)


def gradients(arguments: argparse.Namespace, rows: list[Row]) -> None:
    """Append the bytes that a rank of two exchanges in a step with each kind of head, beside those of all gradients."""
    for name in list(COUNTED)[:1] if arguments.quick else COUNTED:
        print(f"bytes: {name}", file=sys.stderr)
        counted = run_job({"worker": name, "precision": "fp32"}, 2, arguments)
        for variant, sizes in counted.items():
            row = bare("gradients", name, variant, round(sizes["exchanged_mb"], 2), "MB a step")
            baseline_mb = counted["baseline: untied"]["exchanged_mb"]
            rows.append({**row, **sizes, "ratio": round(baseline_mb / sizes["exchanged_mb"], 3)})


def gradient_sizes(model: LanguageModel, dtype: torch.dtype) -> dict[str, Any]:
    """Return the bytes of gradients in `dtype`: of all, of all but the embedding, of one of the embedding's rows."""
    numbers = {parameter: parameter.numel() for parameter in model.parameters()}  # a tied matrix once
    outer = {*model.embedding.parameters(), *model.projection.parameters()}
    embedding = model.embedding.weight
    return {
        "dense_mb": sum(numbers.values()) * dtype.itemsize / 1e6,
        "early_mb": (sum(numbers.values()) - embedding.numel()) * dtype.itemsize / 1e6,
        "row_bytes": embedding.shape[1] * dtype.itemsize,
        "vocabulary_size": model.vocabulary_size,
        "tied": model.settings.tied,
        "vocabulary_share": round(sum(numbers[parameter] for parameter in outer) / sum(numbers.values()), 3),
    }


def count(world: World, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the sizes of gradients of each kind of head, and the megabytes that one rank exchanges in a step."""
    counted = {}
    for variant, case in COUNTED[arguments.worker].items():
        training = Training(world, case, Precision(arguments.precision, ""), arguments.compression)
        sizes = gradient_sizes(training.model, training.dtype)
        counted[variant] = {**sizes, "exchanged_mb": training.exchanged_bytes(case.batch_size) / 1e6}
    return counted


def work(arguments: argparse.Namespace) -> None:
    """Measure, as one rank, the steps and the messages of a case, or count bytes; rank 0 writes the answer."""
    die_with_parent()
    world = join_job(arguments.device, int(os.environ["WORLD_SIZE"]), 1, timeout_seconds=120)
    answer = count(world, arguments) if arguments.worker in COUNTED else time_case(world, arguments)
    if world.is_main:
        arguments.answer.write_text(json.dumps(answer), encoding="utf-8")
    world.close()


def time_case(world: World, arguments: argparse.Namespace) -> Answer:
    """Return what is measured of a case's steps and messages."""
    case = CASES[arguments.worker]
    training = Training(world, case, Precision(arguments.precision, ""), arguments.compression)
    sizes = gradient_sizes(training.model, training.dtype)
    steps = {"weak": training.measure(case.batch_size, arguments.seconds)}
    messages = {}
    if world.size > 1:
        if case.batch_size % world.size == 0:
            steps["strong"] = training.measure(case.batch_size // world.size, arguments.seconds)
        exchanged = training.exchanged_bytes(case.batch_size)
        for fraction in FRACTIONS:
            message = torch.zeros(exchanged // fraction // training.dtype.itemsize, dtype=training.dtype, device=world.device)
            ready = {"message": lambda message=message: partial(distributed.all_reduce, message)}
            time_in_turns(world, ready, WARM_UP)
            messages[message.nbytes] = median(time_in_turns(world, ready, MESSAGES)["message"])
    on_gpu = world.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    peaks = world.gather(torch.tensor([peak]))
    device = torch.cuda.get_device_name() if on_gpu else "CPU"
    return {
        **{"steps": steps, "messages": messages, "peak_mib": int(peaks.max()) >> 20},
        "facts": {"device": device, "precision": training.precision.name, "compression": arguments.compression, **sizes},
    }


class Training:
    """The training loop's step on one rank, in parts that can be timed."""

    def __init__(self, world: World, case: Case, precision: Precision, compression: str) -> None:
        torch.set_flush_denormal(True)
        torch.manual_seed(1)
        self.world, self.case, self.precision = world, case, precision
        self.model = LanguageModel(case.settings, case.vocabulary_size).to(world.device)
        recipe = Recipe(
            data=DataSettings(global_batch=case.batch_size * world.size, window=case.window),
            model=case.settings,
            training=TrainingSettings(gradient_compression=compression),  # type: ignore[arg-type]
        )
        self.training_step = TrainingStep(recipe, self.model, precision, world)
        self.learning_rate = recipe.optimizer.learning_rate
        self.dtype = torch.bfloat16 if compression == "bf16" else torch.float32
        configure_precision(precision, self.model, world.device, case.batch_size, case.window)

    def measure(self, batch_size: int, seconds: float) -> Figures:
        """Return median seconds of a step, of one that exchanges nothing, of their difference, and of a backward pass alone.

        `batch_size` is this rank's; the measurement takes about `seconds`. Beside them is the number of tokens read.
        """
        ids = self.sample(batch_size)  # (B, T + 1)
        tokens = ids.to(self.world.device)
        ready = {
            "step": lambda: partial(self.step, tokens, ids[:, :-1]),
            "compute": lambda: partial(self.step, tokens),
            "backward": lambda: self.forward_unsynchronized(tokens).backward,
        }
        turn = sum(map(median, time_in_turns(self.world, ready, WARM_UP).values()))
        found = time_in_turns(self.world, ready, min(max(int(seconds / turn), LEAST), MOST))
        exposed = [step - compute for step, compute in zip(found["step"], found["compute"], strict=True)]
        medians = {name: median(values) for name, values in {**found, "exposed": exposed}.items()}
        return {**medians, "tokens": batch_size * self.case.window}

    def sample(self, batch_size: int) -> Tensor:
        """Return tokens of this rank by Zipf's law, (B, T + 1), on the CPU."""
        torch.manual_seed(self.world.rank)
        probabilities = torch.from_numpy(frequencies(self.case.vocabulary_size))
        return probabilities.multinomial(batch_size * (self.case.window + 1), replacement=True).view(batch_size, -1)

    def exchanged_bytes(self, batch_size: int) -> int:
        """Return the bytes of the tensors that this rank hands to the process group in a step of a batch of this size."""
        ids = self.sample(batch_size)
        tokens = ids.to(self.world.device)
        for _ in range(2):  # DDP rebuilds its buckets in the second step
            self.step(tokens, ids[:, :-1])
        with profile(record_shapes=True) as profiler:
            self.step(tokens, ids[:, :-1])
        shapes = {"all_reduce": self.dtype, "all_gather": torch.int32}  # gradients, ids
        total = 0
        for event in profiler.events() or []:
            backend, _, collective = event.name.partition(":")
            if backend in ("gloo", "nccl"):
                total += sum(map(math.prod, event.input_shapes)) * shapes[collective].itemsize
        return total

    def step(self, tokens: Tensor, exchanged: Tensor | None = None) -> None:
        """Take a step of the loop on tokens (B, T + 1), whose gradients are averaged over the ranks if `exchanged` is given.

        `exchanged` are the tokens that are read, (B, T), on the CPU.
        """
        self.model.zero_grad(set_to_none=True)
        embedding_rows = self.training_step.embedding_rows
        if exchanged is not None:
            embedding_rows.start(exchanged)
        with self.world.gradient_sync(self.training_step.network, enabled=exchanged is not None):
            self.training_step.scaler.scale(self.forward(tokens)).backward()
        if exchanged is not None:
            embedding_rows.finish()
        self.training_step.clip_and_update(self.learning_rate)

    def forward_unsynchronized(self, tokens: Tensor) -> Tensor:
        """Return the mean nats of a batch, whose backward pass exchanges nothing."""
        self.model.zero_grad(set_to_none=True)
        with self.world.gradient_sync(self.training_step.network, enabled=False):
            return self.forward(tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the mean nats of a batch of tokens (B, T + 1)."""
        targets = tokens[:, 1:]  # (B, T)
        masks = self.model.dropout.draw(1, 0, len(tokens), slice(None)).to(self.world.device)
        with self.precision.autocast(self.world.device):
            raw, _ = self.training_step.network(tokens[:, :-1], self.model.initial_state(len(tokens)), masks)  # (B, T, H)
            hidden = self.model.dropout.drop_vectors(raw, -1, masks)
            weight = torch.full((), 1 / targets.numel(), device=self.world.device)
            return summed_nats(hidden, self.model.projection, targets, weight) * weight


def time_in_turns(world: World, ready: Mapping[str, Callable[[], Callable[[], object]]], times: int) -> dict[str, list[float]]:
    """Return the seconds of the action that each entry prepares, in turns; of each time, those of the slowest rank."""
    seconds = torch.zeros(1, len(ready), times, dtype=torch.float64)
    for number in range(times):
        for place, prepare in enumerate(ready.values()):
            action = prepare()
            world.sum([0.0])  # the ranks wait for each other
            start_time = clock(world)
            action()
            seconds[0, place, number] = clock(world) - start_time
    slowest = world.gather(seconds).amax(0)  # (entries, times)
    return dict(zip(ready, slowest.tolist(), strict=True))


def clock(world: World) -> float:
    """Return a time in seconds, after the GPU has finished its work."""
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()

"""Speed and memory of a training step: lmdist against the plain PyTorch that people write.

    python benchmarks/training.py [--json benchmarks/results/training-MACHINE-DATE.json] [--plot FILE]     # one CPU core
    python benchmarks/training.py --quick
    python benchmarks/training.py --device cuda --json benchmarks/results/training-MACHINE-DATE.json

On a CPU: the tutorial's model, that of pytorch/examples and AWD-LSTM, each with three vocabularies. The baseline is PlainJob
below; it does the same work on the same tokens. That of AWD-LSTM with the largest vocabulary needs 18 GB and is not run unless
--all is given; its case has no ratios then. Each variant is a process of its own on one core, and they take turns of some
steps, so a machine that slows down slows all of them. lmdist's processes have the environment that lmdist-train sets, the
baseline's has none. Peak memory is that of the process less what it had before the model was built. The tokens are sampled by
Zipf's law, so the adaptive head has about as many rare tokens as in English.

`parts` times the parts of a step alone, against a floor: the time of its matrix multiplications at the speed of a large one.

On a GPU: a 3x1024 LSTM in all precisions with batch sizes of 32 to 512, the time of a step against its floor (5 us for each
layer and token, FlashRNN's figure for a persistent kernel, or the matrix multiplications at the speed of a large one,
whichever is longer), and whether cuDNN's kernels were the persistent ones.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lmdist.cpus import MEMORY_ENVIRONMENT
from lmdist.model.cuda_graph import Graphed
from lmdist.model.language_model import LanguageModel
from lmdist.model.loss import summed_nats
from lmdist.model.precision import Precision, choose, configure_precision
from lmdist.settings import DataSettings, ModelSettings, OptimizerSettings, Recipe
from lmdist.training.distributed import World
from lmdist.training.step import TrainingStep
from origin import add_json_option, collect_rows, command_line
from workers import Worker, seconds_of

BASELINE = "baseline"
PERSISTENT_SECONDS = 5e-6


@dataclass
class Case:
    """A model, its batches and its optimizer."""

    name: str
    model: ModelSettings
    vocabulary_size: int
    batch_size: int
    length: int
    optimizer: OptimizerSettings

    @property
    def needs_much_memory(self) -> bool:
        """Whether the logits of all tokens, their gradients and copies need more than most machines have: some 18 GB."""
        return self.batch_size * self.length * self.vocabulary_size > 1e9

    @property
    def floating_point_operations(self) -> dict[str, float]:
        """Those of a step's matrix multiplications, forward and backward, by part."""
        tokens = self.batch_size * self.length
        sizes = [self.model.embedding_size, *self.model.layer_sizes]
        layers = sum(8 * size * (size_in + size) for size_in, size in pairwise(sizes))
        return {"LSTM": 3 * tokens * layers, "head": 6 * tokens * sizes[-1] * self.vocabulary_size}


def cases(quick: bool) -> list[Case]:
    """The three models with each vocabulary."""
    plain_sgd = OptimizerSettings("sgd", 0.1, weight_decay=0, clip=0)
    clipped = OptimizerSettings("sgd", 20.0, weight_decay=0, clip=0.25)
    awd = OptimizerSettings("sgd", 30.0, weight_decay=1.2e-6, clip=0.25, activation_penalty=2, temporal_penalty=1)
    models = {
        "tutorial 2x1024, 30 x 19": (ModelSettings(100, 1024, 2, 0.0, tied=False), 30, 19, plain_sgd),
        "pytorch/examples 2x200, 20 x 35": (ModelSettings(200, 200, 2, 0.2, tied=True), 20, 35, clipped),
        "AWD-LSTM 3x1150, 80 x 70": (ModelSettings(400, 1150, 3, 0.4, weight_dropout=0.5, tied=True), 80, 70, awd),
    }
    return [
        Case(f"{name}, V {size // 1000}k", model, size, batch_size, length, settings)
        for name, (model, batch_size, length, settings) in list(models.items())[: 2 if quick else 3]
        for size in ((10_000,) if quick else (10_000, 33_278, 200_000))
    ]


# --- the baseline: what people write ---------------------------------------------------------------------------------


class PlainModel(nn.Module):
    """Embedding, one nn.LSTM if all layers have one size, and a linear layer to the logits of all tokens."""

    def __init__(self, settings: ModelSettings, vocabulary_size: int) -> None:
        super().__init__()
        self.settings = settings
        self.embedding = nn.Embedding(vocabulary_size, settings.embedding_size)
        sizes = [settings.embedding_size, *settings.layer_sizes]
        if len(set(settings.layer_sizes)) == 1 and not settings.weight_dropout:
            stack = [nn.LSTM(sizes[0], sizes[1], settings.num_layers, dropout=settings.dropout, batch_first=True)]
        else:
            stack = [nn.LSTM(*pair, batch_first=True) for pair in pairwise(sizes)]
        self.stack = nn.ModuleList(stack)
        self.dropout = nn.Dropout(settings.dropout)
        self.projection = nn.Linear(sizes[-1], vocabulary_size)
        if settings.tied:
            self.projection.weight = self.embedding.weight

    def forward(self, tokens: Tensor, states: list[tuple[Tensor, Tensor]] | None) -> tuple[Tensor, ...]:
        """Logits (B, T, V), the last layer's outputs before and after dropout, and the states."""
        hidden, new_states = self.dropout(self.embedding(tokens)), []
        for number, layer in enumerate(self.stack):
            if number:
                hidden = self.dropout(hidden)
            if self.settings.weight_dropout:
                first, recurrent, *biases = layer.parameters()
                dropped = functional.dropout(recurrent, self.settings.weight_dropout, self.training)
                weights = [first, dropped, *biases]
                zeros = hidden.new_zeros(1, len(tokens), layer.hidden_size)  # type: ignore[arg-type]
                state = states[number] if states else (zeros, zeros)
                hidden, *state = torch._VF.lstm(hidden, state, weights, True, 1, 0.0, self.training, False, True)  # type: ignore[attr-defined]
            else:
                hidden, state = layer(hidden, states[number] if states else None)
            new_states.append(tuple(part.detach() for part in state))
        dropped = self.dropout(hidden)
        return self.projection(dropped), hidden, dropped, new_states  # type: ignore[return-value]


class PlainJob:
    """A training step as people write it."""

    def __init__(self, case: Case) -> None:
        self.settings = case.optimizer
        self.model = PlainModel(case.model, case.vocabulary_size)
        kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[self.settings.name]
        self.optimizer = kind(self.model.parameters(), self.settings.learning_rate, weight_decay=self.settings.weight_decay)
        self.states: Any = None

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Take a step; return the nats per token."""
        logits, raw, dropped, self.states = self.model(inputs, self.states)
        nats = loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        if self.settings.activation_penalty:
            loss = loss + self.settings.activation_penalty * dropped.pow(2).mean()
            loss = loss + self.settings.temporal_penalty * (raw[:, 1:] - raw[:, :-1]).pow(2).mean()
        self.optimizer.zero_grad()
        loss.backward()
        if self.settings.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        return nats.detach()


# --- lmdist ----------------------------------------------------------------------------------------------------------


class Job:
    """The training loop's own step, on batches that are on the device already."""

    def __init__(self, case: Case, precision: Precision, device: torch.device) -> None:
        torch.set_flush_denormal(True)
        self.case = case
        self.precision = precision
        self.device = device
        self.model = LanguageModel(case.model, case.vocabulary_size).to(device)
        data = DataSettings(global_batch=case.batch_size, window=case.length)
        recipe = Recipe(data=data, model=case.model, optimizer=case.optimizer)
        self.training_step = TrainingStep(recipe, self.model, precision, World(0, 1, device))
        configure_precision(precision, self.model, device, case.batch_size, case.length)
        self.weight = torch.full((), 1 / (case.batch_size * case.length), device=device)
        self.steps = 0

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Take a step; return the nats per token."""
        training_step = self.training_step
        masks = training_step.masks(self.steps)
        nats, *state = training_step.compute_part(inputs, targets, self.weight, *masks, *training_step.state)
        self.steps += 1
        training_step.state = tuple(state)
        training_step.clip_and_update(self.case.optimizer.learning_rate)
        return nats * self.weight


# --- a process for each variant --------------------------------------------------------------------------------------


def batches_of(case: Case, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of tokens sampled by Zipf's law, with Mandelbrot's 2.7."""
    frequency = 1 / (torch.arange(case.vocabulary_size, dtype=torch.float64) + 2.7)
    generator = torch.Generator().manual_seed(0)
    while True:
        tokens = torch.multinomial(frequency, case.batch_size * (case.length + 1), replacement=True, generator=generator)
        tokens = tokens.view(case.batch_size, -1).to(device)
        yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def worker(case: Case, variant: str) -> None:
    """Answer each line on stdin, a number of steps, by the seconds they took; `parts` by the seconds of the parts."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cpu = torch.device("cpu")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    job = PlainJob(case) if variant == BASELINE else Job(case, choose("auto", "", cpu, case.model, case.batch_size), cpu)
    batches = batches_of(case, cpu)
    for line in sys.stdin:
        if line.strip() == "parts":
            assert isinstance(job, Job)
            answer: Any = parts(job, *next(batches))
        else:
            ready = [next(batches) for _ in range(int(line))]
            began = time.perf_counter()
            for batch in ready:
                job.step(*batch)
            answer = {
                "seconds": time.perf_counter() - began,
                "peak_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024,
                "precision": job.precision.name if isinstance(job, Job) else "fp32",
            }
        print(json.dumps(answer), flush=True)


def parts(job: Job, inputs: Tensor, targets: Tensor) -> dict[str, float]:
    """Return the median seconds of the parts of a step, each alone."""

    def lstm() -> None:
        with job.precision.autocast(job.device):
            raw, _ = job.model(inputs, job.training_step.state)
        raw.backward(torch.ones_like(raw))

    hidden = torch.rand(*targets.shape, job.model.layer_sizes[-1]).sub_(0.5).requires_grad_()

    def head() -> None:
        with job.precision.autocast(job.device):
            nats = summed_nats(hidden, job.model.projection, targets)
        nats.backward()

    def update() -> None:
        for parameter in job.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        began.append(time.perf_counter())
        job.training_step.clip_and_update(job.case.optimizer.learning_rate)

    began: list[float] = []
    found = {}
    for piece in (lstm, head, update):
        seconds = []
        for _ in range(3):
            began.append(time.perf_counter())
            piece()
            seconds.append(time.perf_counter() - began[-1])
            job.training_step.optimizer.zero_grad(set_to_none=True)
        found[piece.__name__] = statistics.median(seconds)
    left, right = torch.rand(1024, 1024), torch.rand(1024, 8192)
    found["operations per second"] = 2 * 1024 * 1024 * 8192 / min(seconds_of(lambda: left @ right) for _ in range(5))
    return found


def start_worker(case: Case, variant: str) -> Worker:
    """Return a worker process for a variant; lmdist's have the environment that its launcher sets."""
    environment = {name: value for name, value in os.environ.items() if name not in MEMORY_ENVIRONMENT}
    if variant != BASELINE:
        environment |= MEMORY_ENVIRONMENT
    return Worker(__file__, [asdict(case), variant], {**environment, "OMP_NUM_THREADS": "1"})


def measure_on_cpu(case: Case, rounds: int, seconds_a_turn: float, *, with_baseline: bool) -> list[dict[str, Any]]:
    """Return the rows of a case; without the baseline they have no ratio to it."""
    adaptive = ModelSettings(**{**asdict(case.model), "tied": False, "head": "adaptive"})
    variants = {
        **({BASELINE: case} if with_baseline else {}),
        "lmdist": case,
        "lmdist, adaptive head": replace(case, model=adaptive),
    }
    workers = {variant: start_worker(changed, variant) for variant, changed in variants.items()}
    try:
        first = {variant: workers[variant].ask("1") for variant in variants}
        counts = {name: max(1, round(seconds_a_turn / answer["seconds"])) for name, answer in first.items()}
        taken: dict[str, list[float]] = {variant: [] for variant in variants}
        last = first
        for _ in range(rounds):
            for variant, count in counts.items():
                last[variant] = workers[variant].ask(str(count))
                taken[variant].append(case.batch_size * case.length * count / last[variant]["seconds"])
        pieces = workers["lmdist"].ask("parts")
    finally:
        for each in workers.values():
            each.close()
    rows = []
    baseline = statistics.median(taken[BASELINE]) if with_baseline else None
    for variant, speeds in taken.items():
        value = statistics.median(speeds)
        rows.append(
            {
                "case": case.name,
                "variant": variant,
                "value": round(value, 1),
                "unit": "tokens/s",
                "spread": round(max(speeds) - min(speeds), 1),
                "ratio": round(value / baseline, 2) if baseline else None,
                "peak_mib": last[variant]["peak_mib"],
                "precision": last[variant]["precision"],
            }
        )
    step = case.batch_size * case.length / statistics.median(taken["lmdist"])
    floors = {name: operations / pieces["operations per second"] for name, operations in case.floating_point_operations.items()}
    for piece, name in (("lstm", "LSTM"), ("head", "head"), ("update", "clipping and update")):
        floor = floors.get(name)
        rows.append(
            {
                "case": case.name,
                "variant": f"part: {name}",
                "value": round(pieces[piece] / step, 3),
                "unit": "of a step",
                "spread": None,
                "ratio": round(pieces[piece] / floor, 2) if floor else None,  # 1 is the floor
                "peak_mib": None,
                "precision": last["lmdist"]["precision"],
            }
        )
    return rows


def corpus_tokens(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of tokens of the corpus per second: stride-1 windows read each token 19 times, streams once."""
    found = {(row["case"], row["variant"]): row for row in rows if row["unit"] == "tokens/s"}
    per_token = []
    for case in sorted({row["case"] for row in rows if row["case"].startswith("tutorial")}):
        same = {"case": f"{case}, per token of the corpus", "unit": "corpus tokens/s"}
        windows, streams = found[case, BASELINE], found[case, "lmdist"]
        speed, spread = (round(windows[name] / 19, 1) for name in ("value", "spread"))
        per_token.append({**windows, **same, "variant": f"{BASELINE}, windows of stride 1", "value": speed, "spread": spread})
        per_token.append({**streams, **same, "variant": "lmdist, streams", "ratio": round(streams["value"] / speed, 1)})
    return per_token


# --- on a GPU --------------------------------------------------------------------------------------------------------

GPU_MODEL = ModelSettings(1024, 1024, 3, 0.4, tied=True)
GPU_WEIGHT_DROP = ModelSettings(512, 1024, 3, 0.4, dropout_input=0.6, weight_dropout=0.5, tied=True)
"""That of launch/wikitext2-gpu.toml."""
GPU_BATCHES = (128, 64, 256, 32, 512)  # the most telling first, in case that the time is over


def gpu_case(batch_size: int, model: ModelSettings = GPU_MODEL, vocabulary_size: int = 33_278, length: int = 70) -> Case:
    """A 3x1024 LSTM of AWD's class."""
    name = f"{model.num_layers}x{model.hidden_size} tied, V {vocabulary_size // 1000}k"
    name += ", weight drop" if model.weight_dropout else ""
    return Case(name, model, vocabulary_size, batch_size, length, OptimizerSettings("adamw", 1e-3, clip=0.25))


def measure_step(case: Case, name: str, device: torch.device, seconds_a_round: float) -> dict[str, Any]:
    """Return the row of a case in a precision."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    job = Job(case, Precision(name, ""), device)
    batches = [batch for batch, _ in zip(batches_of(case, device), range(4), strict=False)]

    def steps(count: int) -> float:
        synchronize(device)
        began = time.perf_counter()
        for number in range(count):
            job.step(*batches[number % 4])
        synchronize(device)
        return (time.perf_counter() - began) / count

    kind = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profile:
        steps(1)
    events = sorted(profile.key_averages(), key=time_of, reverse=True)
    compute = job.training_step.compute_part
    for _ in range(8 if on_gpu else 0):  # the recording of the graph among them, which waits for a loss scale that fits
        steps(5)
        if isinstance(compute, Graphed) and compute.replay is not None:
            break
    once = steps(3)
    seconds = [steps(max(2, round(seconds_a_round / once))) for _ in range(3)]
    rate = multiplication_rate(Precision(name, "").dtype, device)
    floor = max(
        2 * PERSISTENT_SECONDS * case.model.num_layers * case.length, sum(case.floating_point_operations.values()) / rate
    )
    speeds = [case.batch_size * case.length / value for value in seconds]
    return {
        "case": case.name,
        "variant": f"{name}, {case.batch_size} x {case.length}",
        "value": round(statistics.median(speeds)),
        "unit": "tokens/s",
        "spread": round(max(speeds) - min(speeds)),
        "ratio": None,
        "peak_mib": round(torch.cuda.max_memory_allocated() / 2**20) if on_gpu else None,
        "precision": name,
        "share_of_floor": round(floor / statistics.median(seconds), 3),
        "persistent_kernel": any("persist" in event.key.lower() for event in events),
        "cuda_graph": isinstance(compute, Graphed) and compute.replay is not None,
        "kernels": {event.key[:120]: round(time_of(event)) for event in events[:12]},  # us in a step without the graph
    }


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def time_of(event: Any) -> float:
    """Return the microseconds of a profiler's event itself, on the GPU if it ran there."""
    return event.self_device_time_total or event.self_cpu_time_total


def multiplication_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Return the floating-point operations per second of a large matrix multiplication."""
    rows, columns = (4096, 32768) if device.type == "cuda" else (256, 2048)
    left, right = torch.rand(rows, rows, device=device).to(dtype), torch.rand(rows, columns, device=device).to(dtype)
    torch.mm(left, right)
    synchronize(device)
    began = time.perf_counter()
    for _ in range(10):
        torch.mm(left, right)
    synchronize(device)
    return 10 * 2 * rows * rows * columns / (time.perf_counter() - began)


def gpu_rows(quick: bool) -> Iterator[dict[str, Any]]:
    """Yield all rows of a GPU; the ratio is to fp32 at the same batch size."""
    for batch_size in GPU_BATCHES[:1] if quick else GPU_BATCHES:
        baseline = None
        for name in ("fp32", "tf32", "bf16", "fp16"):
            row = measure_step(gpu_case(batch_size), name, torch.device("cuda"), 0.2 if quick else 0.6)
            baseline = baseline or row["value"]
            yield {**row, "ratio": round(row["value"] / baseline, 2)}
        if batch_size == GPU_BATCHES[0]:
            yield measure_step(gpu_case(104, GPU_WEIGHT_DROP), "fp16", torch.device("cuda"), 0.6)


# --- the command -----------------------------------------------------------------------------------------------------


def main() -> None:
    """Measure, print a table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="two small cases, or one batch size on a GPU")
    parser.add_argument("--only", default="", help="the cases with this in their name")
    parser.add_argument("--all", action="store_true", help="also the baseline of AWD-LSTM with V 200k, which needs 18 GB")
    add_json_option(parser)
    parser.add_argument("--plot", type=Path, help="plot speeds and memory here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        case, variant = json.loads(arguments.worker)
        case["model"], case["optimizer"] = ModelSettings(**case["model"]), OptimizerSettings(**case["optimizer"])
        worker(Case(**case), variant)
        return
    command = command_line(parser, arguments)
    with collect_rows(arguments.json, ("lmdist", "torch"), command, arguments.device) as rows:
        if arguments.device == "cuda":
            for row in gpu_rows(arguments.quick):
                rows.append(row)
                show(row)
        else:
            for case in cases(arguments.quick):
                if arguments.only in case.name:
                    found = measure_on_cpu(
                        case, arguments.rounds, 2.0, with_baseline=arguments.all or not case.needs_much_memory
                    )
                    rows += found
                    for row in found:
                        show(row)
            for row in corpus_tokens(rows):
                rows.append(row)
                show(row)
    if arguments.plot:
        plot(rows, arguments.plot)


def show(row: dict[str, Any]) -> None:
    """Print a line of the table."""
    ratio = "" if row["ratio"] is None else f"{row['ratio']:>8.2f}x"
    memory = "" if row["peak_mib"] is None else f"{row['peak_mib']:>8,} MiB"
    more = f"  {row['share_of_floor']:.0%} of the floor" if "share_of_floor" in row else ""
    print(f"{row['case']:<62}{row['variant']:<32}{row['value']:>12,.6g} {row['unit']:<10}{ratio}{memory}{more}", flush=True)


def plot(rows: list[dict[str, Any]], picture: Path) -> None:
    """Plot speeds and memory of the variants of each case, relative to the baseline's."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    measured = [row for row in rows if row["unit"] == "tokens/s" and row["ratio"]]
    names = list(dict.fromkeys(row["case"] for row in measured))
    variants = list(dict.fromkeys(row["variant"] for row in measured))
    figure, (speed, memory) = pyplot.subplots(1, 2, figsize=(11, 0.55 * len(names) + 1.6), sharey=True, layout="constrained")
    for number, variant in enumerate(variants):
        found = {row["case"]: row for row in measured if row["variant"] == variant}
        base = {row["case"]: row for row in measured if row["variant"] == BASELINE}
        places = [place + 0.26 * (number - 1) for place in range(len(names))]
        speed.barh(places, [found[name]["ratio"] for name in names], 0.24, label=variant)
        memory.barh(places, [found[name]["peak_mib"] / base[name]["peak_mib"] for name in names], 0.24)
    speed.set_yticks(range(len(names)), names)
    speed.invert_yaxis()
    speed.set_xlabel("tokens per second, plain PyTorch = 1")
    memory.set_xlabel("peak memory, plain PyTorch = 1")
    for axes in (speed, memory):
        axes.axvline(1, color="black", linewidth=0.8)
        axes.grid(axis="x", alpha=0.3)
    speed.legend(fontsize=8)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main()

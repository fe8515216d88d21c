"""How many tokens a second a model generates: lmdist against the PyTorch and onnxruntime that people write.

    python benchmarks/sampling.py [--json benchmarks/results/sampling-MACHINE-DATE.json] [--plot FILE]     # one CPU core
    python benchmarks/sampling.py --quick
    python benchmarks/sampling.py --device cuda --json benchmarks/results/sampling-MACHINE-DATE.json

Three models with random weights, and batch sizes 1, 16 and 64. Every variant samples from the whole distribution, at
temperature 1. The baseline is a step of `nn.LSTM` a token, softmax and `torch.multinomial`. The others: the same with all
tokens so far read again for each new one, as tutorials do it, for a text that grows to 30 tokens; the step by
`torch.compile`, with frozen weights; on a GPU the step as a CUDA graph; lmdist's step graph called token by token, with numpy
to sample; and lmdist's own way, the loop in the graph, in each precision. The cost of options is measured with the model M in
int8 (fp16 on a GPU).

Every variant is a process of its own on one core. They take turns, every round in another order, so a machine that slows down
slows all of them. The value is the median of the rounds. Peak memory is that of the process, less what it had before the
model was built; for torch.compile it includes compiling. On a GPU it is all that the process holds there at the end.

`share` rows are the share of the machine's limits that is used. At batch size 1 each weight is read once a token: its bytes,
against the fastest of four ways to read 256 MiB of fp32 numbers by numpy, or torch on a GPU. At batch size 64 the
multiplications count, against onnxruntime's matmul of 64 x 1024 numbers with M's projection in the same precision, and against
onnxruntime's matmuls of the model's own matrices, with nothing between them: where a matrix has few rows, writing the result
takes longer than multiplying. They are measured before and after everything else, on the same core, and the best counts. Greedy
decoding, top-k, top-p and a neural cache of 500 tokens have a share too, that of the speed without them.

The time to the first token is that of a whole process: `lmdist-generate` with a prompt, against `import torch` alone, and
beside its floor, the import of onnxruntime and a session of the same model. Python's bytecode is there, as in an installed
package.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from lmdist.cache_settings import NeuralCache
from lmdist.settings import ModelSettings, TextSettings
from lmdist.storage.checksums import checksums
from lmdist.storage.reading import write_json
from lmdist.text.tokenizer import WordTokenizer
from lmdist.text.vocabulary import END, END_ID, UNKNOWN, Vocabulary
from lmdist_export.bundle import FORMAT, GENERATION_CONFIG, STEP_GRAPH, VERSION, Bundle
from lmdist_export.graph.network import Network, Target
from lmdist_export.graph.onnx_file import FLOAT, Graph, OnnxModel, model_of
from lmdist_export.graph.sampling_nodes import column
from lmdist_export.graph.sizes import Sizes, parameter_shapes, weights
from lmdist_export.options import GenerationConfig
from lmdist_export.sampling.runtime import Runtime, import_onnxruntime
from lmdist_export.sampling.sampler import Sampler
from origin import add_json_option, collect_rows, command_line
from workers import Worker, pin, seconds_of

BASELINE = "baseline"
AGAIN = "torch, all tokens again"
COMPILED = "torch.compile"
GRAPHED = "torch, CUDA graph"
STEPS = "onnxruntime, token by token"
LIMITS = "limits"
PRECISIONS = {"cpu": ("fp32", "int8", "int4"), "cuda": ("fp32", "fp16")}
CACHE = NeuralCache(500, 0.3, 0.15)
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "top-k 40": {"top_k": 40},
    "top-p 0.9": {"top_p": 0.9},
    f"cache of {CACHE.size}": {"cache_weight": CACHE.weight},
}
OPTIONS_MODEL, OPTIONS_BATCHES, OPTIONS_PRECISION = "M", (1, 16, 64), {"cpu": "int8", "cuda": "fp16"}
AGAIN_LENGTHS = (8, 23)  # as long in the mean as all from 1 to 30
COMPILE_SECONDS = 240  # a step that takes longer to compile has no row
BYTES_READ = 2**28  # far more than any cache holds
FIRST_TOKEN = ["--prompt", "w7 w77 w777", "--max-new-tokens", "1", "--seed", "1"]

STYLES: dict[str, dict[str, Any]] = {
    AGAIN: {"label": "torch, all tokens again", "color": "#c7c7c7", "marker": "v"},
    BASELINE: {"label": "torch, a step a token", "color": "#7f7f7f", "marker": "s"},
    COMPILED: {"label": "torch.compile", "color": "#3f3f3f", "marker": "D"},
    GRAPHED: {"label": "torch, CUDA graph", "color": "#000000", "marker": "P"},
    STEPS: {"label": "onnxruntime, token by token", "color": "#e69f00", "marker": "^"},
    "lmdist fp32": {"label": "lmdist fp32", "color": "#9ecae1", "marker": "o", "linewidth": 2},
    "lmdist fp16": {"label": "lmdist fp16", "color": "#2171b5", "marker": "o", "linewidth": 2},
    "lmdist int4": {"label": "lmdist int4", "color": "#54278f", "marker": "o", "linewidth": 2, "linestyle": "--"},
    "lmdist int8": {"label": "lmdist int8", "color": "#2171b5", "marker": "o", "linewidth": 2},
}
"""Of the lines in the plot."""

Run = Callable[[int], int]
"""Generates about so many tokens of each text; returns how many they were."""


@dataclass(frozen=True)
class Model:
    """A model and its name."""

    name: str
    settings: ModelSettings
    vocabulary_size: int

    @property
    def case(self) -> str:
        """The name and the sizes."""
        sizes = "-".join(map(str, self.settings.layer_sizes))
        return f"{self.name}: {self.settings.embedding_size}, {sizes}, V {self.vocabulary_size:,}"


MODELS = (
    Model("S", ModelSettings(100, 256, 2, 0.0, tied=False), 10_000),
    Model("M", ModelSettings(100, 1024, 2, 0.0, tied=False), 33_278),
    Model("L", ModelSettings(400, 1150, 3, 0.0, tied=True), 33_278),
)


# --- models and bundles with random weights --------------------------------------------------------------------------


def random_model(kind: Callable[[ModelSettings, int], Any], model: Model) -> Any:
    """Return a torch model whose tokens are about as frequent as English words: by Zipf's law, with Mandelbrot's 2.7."""
    import torch

    torch.manual_seed(0)
    network = kind(model.settings, model.vocabulary_size).eval()
    with torch.no_grad():
        network.projection.bias.copy_(-torch.log(torch.arange(model.vocabulary_size) + 2.7))
    return network


def write_bundle(model: Model, folder: Path, precision: str) -> None:
    """Write a bundle with random weights, which nothing verifies."""
    from lmdist.model.language_model import LanguageModel
    from lmdist_export.conversion.weights import write_graphs

    folder.mkdir()
    sizes = write_graphs(random_model(LanguageModel, model), folder, model.name, precision)
    Vocabulary([UNKNOWN, END, *(f"w{number}" for number in range(2, model.vocabulary_size))]).save(folder / "vocab.txt")
    WordTokenizer.train(TextSettings("whitespace"), []).save(folder / "text.json")
    manifest = {"format": FORMAT, "version": VERSION, "sizes": asdict(sizes), "files": checksums(folder)}
    write_json(folder / GENERATION_CONFIG, asdict(GenerationConfig()))
    write_json(folder / "manifest.json", manifest)


# --- the variants ----------------------------------------------------------------------------------------------------


def torch_steps(model: Model, device: str, batch: int, *, again: bool) -> Run:
    """Return the PyTorch that people write: a step a token with the state kept, or all tokens so far read `again` for each."""
    import torch

    from training import PlainModel

    plain = random_model(PlainModel, model).to(device)

    @torch.inference_mode()
    def run(num_tokens: int) -> int:
        tokens, states, generated = torch.full((batch, 1), END_ID, device=device), None, []
        for number in range(num_tokens):
            if again:
                text = tokens[:, -1:].expand(-1, AGAIN_LENGTHS[number % len(AGAIN_LENGTHS)])  # (B, T)
                logits = plain(text, None)[0]
            else:
                logits, _, _, states = plain(tokens, states)
            tokens = torch.multinomial(logits[:, -1].softmax(dim=-1), 1)  # (B, 1)
            generated.append(tokens)
        return torch.cat(generated, dim=1).cpu().shape[1]

    return run


def compiled_steps(model: Model, device: str, batch: int) -> Run:
    """Return the step by torch.compile: matmuls, because it cannot compile `nn.LSTM`, and weights that it may rearrange."""
    import torch
    from torch import Tensor, nn
    from torch._inductor import config

    class Step(nn.Module):
        def __init__(self, settings: ModelSettings, vocabulary_size: int) -> None:
            super().__init__()
            self.embedding = nn.Embedding(vocabulary_size, settings.embedding_size)
            pairs = list(pairwise([settings.embedding_size, *settings.layer_sizes]))
            self.inputs = nn.ModuleList(nn.Linear(before, 4 * size) for before, size in pairs)
            self.hiddens = nn.ModuleList(nn.Linear(size, 4 * size) for _, size in pairs)
            self.projection = nn.Linear(settings.layer_sizes[-1], vocabulary_size)

        def forward(self, tokens: Tensor, h: list[Tensor], c: list[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
            values, new_h, new_c = self.embedding(tokens), [], []
            for layer, (of_input, of_hidden) in enumerate(zip(self.inputs, self.hiddens, strict=True)):
                gates = of_input(values) + of_hidden(h[layer])  # (B, 4H)
                input_gate, forget_gate, candidate, output_gate = gates.chunk(4, dim=1)
                cell = forget_gate.sigmoid() * c[layer] + input_gate.sigmoid() * candidate.tanh()
                values = output_gate.sigmoid() * cell.tanh()  # (B, H)
                new_h.append(values)
                new_c.append(cell)
            return torch.multinomial(self.projection(values).softmax(dim=1), 1).squeeze(1), new_h, new_c

    config.freezing = True
    step = torch.compile(random_model(Step, model).to(device), fullgraph=True, dynamic=False)

    @torch.inference_mode()
    def run(num_tokens: int) -> int:
        tokens, generated = torch.full((batch,), END_ID, device=device), []
        h = [torch.zeros(batch, size, device=device) for size in model.settings.layer_sizes]
        c = [torch.zeros(batch, size, device=device) for size in model.settings.layer_sizes]
        for _ in range(num_tokens):
            tokens, h, c = step(tokens, h, c)
            generated.append(tokens)
        return len(torch.stack(generated).cpu())

    return run


def graphed_steps(model: Model, batch: int) -> Run:
    """Return the step as a CUDA graph, which reads and writes the same tensors at each token."""
    import torch

    from training import PlainModel

    plain = random_model(PlainModel, model).to("cuda")
    tokens = torch.full((batch, 1), END_ID, device="cuda")
    states = plain(tokens, None)[3]

    @torch.inference_mode()
    def step() -> None:
        logits, _, _, after = plain(tokens, states)
        p = logits[:, -1].softmax(dim=-1)  # (B, V)
        # The draw of torch.multinomial, which itself waits for the GPU.
        tokens.copy_((p / torch.empty_like(p).exponential_()).argmax(dim=-1, keepdim=True))
        for part, new in zip(
            (part for state in states for part in state), (new for state in after for new in state), strict=True
        ):
            part.copy_(new)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()

    def run(num_tokens: int) -> int:
        generated = []
        for _ in range(num_tokens):
            graph.replay()
            generated.append(tokens.clone())
        return torch.cat(generated, dim=1).cpu().shape[1]

    return run


def onnxruntime_steps(folder: Path, device: str, batch: int) -> Run:
    """Return the step graph called token by token, with numpy to sample."""
    sampler = Sampler(Bundle.load(folder), device, threads=1)
    session, random = sampler.step_session, np.random.default_rng(0)

    def run(num_tokens: int) -> int:
        (h, c), generated = sampler.initial_state(batch), []
        tokens = np.full((batch, 1), END_ID)
        for _ in range(num_tokens):
            logits, h, c = session.run(["logits", "next_h", "next_c"], {"tokens": tokens, "h": h, "c": c})
            logits = logits[:, -1]  # (B, V)
            up_to = np.exp(logits - logits.max(axis=1, keepdims=True)).cumsum(axis=1)
            thresholds = random.random((batch, 1), np.float32) * up_to[:, -1:]
            tokens = np.minimum((up_to <= thresholds).sum(axis=1, keepdims=True), logits.shape[1] - 1)  # (B, 1)
            generated.append(tokens)
        return len(generated)

    return run


def loop(folder: Path, device: str, batch: int, option: str) -> Run:
    """Return lmdist's way: the loop in the graph. A cache is full from the start."""
    sampler = Sampler(replace(Bundle.load(folder), cache=CACHE), device, threads=1)
    config = GenerationConfig(**OPTIONS.get(option, {}))
    if config.cache_weight:
        read = np.random.default_rng(0).integers(2, sampler.sizes.vocabulary_size, (batch, CACHE.size + 1)).tolist()
        state = sampler.prefill(sampler.start(read, cached=True), config).seeded(0)
    else:
        state = sampler.start([[END_ID]] * batch).seeded(0)

    def run(num_tokens: int) -> int:
        return len(sampler.generate(state, config, num_tokens)[0])

    return run


# --- a process for each variant --------------------------------------------------------------------------------------


def worker(model: Model, variant: str, batch: int, device: str, place: Path) -> None:
    """Answer each line on stdin, a number of tokens, by the tokens generated, the seconds and the peak memory."""
    on_torch = variant in (BASELINE, AGAIN, COMPILED, GRAPHED)
    if on_torch:
        import torch

        torch.set_num_threads(1)
    else:
        import_onnxruntime()
    before = peak()
    if variant == COMPILED:
        run = compiled_steps(model, device, batch)
    elif variant == GRAPHED:
        run = graphed_steps(model, batch)
    elif on_torch:
        run = torch_steps(model, device, batch, again=variant == AGAIN)
    elif variant == STEPS:
        run = onnxruntime_steps(place / f"{model.name}-fp32", device, batch)
    else:
        precision, _, option = variant.removeprefix("lmdist ").partition(", ")
        run = loop(place / f"{model.name}-{precision}", device, batch, option)
    for line in sys.stdin:
        began = time.perf_counter()
        generated = batch * run(int(line))
        seconds = time.perf_counter() - began
        print(json.dumps({"tokens": generated, "seconds": seconds, "peak_mib": (peak() - before) // 1024}), flush=True)


def peak() -> int:
    """Return the peak memory of this process, KiB; getrusage would include what it inherited from its parent."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def limits(device: str, place: Path) -> dict[str, float]:
    """Return the machine's limits: bytes read a second, and for each precision multiplications a second."""
    if device == "cuda":
        import torch

        ones = torch.ones(BYTES_READ // 4, device=device)
        found = {"bytes": BYTES_READ / min(seconds_of(lambda: ones.sum().item()) for _ in range(10))}
    else:
        rows, column = np.ones((BYTES_READ // 4096, 1024), np.float32), np.ones(1024, np.float32)
        ways = (rows.sum, rows.max, lambda: rows @ column, lambda: np.dot(rows.reshape(-1), rows.reshape(-1)))
        found = {"bytes": BYTES_READ / min(seconds_of(way) for way in ways for _ in range(4))}
    for precision in PRECISIONS[device]:
        found[precision] = multiplication_rate(place / f"{OPTIONS_MODEL}-{precision}", device, only="projection")
        for model in MODELS:
            if (place / f"{model.name}-{precision}").exists():
                found[f"{precision}, {model.name}"] = multiplication_rate(place / f"{model.name}-{precision}", device)
    return found


def multiplication_rate(folder: Path, device: str, only: str = "") -> float:
    """Return the multiplications a second of 64 rows with all matrices of a bundle, or with `only` one."""
    bundle = Bundle.load(folder)
    sizes = bundle.sizes
    counts = {name: count for name, count in multiplications(sizes).items() if only in ("", name)}
    session = Runtime(bundle, device, 1).open(partial(matmuls_graph, names=list(counts)))
    rows = {value.name: np.full((64, value.shape[1]), 0.5, np.float32) for value in session.get_inputs()}
    return 64 * sum(counts.values()) / min(seconds_of(lambda: session.run(None, rows)) for _ in range(10))


def matmuls_graph(sizes: Sizes, target: Target, names: list[str]) -> OnnxModel:
    """Return the graph of the matmuls with these matrices alone; its outputs are one column of each result."""
    g = Graph("matmuls")
    network = Network(sizes, g, target)
    for name in names:
        rows = g.input(f"{name}.rows", FLOAT, ["batch", parameter_shapes(sizes)[name][1]])
        g.output(column(g, network.matmul(g, name, rows), 0), f"{name}.first", FLOAT, ["batch", 1])
    return model_of(g, {})


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


# --- the rows --------------------------------------------------------------------------------------------------------


def limits_of_core(device: str, place: Path) -> dict[str, float]:
    """Return the limits that a process pinned to the core measures."""
    one = Worker(__file__, ["", LIMITS, 0, device, str(place)], ENVIRONMENT)
    try:
        return one.ask("")
    finally:
        one.close()


def variants_of(model: Model, batch: int, device: str, *, quick: bool) -> list[str]:
    """Return what is measured of a model at a batch size."""
    precisions = [f"lmdist {name}" for name in PRECISIONS[device]]
    few, graphed = f"lmdist {OPTIONS_PRECISION[device]}", [GRAPHED] if device == "cuda" else []
    if not quick:
        variants = [AGAIN, BASELINE, COMPILED, *graphed, STEPS, *precisions]
    else:
        variants = [AGAIN, BASELINE, *graphed, STEPS, *precisions] if model.name == "S" else [BASELINE, *graphed, few]
    if model.name == OPTIONS_MODEL and batch in OPTIONS_BATCHES:
        variants += [f"{few}, {name}" for name, values in OPTIONS.items() if device == "cpu" or "cache_weight" not in values]
    return variants


def measure(
    model: Model, batch: int, device: str, place: Path, variants: list[str], rounds: int, seconds_a_turn: float
) -> list[dict[str, Any]]:
    """Return the rows of a model at a batch size."""
    workers = {variant: Worker(__file__, [model.name, variant, batch, device, str(place)], ENVIRONMENT) for variant in variants}
    counts: dict[str, int] = {}
    try:
        for variant, each in workers.items():
            ready = each.try_to_ask("2", COMPILE_SECONDS)  # builds the graph, or compiles
            answer = ready and each.try_to_ask("4", COMPILE_SECONDS)
            if answer is None:
                assert variant == COMPILED, f"{variant} failed"
                print(f"{variant} failed, or took more than {COMPILE_SECONDS} s: no row of it", flush=True)
            else:
                counts[variant] = max(1, round(seconds_a_turn * 2 / answer["seconds"])) * 2
        taken: dict[str, list[dict[str, Any]]] = {variant: [] for variant in counts}
        order = list(counts)
        for _ in range(rounds):
            for variant in order:
                taken[variant].append(workers[variant].ask(str(counts[variant])))
            order = order[1:] + order[:1]
        if device == "cuda":
            held = memory_on_gpu()
            for variant, answers in taken.items():
                answers[-1]["peak_mib"] = held.get(workers[variant].process.pid)
    finally:
        for each in workers.values():
            each.close()
    return of_batch(model, batch, device, taken)


def memory_on_gpu() -> dict[int, int]:
    """Return the MiB that each process holds on the GPU, as far as the driver tells."""
    query = ["nvidia-smi", "--query-compute-apps=pid,used_gpu_memory", "--format=csv,noheader,nounits"]
    lines = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    pairs = [line.replace(" ", "").split(",") for line in lines]
    return {int(pair[0]): int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def of_batch(model: Model, batch: int, device: str, taken: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the rows of all variants at a batch size."""
    speeds = {name: [answer["tokens"] / answer["seconds"] for answer in answers] for name, answers in taken.items()}
    baseline = statistics.median(speeds[BASELINE])
    return [
        {
            "case": f"{model.case}, batch {batch}",
            "variant": variant,
            "value": round(statistics.median(values), 1),
            "unit": "tokens/s",
            "spread": round(max(values) - min(values), 1),
            "ratio": round(statistics.median(values) / baseline, 2),
            "peak_mib": taken[variant][-1]["peak_mib"],
            "model": model.name,
            "batch": batch,
        }
        for variant, values in speeds.items()
    ]


def shares(rows: list[dict[str, Any]], limit: dict[str, float], place: Path) -> list[dict[str, Any]]:
    """Return the used share of the limits (memory at batch size 1, multiplications at 64), and of the draw without options."""
    found = [
        share(row, row["value"] / plain["value"], "the draw without")
        for row in rows
        for plain in rows
        if row["case"] == plain["case"] and row["variant"].rpartition(", ")[0] == plain["variant"] != "torch"
    ]
    for row in rows:
        if row["batch"] not in (1, 64) or (row["variant"] != BASELINE and ", " in row["variant"]) or row["variant"] == COMPILED:
            continue
        precision = "fp32" if row["variant"] == BASELINE else row["variant"].removeprefix("lmdist ")
        sizes = Bundle.load(place / f"{row['model']}-{precision}").sizes
        if row["batch"] == 1:
            read = sum(weight.length for name, weight in weights(sizes).items() if not name.startswith("embedding"))
            found.append(share(row, row["value"] * read / limit["bytes"], "reading memory"))
        else:
            # Of int4 only the projection has 4 bits.
            counts, rates = multiplications(sizes), {"projection": limit[precision]}
            others = limit["int8" if precision == "int4" else precision]
            seconds = sum(count / rates.get(name, others) for name, count in counts.items())
            alone = sum(counts.values()) / limit[f"{precision}, {row['model']}"]
            found.append(share(row, row["value"] * seconds, "multiplying"))
            found.append(share(row, row["value"] * alone, "its own matmuls"))
    return found


def share(row: dict[str, Any], value: float, of: str) -> dict[str, Any]:
    """Return the row of a share for a row of a speed."""
    return {**row, "value": round(value, 3), "unit": "share", "spread": None, "ratio": None, "peak_mib": None, "of": of}


def multiplications(sizes: Sizes) -> dict[str, int]:
    """Return the multiplications with each matrix for one token."""
    plain = weights(Sizes(sizes.layer_sizes, sizes.vocabulary_size, sizes.embedding_size, sizes.tied))
    return {
        name: weight.shape[0] * weight.shape[1]
        for name, weight in plain.items()
        if len(weight.shape) == 2 and name != "embedding"
    }


def limit_rows(limit: dict[str, float]) -> list[dict[str, Any]]:
    """Return the limits as rows."""
    nothing = {"spread": None, "ratio": None, "peak_mib": None}
    return [
        {
            "case": "limit",
            "variant": "reading memory" if name == "bytes" else f"multiplying, {name}",
            "value": round(value / 1e9, 2),
            "unit": "GB/s" if name == "bytes" else "GMAC/s",
            **nothing,
        }
        for name, value in limit.items()
    ]


def start_up(device: str, place: Path, rounds: int) -> list[dict[str, Any]]:
    """Return how long whole processes take, in turns, once each has run and left its bytecode."""
    generate = [sys.executable, "-m", "lmdist_export.generate"]
    session = "import sys, onnxruntime; onnxruntime.InferenceSession(sys.argv[1], providers=[sys.argv[2]])"
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"PYTHONPYCACHEPREFIX": str(place / "bytecode"), "ORT_DISABLE_TELEMETRY": "1"}
    commands = {
        BASELINE: [sys.executable, "-c", "import torch"],
        "lmdist-generate --help": [*generate, "--help"],
    }
    for precision in PRECISIONS[device]:
        bundle = place / f"S-{precision}"
        commands[f"floor of S, {precision}"] = [sys.executable, "-c", session, str(bundle / STEP_GRAPH), provider]
        commands[f"first token of S, {precision}"] = [*generate, str(bundle), *FIRST_TOKEN, "--provider", device]
    taken: dict[str, list[float]] = {variant: [] for variant in commands}
    for number in range(rounds + 1):
        for variant, command in commands.items():
            began = time.perf_counter()
            done = subprocess.run(command, env=environment, preexec_fn=pin, capture_output=True, text=True)
            assert done.returncode == 0, f"{variant}: {done.stderr}"
            if number:
                taken[variant].append(time.perf_counter() - began)
    baseline = statistics.median(taken[BASELINE])
    return [
        {
            "case": "start",
            "variant": variant,
            "value": round(statistics.median(seconds), 3),
            "unit": "s",
            "spread": round(max(seconds) - min(seconds), 3),
            "ratio": round(baseline / statistics.median(seconds), 2),
            "peak_mib": None,
        }
        for variant, seconds in taken.items()
    ]


# --- the command -----------------------------------------------------------------------------------------------------


def main() -> None:
    """Measure, print a table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--quick", action="store_true", help="2 rounds, 64 texts of M and L, only int8 of them, no torch.compile"
    )
    add_json_option(parser)
    parser.add_argument("--plot", type=Path, help="plot tokens a second here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        name, variant, batch, device, place = json.loads(arguments.worker)
        if variant == LIMITS:
            print(json.dumps(limits(device, Path(place))))
        else:
            worker(next(model for model in MODELS if model.name == name), variant, batch, device, Path(place))
        return
    runtime = "onnxruntime" if arguments.device == "cpu" else "onnxruntime-gpu"
    packages, command = ("lmdist", "torch", "numpy", runtime), command_line(parser, arguments)
    with collect_rows(arguments.json, packages, command, arguments.device) as rows:
        for row in measure_all(arguments.device, arguments.rounds, quick=arguments.quick):
            show(row)
            rows.append(row)
    if arguments.plot:
        plot(rows, arguments.plot)


def measure_all(device: str, rounds: int, *, quick: bool) -> Iterator[dict[str, Any]]:
    """Yield all rows."""
    rounds = 2 if quick else rounds
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        for model in MODELS:
            for precision in PRECISIONS[device]:
                write_bundle(model, place / f"{model.name}-{precision}", precision)
        measured = []
        before = limits_of_core(device, place)
        for model in MODELS:
            for batch in (64,) if quick and model.name != "S" else (1, 16, 64):
                variants = variants_of(model, batch, device, quick=quick)
                rows = measure(model, batch, device, place, variants, rounds, 0.25 if quick else 0.5)
                measured += rows
                yield from rows
        after = limits_of_core(device, place)
        limit = {what: max(before[what], after[what]) for what in before}
        yield from limit_rows(limit) + shares(measured, limit, place)
        if not (quick and device == "cuda"):  # where each process takes seconds to find the GPU
            yield from start_up(device, place, 3 if quick else 5)


def show(row: dict[str, Any]) -> None:
    """Print a line of the table."""
    ratio = "" if row["ratio"] is None else f"{row['ratio']:>8.2f}x"
    memory = "" if row["peak_mib"] is None else f"{row['peak_mib']:>8,} MiB"
    unit = f"{row['unit']} of {row['of']}" if "of" in row else row["unit"]
    print(f"{row['case']:<44}{row['variant']:<28}{row['value']:>12,.6g} {unit:<10}{ratio}{memory}", flush=True)


def plot(rows: list[dict[str, Any]], picture: Path) -> None:
    """Plot tokens/s against the batch size, a panel a model, a line a variant."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullLocator

    measured = [row for row in rows if row["unit"] == "tokens/s" and row["variant"] in STYLES]
    models = list(dict.fromkeys(row["model"] for row in measured))
    figure, panels = pyplot.subplots(
        1, len(models), figsize=(4 * len(models) + 1, 4.4), sharey=True, layout="constrained", squeeze=False
    )
    for axes, model in zip(panels[0], models, strict=True):
        here = [row for row in measured if row["model"] == model]
        for variant in dict.fromkeys(row["variant"] for row in here):
            points = [row for row in here if row["variant"] == variant]
            axes.plot([row["batch"] for row in points], [row["value"] for row in points], **STYLES[variant], markersize=5)
        axes.set(title=here[0]["case"].rpartition(", batch")[0], xlabel="batch size", xscale="log", yscale="log")
        axes.set_xlim(0.8, 80)
        axes.set_xticks([1, 16, 64], ["1", "16", "64"])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("tokens/s")
    lines = dict(zip(*panels[0][0].get_legend_handles_labels()[::-1], strict=True))
    labels = [str(style["label"]) for style in reversed(STYLES.values()) if style["label"] in lines]
    figure.legend([lines[label] for label in labels], labels, loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main()

"""What lmdist-serve makes of the sampler: throughput, latency and memory under load, over HTTP.

    python benchmarks/serving.py [--bundle bundles/demo] [--json benchmarks/results/serving-MACHINE-DATE.json]
    python benchmarks/serving.py --quick          # a small random model, and few requests

Throughput: 1, 8, 32 and 128 clients, whose answers are streamed or not. Each sends a request, waits for the answer and sends
the next; all ask for 50 tokens, and 32 for 200 as well, each with a seed of its own. The baseline is the sampler without a
server: the same prompts, as many texts at a time as there are clients, or as the server has rows in a batch, on the same CPUs.
They take turns; a first turn is not counted. Latency is measured by the clients, which are a process of their own on the
server's CPUs: to the end of the answer, to the first piece of a stream, and between pieces. What the clients take of the CPUs
the server does not have: each row has the CPU time of 1,000 tokens, that of the server (or of the sampler) and that of the
clients beside it, which know nothing of HTTP but where an answer ends.

Fairness: the latency of a short request alone (the baseline), and while another client reads a prompt of 10,000 tokens, has a
text of 10,000 tokens written, has one scored, or searches, again and again. `ratio` is that of p99.

Memory: 2,000 requests of many kinds, a seventh of them left by their clients; the server's memory after each fifth of them.

Peak memory is that of the server's process; the time to start ends when /health answers. Without --bundle the weights are
random.
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
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil

from lmdist.signals import die_with_parent
from lmdist_export.bundle import Bundle
from lmdist_export.options import GenerationConfig
from lmdist_export.sampling.generation import continuations
from lmdist_export.sampling.prompt import prompt_of
from lmdist_export.sampling.sampler import Sampler
from origin import add_json_option, collect_rows, command_line
from random_bundle import make_bundle
from servers import answers, free_port
from serving_client import Load, quantile, question
from workers import Worker

CASES = ((1, 50), (8, 50), (32, 50), (32, 200), (128, 50))
"""How many clients ask for how many tokens."""
BATCH_SIZE = 32
PROMPTS = ["The people of the", "My fellow Americans, tonight", "We must", "In the past 5 years, the congress of the", ""]
LONG = 10_000
"""Tokens."""


def main() -> None:
    """Measure, print a table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="(default: a model of the demo's sizes with random weights)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=256, help="per round (default: 256)")
    parser.add_argument("--quick", action="store_true", help="1 round of 128 requests, a small model, 300 requests for memory")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    add_json_option(parser)
    arguments = parser.parse_args()
    command = command_line(parser, arguments)
    if arguments.worker:
        sample(*json.loads(arguments.worker))
        return
    if arguments.quick:
        arguments.rounds, arguments.requests = 1, 128
    packages = ("lmdist", "uvicorn", "starlette", "onnxruntime", "numpy")
    with (
        collect_rows(arguments.json, packages, command) as rows,
        tempfile.TemporaryDirectory() as name,
        ExitStack() as running,
    ):
        bundle = arguments.bundle or make_bundle(
            Path(name), 128, 32 if arguments.quick else 256, 2_000 if arguments.quick else 10_000
        )
        manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
        sizes = manifest["sizes"]
        model = f"{'-'.join(map(str, sizes['layer_sizes']))}, V {sizes['vocabulary_size']:,}, {sizes['precision']}"
        server = running.enter_context(Server(bundle))
        offline = Worker(__file__, [str(bundle)], os.environ, pinned=False)
        running.callback(offline.close)
        for clients, num_tokens in CASES:
            case = f"{model}, {num_tokens} tokens per request, clients {clients}"
            rows += show(throughput(case, clients, server, offline, arguments.rounds, arguments.requests, num_tokens))
        rows += show(fairness(f"{model}, a short request", server, 30 if arguments.quick else 200))
        rows += show(memory(f"{model}, memory", server, 300 if arguments.quick else 2_000))


def show(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Print rows, and return them."""
    for row in rows:
        times = {name: row[f"{name}_ms"] for name in ("first_p50", "first_p99", "gap_p50", "gap_p99", "p50", "p99")}
        print(
            f"{row['case']:<66}{row['how']:<36}{row['value']:>8,.0f} {row['unit']:<9}{row['ratio']:>6.2f}x  "
            + "  ".join(f"{name} {value:,.1f} ms" for name, value in times.items() if value is not None)
            + "".join(f"  {name} {row[name]:,.1f}" for name in CPU if row.get(name) is not None)
            + f"   peak {row['peak_mib']:,} MiB",
            flush=True,
        )
    return rows


def sample(bundle: str) -> None:
    """Answer each line on stdin, a batch size, a number of texts and of tokens, by the seconds that the sampler takes."""
    sampler = Sampler(Bundle.load(bundle))
    prompts = [prompt_of(sampler.bundle, prompt).ids for prompt in PROMPTS]
    for line in sys.stdin:
        batch_size, count, num_tokens = map(int, line.split())
        config = GenerationConfig(max_new_tokens=num_tokens, suppress_tokens=sampler.bundle.generation.suppress_tokens)
        began, cpu = time.perf_counter(), time.process_time()
        asked = (prompts[number % len(prompts)] for number in range(count))
        texts = [text for text, _ in continuations(sampler, asked, config, 1, ignore_end=True, batch_size=batch_size)]
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
        assert all(len(text.tokens) == num_tokens for text in texts)
        print(json.dumps({"seconds": seconds, "server_cpu_seconds": cpu_seconds, "cpu_seconds": 0}), flush=True)


class Server:
    """lmdist-serve over a bundle, and the process of its clients."""

    def __init__(self, bundle: Path) -> None:
        self.port = free_port()
        self.bundle = bundle

    def __enter__(self) -> Server:
        began = time.perf_counter()
        parent = os.getpid()
        options = ["--port", str(self.port), "--batch-size", str(BATCH_SIZE)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lmdist_export.serve", str(self.bundle), *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=lambda: die_with_parent(parent),
        )
        while not answers(f"http://127.0.0.1:{self.port}/health"):
            assert self.process.poll() is None, "the server did not start"
            time.sleep(0.05)
        self.start_seconds = time.perf_counter() - began
        self.clients = Worker(str(Path(__file__).with_name("serving_client.py")), [], os.environ, pinned=False)
        return self

    def __exit__(self, *_: object) -> None:
        self.clients.close()
        self.process.terminate()
        self.process.wait()

    def mib(self, name: str) -> int:
        """Return a figure of its memory: VmHWM is the peak, VmRSS what it has now."""
        return int(Path(f"/proc/{self.process.pid}/status").read_text().partition(f"{name}:")[2].split()[0]) // 1024

    def load(self, clients: int, bodies: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """Return what the clients have measured, and the seconds of CPU that the server took."""
        cpu = self.cpu_seconds()
        found = self.clients.ask(question(Load(self.port, clients, list(bodies), **more)))
        assert not found["errors"], found["errors"]
        return found | {"server_cpu_seconds": self.cpu_seconds() - cpu}

    def cpu_seconds(self) -> float:
        """Return the CPU time of all its threads so far."""
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system


def body(number: int, num_tokens: int, **more: Any) -> dict[str, Any]:
    """Return a request with a seed of its own."""
    prompt = PROMPTS[number % len(PROMPTS)]
    return {
        "prompt": prompt,
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "seed": number,
        "temperature": 1,
        "top_p": 1,
    } | more


STREAM = {"stream": True, "stream_options": {"include_usage": True}}


def throughput(
    case: str, clients: int, server: Server, offline: Worker, rounds: int, requests: int, num_tokens: int
) -> list[dict[str, Any]]:
    """Return the rows of the sampler alone, and of the server with so many clients, streamed and not; they take turns."""
    batch_size = min(clients, BATCH_SIZE)
    found: dict[str, list[dict[str, Any]]] = {"baseline": [], "lmdist": [], "lmdist, streamed": []}
    requests = max(requests // 4, 8) if clients == 1 else max(requests, 2 * clients)
    for turn in range(rounds + 1):
        answers = {"baseline": offline.ask(f"{batch_size} {requests} {num_tokens}")}
        for variant, more in {"lmdist": {}, "lmdist, streamed": STREAM}.items():
            answers[variant] = server.load(
                clients, [body(turn * requests + number, num_tokens, **more) for number in range(requests)]
            )
            assert answers[variant]["tokens"] == requests * num_tokens, answers[variant]["tokens"]
        if turn:
            for variant, answer in answers.items():
                found[variant].append(answer)
    how = {
        "baseline": f"the sampler alone, {batch_size} at a time",
        "lmdist": "lmdist-serve",
        "lmdist, streamed": "lmdist-serve, streamed",
    }
    baseline = statistics.median(answer["seconds"] for answer in found["baseline"])
    rows = []
    for variant, turns in found.items():
        rates = [requests * num_tokens / answer["seconds"] for answer in turns]
        seconds = statistics.median(answer["seconds"] for answer in turns)
        measured = {
            name: [value for answer in turns for value in answer.get(name, ())] for name in ("latencies", "first", "gaps")
        }
        spread = max(rates) - min(rates)
        rate, share = statistics.median(rates), baseline / seconds
        found_row = row(case, variant, how[variant], rate, "tokens/s", spread, share, server, measured)
        rows.append(found_row | {name: cpu_of_tokens(turns, key, requests * num_tokens) for name, key in CPU.items()})
    return rows


CPU = {"cpu_ms_per_1000_tokens": "server_cpu_seconds", "client_cpu_ms_per_1000_tokens": "cpu_seconds"}


def cpu_of_tokens(turns: list[dict[str, Any]], key: str, num_tokens: int) -> float:
    """Return the milliseconds of CPU that 1,000 tokens took."""
    return round(1e6 * statistics.median(answer[key] for answer in turns) / num_tokens, 1)


def fairness(case: str, server: Server, requests: int) -> list[dict[str, Any]]:
    """Return the rows of the latency of a short request, alone and beside long ones."""
    words = "the people of the united states must be the people who are in the house . ".split()
    long_text = " ".join(words[number % len(words)] for number in range(LONG - 1_000))  # words of a tokenizer may be more
    short = [body(number, 10, **STREAM) for number in range(requests)]
    beside: dict[str, list[dict[str, Any]]] = {
        "baseline": [],
        f"beside a prompt of {LONG:,} tokens": [body(1, 1, prompt=long_text)],
        f"beside a text of {LONG:,} tokens": [body(1, LONG)],
        f"beside the scores of {LONG:,} tokens": [body(1, 0, prompt=long_text, echo=True, logprobs=1)],
        "beside a search with 16 beams": [{"prompt": "", "max_tokens": 500, "num_beams": 16, "ignore_eos": True}],
    }
    rows, alone = [], 0.0
    for variant, bodies in beside.items():
        server.load(1, short[:5], beside=bodies)
        found = server.load(1, short, beside=bodies)
        value = quantile(found["latencies"], 99)
        assert value
        alone = alone or value
        how = "alone" if variant == "baseline" else variant
        rows.append(row(case, variant, how, 1000 * value, "ms (p99)", 0, value / alone, server, found))
    return rows


KINDS: list[Callable[[int], dict[str, Any]]] = [
    lambda number: body(number, 20),
    lambda number: body(number, 20, **STREAM),
    lambda number: body(number, 20 + number % 50, top_k=5 + number % 7, temperature=0.5 + number % 5 / 10),
    lambda number: body(number, 20, top_p=0.9, logprobs=number % 5),
    lambda number: body(number, 20, presence_penalty=0.5, frequency_penalty=0.1, n=1 + number % 4),
    lambda number: body(number, 20, min_p=0.1, stop=["the house", "of"]),
    lambda number: body(number, 20, min_new_tokens=5, ignore_eos=False, no_repeat_ngram_size=3),
    lambda number: {"prompt": PROMPTS[number % len(PROMPTS)], "max_tokens": 20, "num_beams": 2 + number % 6},
    lambda number: body(number, 0, prompt=" ".join(PROMPTS) * (1 + number % 20), echo=True, logprobs=1),
    lambda number: body(number, 1, prompt=" ".join(PROMPTS) * (1 + number % 40), temperature=0, logprobs=5),
]
"""Requests of many kinds, by their numbers."""


def memory(case: str, server: Server, requests: int) -> list[dict[str, Any]]:
    """Return the rows of the server's memory after parts of many requests."""
    rows: list[dict[str, Any]] = []
    part = requests // 5
    for start in range(0, requests, part):
        bodies = [KINDS[number % len(KINDS)](number) for number in range(start, start + part)]
        server.load(16, bodies, leave_every=7)
        value = server.mib("VmRSS")
        ratio = value / rows[0]["value"] if rows else 1
        variant = "baseline" if not rows else f"{start + part} requests"
        rows.append(row(case, variant, f"after {start + part:,} requests", value, "MiB", 0, ratio, server, {}))
    return rows


def row(
    case: str,
    variant: str,
    how: str,
    value: float,
    unit: str,
    spread: float,
    ratio: float,
    server: Server,
    measured: dict[str, list[float]],
) -> dict[str, Any]:
    """Return a row."""
    times = {"first": "first", "gap": "gaps", "": "latencies"}
    percentiles = {
        f"{f'{name}_' if name else ''}p{percent}_ms": in_milliseconds(quantile(measured.get(key, ()), percent))
        for name, key in times.items()
        for percent in (50, 99)
    }
    return {
        "case": case,
        "variant": variant,
        "how": how,
        "value": round(value, 1),
        "unit": unit,
        "spread": round(spread, 1),
        "ratio": round(ratio, 2),
        **percentiles,
        "peak_mib": server.mib("VmHWM"),
        "start_seconds": round(server.start_seconds, 2),
    }


def in_milliseconds(seconds: float | None) -> float | None:
    """Return seconds in milliseconds, if there are any."""
    return None if seconds is None else round(1000 * seconds, 1)


if __name__ == "__main__":
    main()

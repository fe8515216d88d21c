"""Throughput and latency of a served bundle with 1, 8 and 32 clients: continuous batching against one request at a time.

    python benchmarks/serving.py [--bundle bundles/demo] [--json benchmarks/results/serving-MACHINE-DATE.json]
    python benchmarks/serving.py --quick          # a small random model, 2 rounds of a few seconds

The server is MLflow's, uvicorn over the bundle's folder, as in production. Two servers take turns with the same load: one as
it is, and the baseline, whose batches hold one text (`batch_size` 1). Each client sends a request, waits for the answer and
sends the next. All ask for 50 tokens, each with its own prompt and seed, so that no text is asked for twice. Latency is
measured by the client, from the first byte sent to the last received. Both servers must return the same texts. The clients run
on the server's CPUs.

Peak memory is that of the server's process; the time to start ends when /ping answers. A first round is not counted. Without
--bundle the weights are random.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from origin import add_json_option, collect_rows
from random_bundle import make_bundle

CLIENTS = (1, 8, 32)
PROMPTS = ["The people of the", "My fellow Americans, tonight", "We must", "In the past 5 years, the congress of the", ""]
VARIANTS = {"baseline": 1, "lmdist": 16}
"""The batch size."""


def main() -> None:
    """Measure, print a table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="(default: a model of the demo's sizes with random weights)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=96, help="per round (default: 96)")
    parser.add_argument("--words", type=int, default=50, help="tokens per request (default: 50)")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 32 requests, with a small model")
    add_json_option(parser)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.requests = 2, 32
    command = f"python benchmarks/serving.py --rounds {arguments.rounds} --requests {arguments.requests}"
    command += f" --words {arguments.words}" + (" --quick" if arguments.quick else "")
    command += f" --bundle {arguments.bundle}" if arguments.bundle else ""
    packages = ("lmdist", "mlflow-skinny", "uvicorn", "onnxruntime", "numpy")
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
        layers = "-".join(map(str, sizes["layer_sizes"]))
        case = f"{layers}, V {sizes['vocabulary_size']:,}, {sizes['precision']}, {arguments.words} tokens per request"
        servers = {variant: running.enter_context(Server(bundle, size)) for variant, size in VARIANTS.items()}
        for clients in CLIENTS:
            rows += measure(case, clients, servers, arguments.rounds, arguments.requests, arguments.words)
    for row in rows:
        print(
            f"{row['case']:<60}{row['variant']:<10}{row['value']:>8,.0f} {row['unit']:<9}{row['ratio']:>6.2f}x"
            f"   p50 {row['p50_ms']:>7,.1f} ms   p99 {row['p99_ms']:>7,.1f} ms   peak {row['peak_mib']:,} MiB"
            f"   started in {row['start_seconds']:.1f} s"
        )


class Server:
    """MLflow's scoring server over a bundle."""

    def __init__(self, bundle: Path, batch_size: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.environment = {
            **os.environ,
            "__pyfunc_model_path__": str(bundle),
            "SERVING_MODEL_CONFIG": json.dumps({"batch_size": batch_size}),
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }

    def __enter__(self) -> Server:
        began = time.perf_counter()
        app = [sys.executable, "-m", "uvicorn", "mlflow.pyfunc.scoring_server.app:app", "--port", str(self.port)]
        self.process = subprocess.Popen([*app, "--log-level", "error"], env=self.environment)
        while not self.answers():
            assert self.process.poll() is None, "the server did not start"
            time.sleep(0.05)
        self.start_seconds = time.perf_counter() - began
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()

    def answers(self) -> bool:
        """Return whether the server answers."""
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
            connection.request("GET", "/ping")
            return connection.getresponse().status == 200
        except OSError:
            return False

    def peak_mib(self) -> int:
        """Return the peak memory of its process so far."""
        return int(Path(f"/proc/{self.process.pid}/status").read_text().partition("VmHWM:")[2].split()[0]) // 1024

    def load(self, clients: int, first: int, count: int, num_tokens: int) -> tuple[float, list[float], list[list[str]]]:
        """Return the seconds for `count` requests from `clients` clients, the latency of each, and its text."""
        numbers = iter(range(first, first + count))
        taking = threading.Lock()
        latencies: list[float] = []
        texts: list[list[str]] = [[] for _ in range(count)]
        errors: list[str] = []

        def client() -> None:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
            while True:
                with taking:
                    number = next(numbers, None)
                if number is None:
                    return
                asked = {
                    "dataframe_records": [{"prompt": PROMPTS[number % len(PROMPTS)]}],
                    "params": {"max_new_tokens": num_tokens, "ignore_eos": True, "seed": number, "temperature": 1, "top_p": 1},
                }
                body = json.dumps(asked)
                began = time.perf_counter()
                connection.request("POST", "/invocations", body, {"Content-Type": "application/json"})
                response = connection.getresponse()
                answer = response.read()
                latencies.append(time.perf_counter() - began)
                if response.status != 200:
                    errors.append(answer.decode())
                    return
                texts[number - first] = json.loads(answer)["predictions"][0]["words"]

        threads = [threading.Thread(target=client, daemon=True) for _ in range(clients)]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors[0]
        return time.perf_counter() - began, latencies, texts


def measure(
    case: str, clients: int, servers: dict[str, Server], rounds: int, requests: int, num_tokens: int
) -> list[dict[str, Any]]:
    """Return a row for each server under the load of so many clients; the servers take turns."""
    seconds: dict[str, list[float]] = {variant: [] for variant in servers}
    latencies: dict[str, list[float]] = {variant: [] for variant in servers}
    for turn in range(rounds + 1):
        texts = {}
        for variant, server in servers.items():
            taken, each, texts[variant] = server.load(clients, turn * requests, requests, num_tokens)
            if turn:
                seconds[variant].append(taken)
                latencies[variant] += each
        expected, *others = texts.values()
        assert all(other == expected for other in others), "a text depends on the batch that it was generated in"
    baseline = statistics.median(seconds["baseline"])
    return [
        {
            "case": f"{case}, clients {clients}",
            "variant": variant,
            "value": round(requests * num_tokens / statistics.median(values), 1),
            "unit": "tokens/s",
            "spread": round(requests * num_tokens / min(values) - requests * num_tokens / max(values), 1),
            "ratio": round(baseline / statistics.median(values), 2),
            "p50_ms": round(1000 * statistics.median(latencies[variant]), 1),
            "p99_ms": round(1000 * statistics.quantiles(latencies[variant], n=100)[98], 1),
            "peak_mib": servers[variant].peak_mib(),
            "start_seconds": round(servers[variant].start_seconds, 2),
        }
        for variant, values in seconds.items()
    ]


if __name__ == "__main__":
    main()

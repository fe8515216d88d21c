"""How fast a served bundle answers 1, 8 and 32 clients: requests that share batches against requests one by one.

    python benchmarks/serving.py [--bundle bundles/demo] [--json benchmarks/results/serving-MACHINE-DATE.json]
    python benchmarks/serving.py --quick          # a small random model, 2 rounds of a few seconds

The server is MLflow's, uvicorn over the bundle's folder, as it is run in production. Two of them are up, and take turns with
the same load: one as it is, and one whose batches have room for one text (`batch_size` 1), the baseline. Each client sends a
request, waits for the answer and sends the next; all ask for 50 words with a prompt and a seed of their own, so that nobody
asks for the same text twice. Latency is what the client sees, from the first byte it sends to the last it gets. That both
servers give the same texts is asserted. The clients run on the cores of the server.

Peak memory is that of the server's process, and the seconds of its start are those until /ping answers. A first round is not
counted. Without --bundle the weights are random.
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

from origin import facts, write_rows
from random_bundle import make_bundle

CLIENTS = (1, 8, 32)
PROMPTS = ["The people of the", "My fellow Americans, tonight", "We must", "In the past 5 years, the congress of the", ""]
VARIANTS = {"baseline": 1, "lmdist": 16}
"""Texts in a batch."""


def main() -> None:
    """Measure, print a table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="(default: one of the demo's sizes with random weights)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=96, help="a round (default: 96)")
    parser.add_argument("--words", type=int, default=50, help="a request (default: 50)")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 32 requests, by a small model")
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.requests = 2, 32
    with tempfile.TemporaryDirectory() as name, ExitStack() as running:
        bundle = arguments.bundle or make_bundle(
            Path(name), 128, 32 if arguments.quick else 256, 2_000 if arguments.quick else 10_000
        )
        manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
        sizes = manifest["sizes"]
        layers = "-".join(map(str, sizes["layer_sizes"]))
        case = f"{layers}, V {sizes['vocabulary_size']:,}, {sizes['precision']}, {arguments.words} words a request"
        servers = {variant: running.enter_context(Server(bundle, size)) for variant, size in VARIANTS.items()}
        rows = measure(case, servers, arguments.rounds, arguments.requests, arguments.words)
    for row in rows:
        print(
            f"{row['case']:<60}{row['variant']:<10}{row['value']:>8,.0f} {row['unit']:<8}{row['ratio']:>6.2f}x"
            f"   p50 {row['p50_ms']:>7,.1f} ms   p99 {row['p99_ms']:>7,.1f} ms   peak {row['peak_mib']:,} MiB"
            f"   up after {row['start_seconds']:.1f} s"
        )
    if arguments.json:
        command = f"python benchmarks/serving.py --rounds {arguments.rounds} --requests {arguments.requests}"
        command += f" --words {arguments.words}" + (" --quick" if arguments.quick else "")
        command += f" --bundle {arguments.bundle}" if arguments.bundle else ""
        beside = facts(("lmdist", "mlflow-skinny", "uvicorn", "onnxruntime", "numpy"), command)
        write_rows(arguments.json, [{**row, **beside} for row in rows])


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
            assert self.process.poll() is None, "the server does not come up"
            time.sleep(0.05)
        self.start_seconds = time.perf_counter() - began
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()

    def answers(self) -> bool:
        """Whether the server is up."""
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
            connection.request("GET", "/ping")
            return connection.getresponse().status == 200
        except OSError:
            return False

    def peak_mib(self) -> int:
        """The largest memory of its process so far."""
        return int(Path(f"/proc/{self.process.pid}/status").read_text().partition("VmHWM:")[2].split()[0]) // 1024

    def load(self, clients: int, first: int, count: int, words: int) -> tuple[float, list[float], list[list[str]]]:
        """Seconds for `count` requests from `clients` clients; the seconds of each, and its words."""
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
                    "params": {"max_new_tokens": words, "ignore_eos": True, "seed": number},
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

        threads = [threading.Thread(target=client) for _ in range(clients)]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors[0]
        return time.perf_counter() - began, latencies, texts


def measure(case: str, servers: dict[str, Server], rounds: int, requests: int, words: int) -> list[dict[str, Any]]:
    """A row for each number of clients and each server; the servers take turns."""
    rows = []
    for clients in CLIENTS:
        seconds: dict[str, list[float]] = {variant: [] for variant in servers}
        latencies: dict[str, list[float]] = {variant: [] for variant in servers}
        for turn in range(rounds + 1):
            made = {}
            for variant, server in servers.items():
                taken, each, made[variant] = server.load(clients, turn * requests, requests, words)
                if turn:
                    seconds[variant].append(taken)
                    latencies[variant] += each
            expected, *others = made.values()
            assert all(texts == expected for texts in others), "the texts depend on what they were made beside"
        baseline = statistics.median(seconds["baseline"])
        rows += [
            {
                "case": f"{case}, clients {clients}",
                "variant": variant,
                "value": round(requests * words / statistics.median(values), 1),
                "unit": "words/s",
                "spread": round(requests * words / min(values) - requests * words / max(values), 1),
                "ratio": round(baseline / statistics.median(values), 2),
                "p50_ms": round(1000 * statistics.median(latencies[variant]), 1),
                "p99_ms": round(1000 * statistics.quantiles(latencies[variant], n=100)[98], 1),
                "peak_mib": servers[variant].peak_mib(),
                "start_seconds": round(servers[variant].start_seconds, 2),
            }
            for variant, values in seconds.items()
        ]
    return rows


if __name__ == "__main__":
    main()

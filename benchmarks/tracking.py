"""What tracking costs a training while the MLflow server works, is slow, fails, is stopped or dead: the outage table.

    python benchmarks/tracking.py --json benchmarks/results/tracking-MACHINE-DATE.json
    python benchmarks/tracking.py --quick          # one round, 120 steps: does it run?

    off        --tracking.mlflow=false, twice a round: the baseline
    fine       a real `mlflow server` on this machine
    dead       killed before the job starts
    killed     SIGKILL when half of the steps are done
    stopped    SIGSTOP when half of the steps are done
    slow       through a proxy that delays each response by a second
    error      through a proxy that answers 500

Each round runs a real training in each state, one rank with one thread. A step is the time between two calls of
`RunLogger.log_metrics`, which is all that tracking does in the training's process; the job differs from any other by a timer
around that call. The uploader imports MLflow in the first seconds, on the core beside the job's; so the steps after the first
10 seconds have a row of their own. The exit is the time from the last call to the end of the process, with checkpoint and
picture; its delay is the difference from the baseline's in the same round.
After each job the server is restarted, `lmdist-sync` runs, and the points of metrics.jsonl are looked up in MLflow. Values
are medians over the rounds, spread is their range; ratio is the median over the rounds of the state's value divided by the
baseline's in the same round.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

from corpora import chain, write_data_folder
from lmdist.tracking.run_folder import METRICS, read_metrics
from origin import add_json_option, collect_rows, command_line, processor
from servers import Proxy, Server

STATES = ("off", "fine", "dead", "killed", "off", "stopped", "slow", "error")
PACKAGES = ("lmdist", "torch", "mlflow")
VOCABULARY = 2000
JOB = (
    "--model.embedding_size=128 --model.hidden_size=128 --data.global_batch=16 --data.window=35 --training.device=cpu "
    "--training.log_every=1 --checkpoint.every_steps=0 --checkpoint.every_minutes=0 --sample.words=5"
).split()
TIMED_JOB = """
import sys, time
from lmdist import train
from lmdist.tracking.logger import RunLogger
times, log_metrics = [], RunLogger.log_metrics
def timed(self, step, values):
    if "train/loss" in values:
        times.append(time.monotonic())
    log_metrics(self, step, values)
RunLogger.log_metrics = timed
train.main(sys.argv[2:])
open(sys.argv[1], "w").write(repr(times))
"""
FIRST_SECONDS = 10.0
UNITS = {
    "step median": "ms",
    "step p99": "ms",
    "step p99 after 10 s": "ms",
    "exit": "s",
    "exit delay": "s",
    "points in metrics.jsonl": "of those expected",
    "points in MLflow when the job ended": "of those expected",
    "missing after lmdist-sync": "points",
    "twice after lmdist-sync": "points",
    "status as it was": "runs",
}


def main() -> None:
    """Run the rounds, print a table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--states", help="some of the states, separated by commas; off is always included")
    parser.add_argument("--quick", action="store_true", help="one round of 120 steps")
    add_json_option(parser)
    arguments = parser.parse_args()
    command = command_line(parser, arguments)
    if arguments.quick:
        arguments.rounds, arguments.steps = 1, 120
    states = [state for state in STATES if not arguments.states or state in ("off", *arguments.states.split(","))]

    measured: list[tuple[int, str, dict[str, float]]] = []
    with (
        collect_rows(arguments.json, PACKAGES, command) as rows,
        tempfile.TemporaryDirectory(prefix="tracking-") as scratch,
    ):
        os.chdir(scratch)
        tokens = {"train": chain(60_000, VOCABULARY), "valid": chain(1_000, VOCABULARY, seed=1)}
        write_data_folder(Path("data"), tokens, VOCABULARY)
        server = Server(Path(scratch))
        try:
            server.start()
            for number in range(arguments.rounds):
                for place, state in enumerate(states):
                    figures = measure(Path(f"runs/{number}-{place}-{state}"), state, server, arguments.steps)
                    measured.append((number, state, figures))
                    print(f"round {number + 1}  {state:<9}" + "  ".join(f"{name} {x:.4g}" for name, x in figures.items()))
        finally:
            server.kill()
            rows += table(measured)
    print(f"\n{'':<37}" + "".join(f"{state:>16}" for state in dict.fromkeys(states)))
    for case in UNITS:
        cells = {row["variant"]: row for row in rows if row["case"] == case}
        print(f"{case:<37}" + "".join(f"{cell(cells.get(state)):>16}" for state in dict.fromkeys(states)))


def cell(row: dict[str, Any] | None) -> str:
    """Return a row's cell in the printed table."""
    if row is None:
        return "-"
    ratio = f" ({row['ratio']:.3f})" if row["ratio"] and row["unit"] == "ms" else ""
    return f"{row['value']:.4g}{ratio}"


def measure(run: Path, state: str, server: Server, steps: int) -> dict[str, float]:
    """Run one job in one state of the server, which runs afterwards; return the figures."""
    proxy = Proxy(server.port)
    proxy.mode = state
    if state == "dead":
        server.kill()
    times = Path(f"{run.name}.times")
    flags = [*JOB, "--data.folder=data", f"--run_folder={run}", f"--training.steps={steps}"]
    flags += [f"--training.validate_every={steps}", f"--tracking.mlflow={str(state != 'off').lower()}"]
    with Path(f"{run.name}.log").open("w") as log:
        job = subprocess.Popen(
            [sys.executable, "-c", TIMED_JOB, str(times), *flags],
            stderr=log,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "MLFLOW_TRACKING_URI": proxy.uri if state in ("slow", "error") else server.uri,
            },
        )
        if state in ("killed", "stopped"):
            while len(read_metrics(run / METRICS)) < steps / 2 and job.poll() is None:
                time.sleep(0.1)
            if state == "killed":
                server.kill()
            else:
                server.signal(signal.SIGSTOP)
        code = job.wait()
        ended = time.monotonic()
    if state == "stopped":
        server.signal(signal.SIGCONT)
    if code:
        sys.exit(f"the job ended with code {code}:\n{Path(log.name).read_text()}")
    if state in ("killed", "dead"):
        server.start()
    marks: list[float] = json.loads(times.read_text())
    milliseconds = [1000 * (after - before) for before, after in pairwise(marks)]
    later = [1000 * (after - before) for before, after in pairwise(marks) if before - marks[0] > FIRST_SECONDS]
    expected = 6 * steps + 2  # six metrics a step, and two of the validation
    figures = {
        "step median": statistics.median(milliseconds),
        "step p99": p99(milliseconds),
        "step p99 after 10 s": p99(later or milliseconds),
        "exit": ended - marks[-1],
        "points in metrics.jsonl": len(points(run)) / expected,
    }
    if state != "off":
        figures |= compare(run, server.uri, expected)
    proxy.shutdown()
    proxy.server_close()
    return figures


def p99(values: list[float]) -> float:
    """Return the 99th percentile."""
    return statistics.quantiles(values, n=100, method="inclusive")[98]


def compare(run: Path, uri: str, expected: int) -> dict[str, float]:
    """Return what MLflow has of a run after its job, and after lmdist-sync."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)

    def uploaded() -> Counter[tuple[str, int]]:
        run_id = json.loads((run / "mlflow.json").read_text()).get("run_id")
        keys = {key for key, _ in points(run)}
        return Counter((key, point.step) for key in keys if run_id for point in client.get_metric_history(run_id, key))

    at_exit = uploaded()
    environment = {**os.environ, "MLFLOW_TRACKING_URI": uri}
    subprocess.run(
        [sys.executable, "-m", "lmdist.tracking.sync", str(run)], check=True, env=environment, stdout=subprocess.DEVNULL
    )
    after = uploaded()
    found = client.get_run(json.loads((run / "mlflow.json").read_text())["run_id"])
    return {
        "points in MLflow when the job ended": len(at_exit) / expected,
        "missing after lmdist-sync": len(points(run) - after.keys()),
        "twice after lmdist-sync": after.total() - len(after),
        "status as it was": found.info.status == "FINISHED",
    }


def points(run: Path) -> set[tuple[str, int]]:
    """Return the points of a run's metrics.jsonl, as pairs of key and step."""
    return {(key, row["step"]) for row in read_metrics(run / METRICS) for key in row if key not in ("step", "time")}


def table(measured: list[tuple[int, str, dict[str, float]]]) -> list[dict[str, Any]]:
    """Return a row for each figure in each state."""
    machine = f"{os.uname().machine}, {os.cpu_count()} cores, 1 rank, 1 thread, server beside it, {processor()}"
    rows = []
    usual = {
        number: statistics.mean(figures["exit"] for other, state, figures in measured if state == "off" and other == number)
        for number, _, _ in measured
    }
    for number, state, figures in measured:
        if state != "off":
            figures["exit delay"] = figures["exit"] - usual[number]
    for case, unit in UNITS.items():
        baseline: dict[int, list[float]] = {}
        for number, state, figures in measured:
            if state == "off" and case in figures:
                baseline.setdefault(number, []).append(figures[case])
        for state in dict.fromkeys(state for _, state, _ in measured):
            here = [(number, figures[case]) for number, name, figures in measured if name == state and case in figures]
            values = [value for _, value in here]
            if not values:
                continue
            ratios = [value / statistics.mean(baseline[number]) for number, value in here if baseline.get(number)]
            spread = max(values) - min(values)
            row = {"case": case, "variant": state, "value": round(statistics.median(values), 4), "unit": unit}
            row |= {"spread": round(spread, 4), "ratio": round(statistics.median(ratios), 4) if ratios else None}
            rows.append({**row, "machine": machine})
    return rows


if __name__ == "__main__":
    main()

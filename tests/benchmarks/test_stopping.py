"""A benchmark that is stopped ends its processes and writes the rows it has, each with the command that was given."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import origin

BENCHMARKS = Path(origin.__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])])}

BENCHMARK = """
import os, subprocess, sys
from pathlib import Path
from origin import collect_rows
from workers import Worker
if "--worker" in sys.argv:
    for line in sys.stdin:
        child = subprocess.Popen(["sleep", "600"])
        print(f'{{"child": {child.pid}}}', flush=True)
        while True:  # busy: never answers again
            pass
with collect_rows(Path("rows.json"), ("lmdist",), "python benchmark.py") as rows:
    worker = Worker(__file__, [], os.environ)
    grandchild = worker.ask("")["child"]
    rows.append({"case": "a", "value": 1, "machine": "its own"})
    print(worker.process.pid, grandchild, flush=True)
    try:
        worker.ask("and on")
    finally:
        worker.close()
"""


SHORTENED = {
    "training": "measure = training.measure_on_cpu; training.cases = lambda _, cases=training.cases(True): cases[::-1]; "
    "training.measure_on_cpu = lambda case, rounds, seconds, **more: measure(case, rounds, 0.1, **more)",
    "sampling": "sampling.MODELS = [model for model in sampling.MODELS if model.name == sampling.OPTIONS_MODEL]; "
    "sampling.OPTIONS_BATCHES = ()",
}
"""How benchmarks get to their first rows sooner: the smallest model first, or one alone."""


def start(folder: Path, *command: str | Path) -> subprocess.Popen[str]:
    """Start a benchmark."""
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def is_running(pid: int) -> bool:
    """Return whether a process exists and is no zombie."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_rows_so_far_are_written_and_no_process_is_left(tmp_path, number, code):
    script = tmp_path / "benchmark.py"
    script.write_text(BENCHMARK)
    benchmark = start(tmp_path, script)
    assert benchmark.stdout is not None
    pids = list(map(int, benchmark.stdout.readline().split()))
    assert all(map(is_running, pids))
    benchmark.send_signal(number)
    output, errors = benchmark.communicate(timeout=60)
    assert benchmark.returncode == code, errors
    assert errors == ""
    assert "1 rows in" in output
    assert not any(map(is_running, pids))
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["case"] == "a"
    assert row["machine"] == "its own"
    assert row["partial"] is True
    assert row["amx"] in (True, False)


def test_workers_die_with_a_benchmark_that_is_killed(tmp_path):
    script = tmp_path / "benchmark.py"
    script.write_text(BENCHMARK)
    benchmark = start(tmp_path, script)
    assert benchmark.stdout is not None
    worker, sleeping = map(int, benchmark.stdout.readline().split())
    benchmark.kill()
    benchmark.wait(timeout=60)
    until = time.monotonic() + 10
    while is_running(worker):
        assert time.monotonic() < until, "the worker survives"
        time.sleep(0.02)
    psutil.Process(sleeping).kill()  # the worker's own child is left to itself
    benchmark.communicate()


def test_a_run_that_ends_or_fails_writes_its_rows(tmp_path):
    done, failed = tmp_path / "done.json", tmp_path / "failed.json"
    program = "from pathlib import Path\nfrom origin import collect_rows\n"
    for path, error in ((done, ""), (failed, "1 / 0")):
        text = f"{program}with collect_rows(Path({str(path)!r}), (), '') as rows:\n    rows.append({{'value': 2}})\n    {error}"
        subprocess.run([sys.executable, "-c", text], env=ENVIRONMENT, capture_output=True)
    assert "partial" not in json.loads(done.read_text())[0]
    assert json.loads(failed.read_text())[0]["partial"] is True


def test_the_command_of_a_row_is_the_one_that_was_given_without_places(tmp_path):
    parser = argparse.ArgumentParser(prog="name.py")
    parser.add_argument("text", nargs="?", type=Path)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--only", default="")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--worker")
    origin.add_json_option(parser)

    def command(line: str) -> str:
        return origin.command_line(parser, parser.parse_args(shlex.split(line)))

    assert command("--minutes 5 --rounds 3 --plot a.png --json") == "python benchmarks/name.py"
    line = "--minutes 0.1 --only 'V 33k' --set a=1 --set b=2 --rounds 5 --quick"
    assert command(f"{line} --json rows.json") == f"python benchmarks/name.py {line}"
    assert command(f"{tmp_path}") == f"python benchmarks/name.py {tmp_path.name}"
    assert command("../data/news") == "python benchmarks/name.py news"
    assert command("runs/news") == "python benchmarks/name.py runs/news"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "number"), [("training", signal.SIGINT), ("sampling", signal.SIGTERM)])
def test_a_real_benchmark_is_stopped_after_its_first_rows(tmp_path, name, number):
    flags = ["--quick", "--json", "rows.json", *(["--rounds", "1"] if name == "training" else [])]
    benchmark = start(tmp_path, "-c", f"import {name}; {SHORTENED[name]}; {name}.main()", *flags)
    assert benchmark.stdout is not None
    assert benchmark.stdout.readline()
    time.sleep(2)  # the next case
    workers = [process.pid for process in psutil.Process(benchmark.pid).children(recursive=True)]
    assert workers
    benchmark.send_signal(number)
    _, errors = benchmark.communicate(timeout=60)
    assert benchmark.returncode == 128 + number, errors
    assert not any(map(is_running, workers))
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert rows
    assert all(row["partial"] and row["commit"] for row in rows)

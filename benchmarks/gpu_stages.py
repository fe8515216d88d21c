"""The stages of gpu.py: each in a process of its own, which writes its rows to a file while it goes on.

    work(stage="facts", device="cuda", quick=False, only="", data=..., seconds=15, file=..., scratch=...)

A stage yields its rows, all that it has so far, with a summary in a line. This module knows no time but that of the stage
`good`, which ends its training early enough to test the model.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from corpora import chain, write_data_folder
from gpu import PACKAGES, ROOT, write
from lmdist.signals import die_with_parent
from origin import Row, facts

RECIPE = ROOT / "launch" / "wikitext2-gpu.toml"
GOAL = 65.8
"""AWD-LSTM's test perplexity on WikiText-2 (Merity et al. 2018)."""
SMALL = (
    "--model.embedding_size=128 --model.hidden_size=128 --data.global_batch=16 --data.window=20 --schedule.warmup_steps=5 "
    "--training.validate_every=10"
).split()
"""The recipe in a size for a rehearsal."""
QUICK_TOKENS = {"train": 20_000, "valid": 2_000, "test": 2_000}
QUIET = ["--tracking.mlflow=false", "--sample.words=0", "--resume=never"]


@dataclass(frozen=True)
class Job:
    """What a stage is given."""

    stage: str
    device: str
    quick: bool
    only: str
    data: Path
    seconds: float
    scratch: Path

    @property
    def on_gpu(self) -> bool:
        """Whether it runs on a GPU."""
        return self.device == "cuda"


class LeftOut(Exception):
    """Why a stage cannot run on this machine."""


Rows = Iterator[tuple[list[Row], str]]
"""All rows so far and a summary, as often as there is something new."""


def work(file: str, data: str, scratch: str, **given: Any) -> None:
    """Run a stage."""
    die_with_parent()
    job = Job(data=Path(data), scratch=Path(scratch), **given)
    result: dict[str, Any] = {"rows": [], "summary": ""}
    try:
        for rows, summary in STAGES[job.stage](job):
            result |= {"rows": rows, "summary": summary}
            write(Path(file), result)
        result["measured"] = facts(("lmdist", "torch", "numpy"), f"python benchmarks/gpu.py --stages {job.stage}", job.device)
    except LeftOut as reason:
        result |= {"summary": str(reason), "left_out": True}
    write(Path(file), result)


# --- facts -----------------------------------------------------------------------------------------------------------


def machine(job: Job) -> Rows:
    """What is installed, and what the device reaches: memory bandwidth, and matrix multiplications in each precision."""
    import torch

    from lmdist.model.precision import DTYPES, PRECISIONS, set_fp32
    from training import multiplication_rate, synchronize

    rows: list[Row] = [row(name, value) for name, value in installed(job).items()]
    yield rows, name_of(rows)
    device = torch.device(job.device)
    source = torch.ones((1 << 30 if job.on_gpu else 1 << 24) // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    synchronize(device)
    began = time.perf_counter()
    for _ in range(10):
        target.copy_(source)
    synchronize(device)
    rows.append(row("copy, read and written", round(20 * source.nbytes / (time.perf_counter() - began) / 1e9, 1), "GB/s"))
    yield rows, name_of(rows)
    for precision in PRECISIONS[job.device]:
        set_fp32("tf32" if precision == "tf32" else "ieee")
        rate = multiplication_rate(DTYPES[precision], device)
        rows.append(row(f"matrix multiplication, {precision}", round(rate / 1e12, 3), "TFLOP/s"))
        yield rows, name_of(rows)


def row(case: str, value: Any, unit: str = "") -> Row:
    """Return a row of one figure or fact."""
    return {"case": case, "variant": "lmdist", "value": value, "unit": unit, "spread": None, "ratio": None, "peak_mib": None}


def name_of(rows: Sequence[Row]) -> str:
    """Return the summary of facts."""
    return ", ".join(
        f"{each['case']} {each['value']}" for each in rows if each["case"] in ("device", "torch", "lacks", "cuDNN")
    )


def installed(job: Job) -> dict[str, Any]:
    """Return what the machine is and has."""
    import torch
    from torch.cuda import nccl

    found: dict[str, Any] = {"device": "CPU", "python": sys.version.split()[0], "torch": torch.__version__}
    if job.on_gpu:
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory": f"{properties.total_memory / 2**30:.0f} GiB",
            "CUDA of torch": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version(),
            "NCCL": ".".join(map(str, nccl.version())),
            "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
        }
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        try:
            found["driver, clock, power"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
        except OSError as error:
            found["driver, clock, power"] = str(error)
    for name in ("onnxruntime", "onnxruntime-gpu", "pytest", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    missing = {package for packages in PACKAGES.values() for package in packages if find_spec(package) is None}
    return {**found, **({"lacks": ", ".join(sorted(missing))} if missing else {})}


# --- right -----------------------------------------------------------------------------------------------------------

OUTCOME = re.compile(r"(PASSED|FAILED|ERROR|SKIPPED)")


def right(job: Job) -> Rows:
    """The tests marked `gpu`: a row a test."""
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-o", "addopts=--strict-markers", *(["-k", job.only] if job.only else [])]
    if find_spec("xdist") and len(os.sched_getaffinity(0)) >= 8:
        command += ["-n", "4", "--dist", "worksteal"]
    environment = dict(os.environ) if job.on_gpu else {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    outcomes: dict[str, str] = {}
    for line in process.stdout:
        print(line, end="", flush=True)
        if "::" in line and (outcome := OUTCOME.search(line)) and "gpu/" in line:
            outcomes.setdefault(test_name(line), outcome[1].lower())
            rows = [row(test, 1 if outcome in ("passed", "skipped") else 0, outcome) for test, outcome in outcomes.items()]
            yield rows, summary_of(outcomes)
    if process.wait() or not outcomes:
        raise SystemExit(f"pytest ended with {process.returncode}")


def test_name(line: str) -> str:
    """Return the name of the test that a line of pytest is about, with xdist or without."""
    name = line[line.index("tests/gpu/") :].strip()
    return re.split(r" (?:PASSED|FAILED|ERROR|SKIPPED)| - | +\[ *\d+%\]", name)[0]


def summary_of(outcomes: dict[str, str]) -> str:
    """Return how many tests had each outcome, and the names of those that failed."""
    counts = [f"{list(outcomes.values()).count(each)} {each}" for each in dict.fromkeys(outcomes.values())]
    bad = [test.rpartition("::")[2] for test, outcome in outcomes.items() if outcome in ("failed", "error")]
    return ", ".join(counts) + (f": {'; '.join(bad)}" if bad else "")


# --- fast ------------------------------------------------------------------------------------------------------------


def fast(job: Job) -> Rows:
    """A training step in each precision, of 3x1024 on a GPU."""
    import torch

    from lmdist.model.precision import PRECISIONS
    from lmdist.settings import ModelSettings
    from training import gpu_case, gpu_rows, measure_step

    small = gpu_case(8, ModelSettings(128, 128, 2, 0.4, tied=True), 2_000, 20)
    if job.on_gpu:
        found = gpu_rows(job.quick)
    else:
        found = (measure_step(small, name, torch.device("cpu"), 0.1) for name in PRECISIONS["cpu"])
    rows: list[Row] = []
    for each in found:
        rows.append(each)
        best = max(rows, key=lambda each: each["value"])
        kernel = "persistent kernel" if any(each["persistent_kernel"] for each in rows) else "no persistent kernel seen"
        yield rows, f"at best {best['value']:,} tokens/s ({best['variant']}); {kernel}"


# --- good ------------------------------------------------------------------------------------------------------------


def good(job: Job) -> Rows:
    """The recipe for a GPU: perplexity on valid against seconds, and on test at the end."""
    deadline, data, text = time.monotonic() + job.seconds, job.data, "generated" if job.quick else "WikiText-2"
    if job.quick:
        splits = {name: chain(size, 1000, seed) for seed, (name, size) in enumerate(QUICK_TOKENS.items())}
        data = write_data_folder(job.scratch / "data", splits, 1000)
    elif not (data / "meta.json").exists():
        raise LeftOut(f"{data} does not exist: prepare WikiText-2 by the recipe, or take it along by --pack")
    start, test = 15.0, 40.0  # seconds
    minutes = max(0.01, (job.seconds - start - test) / 60)
    length = ["--training.steps=40"] if job.quick else ["--training.epochs=0", f"--training.minutes={minutes}"]
    length += (
        [] if job.quick else ["--schedule.warmup_steps=300"]
    )  # the recipe's 2,000 may be more steps than there is time for
    flags = [f"--config={RECIPE}", f"--data.folder={data}", f"--training.device={job.device}", *QUIET, *length]
    flags += [*(SMALL if job.quick else []), *([] if job.on_gpu else ["--training.precision=auto"])]
    run, began = job.scratch / "run", time.time()
    process = subprocess.Popen([sys.executable, "-m", "lmdist.train", *flags, f"--run_folder={run}"])
    rows: list[Row] = []
    while process.poll() is None:
        time.sleep(0.5)
        if time.monotonic() > deadline - test:
            process.send_signal(signal.SIGTERM)  # it saves what it has
            process.wait()
        curve = curve_of(run, began)
        if curve and curve != (rows and rows[0]["curve"]):
            best = min(perplexity for _, perplexity in curve)
            rows = [{**row(f"{text} valid", best, "perplexity"), "curve": curve}]
            yield rows, f"valid {best:.2f} after {curve[-1][0]:.0f} s"
    if not rows:
        raise SystemExit(f"no validation; the training ended with {process.returncode}")
    seconds = time.time() - began
    evaluate = [sys.executable, "-m", "lmdist.training.evaluate", str(run), "--split=test", "--json", f"--device={job.device}"]
    done = subprocess.run(evaluate, stdout=subprocess.PIPE, text=True, check=True)
    perplexity = json.loads(done.stdout)["perplexity"]
    rows.append({**row(f"{text} test", round(perplexity, 3), "perplexity"), "seconds": round(seconds, 1)})
    yield rows, f"{text}, test {perplexity:.2f} after {seconds:.0f} s of training" + ("" if job.quick else f" (goal {GOAL})")


def curve_of(run: Path, began: float) -> list[tuple[float, float]]:
    """Return seconds and perplexity of each validation so far."""
    from lmdist.tracking.run_folder import read_metrics

    rows = [each for each in read_metrics(run / "metrics.jsonl") if "valid/perplexity" in each]
    return [(round(each["time"] - began, 1), round(each["valid/perplexity"], 3)) for each in rows]


# --- sampling --------------------------------------------------------------------------------------------------------


def sampling(job: Job) -> Rows:
    """The quick run of sampling.py."""
    if job.on_gpu:
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise LeftOut("onnxruntime is built without CUDA here: take the wheel of onnxruntime-gpu along (see --help)")
    file = job.scratch / "rows.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "sampling.py"), "--quick", "--device", job.device, "--json", str(file)]
    process = subprocess.Popen(command)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())  # out of time: it writes the rows it has
    code = process.wait()
    rows = json.loads(file.read_text()) if file.exists() else []
    speeds = [each for each in rows if each["unit"] == "tokens/s"]
    best = max(speeds, key=lambda each: each["ratio"] or 0, default=None)
    yield (
        rows,
        f"{len(rows)} rows" + (f"; at best {best['ratio']} times torch: {best['variant']}, {best['case']}" if best else ""),
    )
    if code:
        raise SystemExit(code)


STAGES: dict[str, Callable[[Job], Rows]] = {
    "facts": machine,
    "right": right,
    "fast": fast,
    "good": good,
    "sampling": sampling,
}

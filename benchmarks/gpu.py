"""The day a GPU is there: what the machine is, whether all is right on it, how fast, how good, and how fast it samples.

    python benchmarks/gpu.py --pack gpu-pack --data data/wikitext2         # before, with a network: what is to travel
    python benchmarks/gpu.py --packed gpu-pack --out gpu-results           # there: 7 minutes, nothing fetched
    python benchmarks/gpu.py --device cpu --quick --out rehearsal          # the same stages on a CPU, small

The stages (gpu_stages.py), in order of value: facts, right (the tests marked `gpu`), fast (a training step in all precisions),
good (launch/wikitext2-gpu.toml on WikiText-2) and sampling (sampling.py; with onnxruntime-gpu only). Each is a process with a
time limit of its own. Its rows are in OUT/STAGE.json as soon as they are there, and the next one starts whatever happened.

--pack copies the data folder that lmdist-prepare made by the recipe, and downloads the wheels of WHEELS, which a machine with
torch may lack; they are all of Python alone. Another one is put beside them, as of onnxruntime-gpu, for the machine's Python:

    pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 -d gpu-pack/wheels NAME

What may only travel in parts: split --bytes=60M FILE FILE.part-, and there cat FILE.part-* > FILE.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [str(ROOT / folder) for folder in (".", "export", "benchmarks", "tests")]

SECONDS = {"facts": 15, "right": 80, "fast": 60, "good": 215, "sampling": 50}
"""Of each stage, of 7 minutes in all."""
MINUTES = sum(SECONDS.values()) / 60
TRAINING = (
    "torch",
    "numpy",
    "safetensors",
    "jsonargparse",
    "docstring_parser",
    "typeshed_client",
    "toml",
    "matplotlib",
    "tqdm",
)
TEXT = ("nltk", "defusedxml", "regex")
PACKAGES: dict[str, tuple[str, ...]] = {
    "facts": ("torch", "psutil"),
    "right": (*TRAINING, *TEXT, "psutil", "pytest", "pytest_timeout", "hypothesis"),
    "fast": (*TRAINING, "psutil"),
    "good": (*TRAINING, *TEXT, "psutil"),
    "sampling": (*TRAINING, *TEXT, "psutil", "onnx", "onnxruntime"),
}
"""What each stage imports."""
WHEELS = ("jsonargparse", "docstring-parser", "typeshed-client", "toml", "nltk", "defusedxml")
GRACE = 5.0
"""Seconds from the request to end to the end by force."""
LAST_OUTPUT = 30_000
"""Characters of a stage's output in its file."""


def main() -> None:
    """Pack, or run the stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the results go, a file a stage")
    parser.add_argument("--stages", nargs="+", choices=SECONDS, default=[*SECONDS], help="(default: all, in this order)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"of all stages together (default: {MINUTES:g})")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="small models, a generated text: does it run?")
    parser.add_argument("--only", default="", help="right: the tests with this in their name, as pytest -k")
    parser.add_argument("--data", type=Path, default=Path("data/wikitext2"), help="WikiText-2 as lmdist-prepare makes it")
    parser.add_argument("--pack", type=Path, metavar="FOLDER", help="write what is to travel here, and run nothing")
    parser.add_argument("--packed", type=Path, metavar="FOLDER", help="take the data and the wheels from here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        import gpu_stages

        gpu_stages.work(**json.loads(arguments.worker))
    elif arguments.pack:
        pack(arguments.pack, arguments.data)
    elif not arguments.out:
        parser.error("--out is missing: the folder for the results")
    elif not 0 < arguments.minutes <= 1_000:
        parser.error(f"--minutes is {arguments.minutes:g}; more than 0 and at most 1000 is expected")
    else:
        sys.exit(run_all(arguments))


def pack(folder: Path, data: Path) -> None:
    """Write the data folder, the wheels and the name of the commit to `folder`."""
    if not (data / "meta.json").exists():
        sys.exit(f"{data} is no data folder: make it by lmdist-prepare --recipe wikitext2-gpu, or name another by --data")
    shutil.copytree(data, folder / "data", dirs_exist_ok=True)
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*download, "--dest", str(folder / "wheels"), *WHEELS], check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    (folder / "commit").write_text(commit.stdout)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 2**20:.0f} MiB")


def run_all(arguments: argparse.Namespace) -> int:
    """Run the stages, print a line for each; return the exit code: 0 if none failed, and not all were left out."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-") as scratch:
        data, commit = arguments.data, ""
        if arguments.packed:
            data, commit = arguments.packed / "data", (arguments.packed / "commit").read_text().strip()
            site = Path(scratch) / "site"
            wheels = [str(path) for path in sorted((arguments.packed / "wheels").glob("*.whl"))]
            install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(site)]
            subprocess.run([*install, *wheels], check=True)
            SOURCES.append(str(site))
        sys.path += SOURCES
        states = []
        for name in arguments.stages:
            job = {
                "stage": name,
                "device": arguments.device,
                "quick": arguments.quick,
                "only": arguments.only,
                "data": str(data.absolute()),
                "seconds": SECONDS[name] * arguments.minutes / MINUTES,
                "file": str((arguments.out / f"{name}.json").absolute()),
                "scratch": str(Path(scratch) / name),
            }
            result = run_stage(job, commit)
            states.append(result["state"])
            print(f"{name:<9}{result['state']:<10}{result['seconds']:>5.0f} s  {result['summary']}", flush=True)
    return int("done" not in states or not {*states} <= {"done", "left out"})


def run_stage(job: dict[str, Any], commit: str) -> dict[str, Any]:
    """Run a stage within its time; return what its file then holds."""
    file, scratch = Path(job["file"]), Path(job["scratch"])
    file.unlink(missing_ok=True)
    scratch.mkdir()
    missing = [package for package in PACKAGES[job["stage"]] if find_spec(package) is None]
    began, state = time.monotonic(), ""
    if missing:
        state, found = "left out", {"summary": f"not installed here: {', '.join(missing)} (see --help for --packed)"}
    else:
        log = scratch / "output"
        paths = os.pathsep.join([*SOURCES, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, __file__, "--worker", json.dumps(job)]
        with log.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
            state = ended(process, job["seconds"])
        found = json.loads(file.read_text()) if file.exists() else {"summary": ""}
        found["output"] = log.read_text(errors="replace")[-LAST_OUTPUT:]
        state = "left out" if found.pop("left_out", False) else state
        if not found["summary"]:
            found["summary"] = (found["output"].strip().splitlines() or [""])[-1]
    seconds = round(time.monotonic() - began, 1)
    result = {
        "stage": job["stage"],
        "state": state,
        "seconds": seconds,
        "limit": job["seconds"],
        "packed_from": commit,
        **found,
    }
    write(file, result)
    return result


def ended(process: subprocess.Popen[bytes], seconds: float) -> str:
    """Wait for a stage, end it and all that it has started when its time is over; return how it went."""
    try:
        state = "failed" if process.wait(timeout=seconds) else "done"
    except subprocess.TimeoutExpired:
        state = "out of time"
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return state


def write(file: Path, result: dict[str, Any]) -> None:
    """Write a result so that a reader, or a kill, finds the old or the new one."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    part.replace(file)


if __name__ == "__main__":
    main()

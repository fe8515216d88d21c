"""Jobs on the CPU that take seconds: started as by a user, as forks that have imported torch, and in this process.

torchrun(4, *SMALL, "--run_folder=run", cwd=tmp_path)   # 6 CPU seconds per rank: for tests of the start itself
train(4, *SMALL, "--run_folder=run", cwd=tmp_path)      # the same ranks over gloo, without the imports
train_here("--run_folder=run")                          # the loop alone, on one rank
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from corpora import chain, write_data_folder
from lmdist import config
from lmdist import train as training
from lmdist.model.language_model import LanguageModel, State
from lmdist.settings import DataSettings, ModelSettings, Recipe
from lmdist.signals import StopRequest
from lmdist.storage.reading import read_json
from lmdist.training import loop
from lmdist.training.distributed import World
from servers import free_port
from support import shortcuts as shortcuts  # for the jobs in this process

DROPOUT = (
    "--model.dropout_input=0.4 --model.dropout_hidden=0.2 --model.dropout_output=0.3 --model.dropout_embedding=0.1 "
    "--model.weight_dropout=0.5"
).split()

FORKS = multiprocessing.get_context("forkserver")
CLONE_FS = 0x200
"""Of sched.h, for unshare(2)."""

SMALL = (
    "--model.embedding_size=16 --model.hidden_size=24 --optimizer.learning_rate=0.02 --data.global_batch=8 --data.window=7 "
    "--training.log_every=1 --training.device=cpu --training.precision=fp32 --tracking.mlflow=false --sample.words=5"
).split()


def environment() -> dict[str, str]:
    """Return the environment with one thread per rank, as torchrun sets it: a single rank sums in the same order."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def installed() -> dict[str, str]:
    """Return the same with the commands of the tested package in PATH."""
    return {**environment(), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def command(ranks: int, *flags: str) -> list[str]:
    """Return the command line of a training job."""
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return [sys.executable, *start, "-m", "lmdist.train", *flags]


def torchrun(ranks: int, *flags: str, cwd: Path) -> None:
    """Run a job to its end by torchrun."""
    done = subprocess.run(command(ranks, *flags), cwd=cwd, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def train(
    ranks: int,
    *flags: str,
    cwd: Path,
    code: int = 0,
    codes: Sequence[int] = (),
    beside: int | None = None,
    before: Callable[[], None] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a job to its end by forks, and check the exit code of each rank: `code`, or each its own of `codes`."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        started = start(ranks, *flags, cwd=cwd, outputs=outputs, beside=beside, before=before)
        for process in started:
            process.join()
        stdout, stderr = (path.read_text() for path in outputs)
    assert [process.exitcode for process in started] == [*(codes or [code] * ranks)], stderr
    return subprocess.CompletedProcess(flags, code, stdout, stderr)


def start(
    ranks: int,
    *flags: str,
    cwd: Path,
    outputs: list[Path],
    beside: int | None = None,
    before: Callable[[], None] | None = None,
) -> list[ForkServerProcess]:
    """Start the ranks of a job, which write stdout and stderr to two files; `{rank}` in a flag becomes each rank's number.

    `beside` is a process whose file systems they see; `before` is called in each of them first.
    """
    variables = environment()
    if ranks > 1:  # as torchrun sets them
        variables |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    start_server()
    started = []
    for number in range(ranks):
        own = variables | ({"RANK": str(number), "LOCAL_RANK": str(number)} if ranks > 1 else {})
        own_flags = tuple(flag.replace("{rank}", str(number)) for flag in flags)
        started.append(FORKS.Process(target=run_rank, args=(own_flags, cwd, outputs, own, beside, before), daemon=True))
        started[-1].start()
    server: Any = forkserver._forkserver  # which has no public name
    assert "libtorch" in Path(f"/proc/{server._forkserver_pid}/maps").read_text(), "each rank imports torch anew"
    return started


def start_server() -> None:
    """Start the process that imports torch and is forked for each rank, if it does not run: lmdist-prepare ends it.

    Before 3.12.8 Python does not give it this process's `sys.path`, and then it passes over what it cannot import.
    """
    FORKS.set_forkserver_preload(["support.shortcuts"])
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        forkserver.ensure_running()


def run_rank(
    flags: tuple[str, ...],
    cwd: Path,
    outputs: list[Path],
    variables: Mapping[str, str],
    beside: int | None,
    before: Callable[[], None] | None,
) -> None:
    """Run a rank in its own process."""
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), number)
    if beside is not None:
        libc, namespace = ctypes.CDLL(None), os.open(f"/proc/{beside}/ns/mnt", os.O_RDONLY)
        libc.unshare(CLONE_FS)  # a library's threads, if there are any, share the root folder with this one
        assert libc.setns(namespace, 0) == 0, "no right to enter the namespace"
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(variables)
    torch.set_num_threads(1)  # torch has read the variable already
    if before is not None:
        before()
    training.main(flags)


def train_here(*flags: str) -> None:
    """Run the loop of a small job in this process, on one rank."""
    loop_here(*SMALL, *flags)


def loop_here(*flags: str) -> None:
    """Run the loop of a job in this process, on one rank of the CPU."""
    loop.train(config.load(flags), World(0, 1, torch.device("cpu")), StopRequest())


def after_one_step(
    settings: ModelSettings, vocabulary_size: int, rows: int
) -> tuple[LanguageModel, torch.optim.Optimizer, State, dict[str, Any]]:
    """Return a model, its optimizer after one step, the state of its streams, and the recipe."""
    model = LanguageModel(settings, vocabulary_size)
    optimizer = torch.optim.AdamW(model.parameters())
    hidden, (h, c) = model(torch.randint(vocabulary_size, (rows, 5)), model.initial_state(rows))
    hidden.sum().backward()
    optimizer.step()
    recipe = Recipe(model=settings, data=DataSettings(global_batch=rows))
    return model, optimizer, (h.detach(), c.detach()), config.as_dict(recipe)


def small_data(folder: Path) -> Path:
    """Write a data folder for a job of seconds: a vocabulary of 30, a training and a validation split."""
    return write_data_folder(folder, {"train": chain(451, 30), "valid": chain(103, 30, seed=1)}, 30)


def rows(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path, key: str = "train/loss") -> list[float]:
    """Return the loss curve of a run."""
    return [row[key] for row in rows(run) if key in row]


def wait_for_steps(run: Path, steps: int) -> None:
    """Wait until a running job has written so many lines of metrics."""
    until = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(rows(run)) < steps:
        assert time.monotonic() < until
        time.sleep(0.02)


def fingerprint(run: Path) -> tuple[str, dict[str, dict[str, str]]]:
    """Return the name of the newest checkpoint and the checksums of its files."""
    newest = (run / "checkpoints" / "newest").read_text().strip()
    return newest, read_json(run / "checkpoints" / newest / "manifest.json")["files"]

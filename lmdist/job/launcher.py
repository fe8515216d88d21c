"""`lmdist-train`: a training job that can be left alone.

It starts torchrun (agent.py) as often as it takes, and is what a person, Kubernetes or Slurm talks to:

    lmdist-train ─ agent (torchrun) ─┬─ rank 0
                                     └─ rank 1 ...

* SIGTERM and Ctrl-C go to the ranks, which agree on a step, save it and end; the launcher then ends with code 75.
* When ranks or machines fail, the whole gang starts anew from the newest checkpoint, `--restarts` times in a row.
* Whoever is killed, what hangs below dies; an agent that outlives its ranks is ended.

The launcher imports no torch, so that it hears a signal from its first moment on. It does not know what the ranks do.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lmdist.cpus import available_cpus
from lmdist.errors import (
    EXIT_AGAIN,
    EXIT_DATA,
    EXIT_MISSING_INPUT,
    EXIT_USAGE,
    CommandParser,
    Stopped,
    UsageError,
    exit_on_error,
)
from lmdist.signals import StopRequest, die_with_parent

if TYPE_CHECKING:
    from lmdist.settings import Recipe

FINAL = (0, EXIT_USAGE, EXIT_DATA, EXIT_MISSING_INPUT)
"""Exit codes that another attempt would only repeat."""
AGENT_GRACE = 30.0
"""Seconds that an agent may outlive its ranks; after a partition it may wait for its peers for minutes, or for ever."""
CPU_RANKS = 4
"""Ranks on a machine without GPUs, at most."""
LOOK_SECONDS = 1.0
"""Between two looks at the agent's children: each reads all processes of the machine."""
LONGEST_PAUSE = 60.0
"""Seconds between two attempts, at most; the pause doubles from one second on."""


def main(argv: Sequence[str] | None = None) -> None:
    """Train, again and again if need be, and exit as the ranks did."""
    stop = StopRequest().listen()
    with exit_on_error("lmdist-train"):
        arguments, flags = parser().parse_known_args(argv)

        from lmdist import config

        if arguments.help:
            sys.stdout.write(parser().format_help() + "\nThe settings of the recipe:\n\n")
        recipe = config.load(["--help"] if arguments.help else flags)
        stop.patient = True
        code = attempts(arguments, flags, recipe, stop)
        stop.ignore()
        sys.exit(code)


def parser() -> argparse.ArgumentParser:
    """The launcher's own options; whatever it does not know is the recipe's."""
    made = CommandParser(
        prog="lmdist-train",
        usage="lmdist-train [--restarts N] [--nproc-per-node N] [--nnodes N --node-rank I --master-addr HOST] "
        "[--config RECIPE.toml] [--section.key VALUE ...]",
        description="Train on all GPUs of this machine, or on its CPU: torchrun with restarts, clean stops and exit codes.",
        epilog="Options that are not given are taken from torchrun's variables, such as PET_NNODES. Exit codes: 0 done, "
        "1 a defect, 64 wrong usage, 65 bad data, 66 a missing input, 75 stopped or a peer went away: run it again.",
        add_help=False,
        allow_abbrev=False,
    )

    def option(name: str, help: str, **more: object) -> None:
        made.add_argument(f"--{name}", f"--{name.replace('-', '_')}", help=help, **more)  # type: ignore[arg-type]

    made.add_argument("-h", "--help", action="store_true", help="show this, and every setting of the recipe")
    option("restarts", "start anew so many times in a row without a new checkpoint (default: 0)", type=int, default=0)
    option("nproc-per-node", "ranks on this machine (default: one a GPU; without GPUs as many as divide the batch, up to 4)")
    option("nnodes", "machines of the job (default: 1)")
    option("node-rank", "number of this machine, from 0")
    option("master-addr", "name or address of machine 0")
    option("master-port", "a free port on machine 0 (default: 29500)")
    return made


def attempts(arguments: argparse.Namespace, flags: list[str], recipe: Recipe, stop: StopRequest) -> int:
    """Start the job until it is done, asked to stop, or has failed too often; gives the exit code."""
    from lmdist import config

    ranks = arguments.nproc_per_node or os.environ.get("PET_NPROC_PER_NODE") or str(ranks_here(recipe, arguments.nnodes))
    checkpoints = Path(recipe.run_folder) / "checkpoints"
    left, pause, resume = arguments.restarts, 1.0, []
    while True:
        before = newest_name(checkpoints)
        if before and config.is_finished(recipe):  # the other machines may have ended, and would not come to a meeting
            sys.stderr.write(f"lmdist-train: {recipe.run_folder} is finished already\n")
            return 0
        with tempfile.TemporaryDirectory(prefix="lmdist-") as logs:
            code = watch(start_agent(arguments, ranks, logs, [*flags, *resume]), stop)
        if stop.requested:
            return code if code in FINAL else EXIT_AGAIN
        if newest_name(checkpoints) != before:
            left, pause = arguments.restarts, 1.0  # it got on: what failed was something new
        if code in FINAL or left == 0:
            return code
        left -= 1
        sys.stderr.write(
            f"lmdist-train: starting anew from {newest_name(checkpoints) or 'the beginning'} in {pause:.0f} s "
            f"({left} more without a new checkpoint)\n"
        )
        resume = ["--resume=auto"]
        wait_until = time.monotonic() + pause
        while time.monotonic() < wait_until:
            if stop.requested:
                return EXIT_AGAIN
            time.sleep(0.05)
        pause = min(2 * pause, LONGEST_PAUSE)


def start_agent(arguments: argparse.Namespace, ranks: str, logs: str, flags: list[str]) -> subprocess.Popen[bytes]:
    """Start torchrun, with the environment that makes a CPU fast."""
    options = [f"--nproc-per-node={ranks}", "--max-restarts=0", f"--log-dir={logs}", "--signals-to-handle=SIGQUIT"]
    given = {name: getattr(arguments, name) for name in ("nnodes", "node_rank", "master_addr", "master_port")}
    options += [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None]
    environment = dict(os.environ)
    if ranks.isdigit() and int(ranks):  # torchrun's own words for it, such as gpu, are its own business
        environment.setdefault("OMP_NUM_THREADS", str(max(1, available_cpus() // int(ranks))))
    environment.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages for torch's tensors: up to a third faster
    launcher = os.getpid()
    return subprocess.Popen(
        [sys.executable, "-m", "lmdist.job.agent", *options, "-m", "lmdist.train", *flags],
        env=environment,
        start_new_session=True,  # Ctrl-C reaches the launcher alone
        preexec_fn=lambda: die_with_parent(launcher),
    )


def watch(agent: subprocess.Popen[bytes], stop: StopRequest) -> int:
    """Wait for an agent's end; pass a stop on to its ranks, and end it where it outlives them. Gives the exit code."""
    import psutil

    ranks: set[int] = set()
    told: set[int] | None = None
    without_ranks_since = None
    looked = 0.0
    try:
        while agent.poll() is None:
            time.sleep(0.05)
            if time.monotonic() - looked < (0.2 if stop.requested else LOOK_SECONDS):
                continue
            looked = time.monotonic()
            try:
                now = {child.pid for child in psutil.Process(agent.pid).children() if child.status() != psutil.STATUS_ZOMBIE}
            except psutil.Error:
                continue
            ranks |= now
            if now or not ranks:
                without_ranks_since = None
            elif without_ranks_since is None:
                without_ranks_since = time.monotonic()
            elif time.monotonic() - without_ranks_since > AGENT_GRACE:
                sys.stderr.write("lmdist-train: torchrun does not end after its ranks: ending it\n")
                agent.kill()
            if stop.requested:
                if told is None:
                    told = set()
                    sys.stderr.write("lmdist-train: asked to stop; the ranks finish their step and save it\n")
                if not ranks:
                    agent.kill()  # it waits for its peers, or is still being imported
                for rank in now - told:
                    with suppress(ProcessLookupError):
                        os.kill(rank, signal.SIGTERM)
                told |= now
    except KeyboardInterrupt:  # a second Ctrl-C does not wait for the step
        agent.kill()
        agent.wait()
        raise Stopped("interrupted; the last checkpoint is as it was") from None
    return agent.returncode if agent.returncode >= 0 else EXIT_AGAIN


def ranks_here(recipe: Recipe, nodes: str | None) -> int:
    """As many ranks as this machine has GPUs, or a CPU has use for, and the global batch can be shared out over."""
    most = min(available_cpus(), CPU_RANKS) if recipe.training.device == "cpu" else gpus() or min(available_cpus(), CPU_RANKS)
    nodes = nodes or os.environ.get("PET_NNODES", "1")
    if not nodes.isdigit():
        raise UsageError(f"--nnodes is {nodes}; a number is expected, for the global batch is shared out evenly")
    rows = recipe.data.global_batch // recipe.training.accumulation
    return max((ranks for ranks in range(1, most + 1) if rows % (ranks * int(nodes)) == 0), default=1)


def gpus() -> int:
    """GPUs of this machine that CUDA_VISIBLE_DEVICES leaves to us."""
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    found = sum(line.startswith("GPU ") for line in listed.stdout.splitlines()) if listed.returncode == 0 else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return found if visible is None else min(found, len([device for device in visible.split(",") if device.strip()]))


def newest_name(checkpoints: Path) -> str:
    """The name of the newest checkpoint, damaged or not; empty where there is none."""
    return max((folder.name for folder in checkpoints.glob("step-*")), default="")


if __name__ == "__main__":
    main()

"""`lmdist-train`: a training job that runs unattended.

The launcher starts torchrun (agent.py), restarts it after failures, and is the process that a person, Kubernetes or Slurm
controls:

    lmdist-train ─ agent (torchrun) ─┬─ rank 0
                                     └─ rank 1 ...

* A stop (SIGTERM, Ctrl-C, a terminal that is closed, SIGUSR1 or SIGUSR2) is forwarded to the ranks, which agree on a step, save
  it and exit; the launcher then exits with 75.
* When a rank or a machine fails, all ranks restart from the newest checkpoint, up to `--restarts` times in a row.
* Child processes are killed with their parent; an agent that outlives its ranks is killed.

The launcher imports no torch, so that it handles signals from its first moment on. It does not know what the ranks compute.
"""

from __future__ import annotations

import argparse
import os
import reprlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lmdist.bounds import at_least, check
from lmdist.command_line import CommandParser, exit_on_error
from lmdist.console import log
from lmdist.cpus import MEMORY_ENVIRONMENT, available_cpus
from lmdist.errors import EXIT_AGAIN, EXIT_DATA, EXIT_MISSING_INPUT, EXIT_USAGE, Stopped, UsageError, require
from lmdist.job.agent import COMMAND
from lmdist.signals import FIRST_FAILURE, StopRequest, die_with_parent
from lmdist.tracking.run_folder import CHECKPOINTS, check_run_folder, is_finished, newest_name

if TYPE_CHECKING:
    from lmdist.settings import Recipe

FINAL_CODES = (0, EXIT_USAGE, EXIT_DATA, EXIT_MISSING_INPUT)
"""Exit codes that another attempt would only repeat."""
AGENT_GRACE_SECONDS = 30.0
"""How long an agent may outlive its ranks; after a partition it could wait for its peers for minutes, or for ever."""
MAX_CPU_RANKS = 4
"""On a machine without GPUs."""
MOST_DIGITS = 9
"""Of a number of ranks or machines; Python refuses to read one of thousands."""
POLL_SECONDS = 0.05
LIST_SECONDS = 1.0
"""Between two listings of the agent's children: each reads all processes of the machine."""
LIST_SECONDS_STOPPING = 0.2
LONGEST_BACKOFF_SECONDS = 60.0
"""Between two attempts; the back-off doubles from one second on."""


def main(argv: Sequence[str] | None = None) -> None:
    """Train, with restarts, and exit with the code of the ranks."""
    with exit_on_error(COMMAND):
        stop = StopRequest().listen()
        own = parser()
        arguments, flags = own.parse_known_args(argv)
        check("--restarts", arguments.restarts, at_least(0))
        if arguments.help:
            sys.stdout.write(own.format_help() + "\nThe settings of the recipe:\n\n")
            sys.stdout.flush()
        from lmdist import config
        from lmdist.train import require_packages

        recipe = config.load(["--help"] if arguments.help else flags, other_options=own.options)
        check_run_folder(Path(recipe.run_folder), writes=(arguments.node_rank or os.environ.get("PET_NODE_RANK", "0")) == "0")
        if num_machines(arguments) == "1":
            check_loopback()
        require("psutil")
        require_packages(recipe)
        stop.deferred = True
        code = run_attempts(arguments, flags, recipe, stop)
        stop.ignore()
        sys.exit(code)


def parser() -> CommandParser:
    """Return the parser of the launcher's own options; unknown ones are the recipe's."""
    parser = CommandParser(
        prog=COMMAND,
        usage="lmdist-train [--restarts N] [--nproc-per-node N] [--nnodes N --node-rank I --master-addr HOST] "
        "[--config RECIPE.toml] [--section.key VALUE ...]",
        description="Train on all GPUs of this machine, or on its CPU: torchrun with restarts, clean stops and exit codes.",
        epilog="Options that are not given are taken from torchrun's variables, such as PET_NNODES. Exit codes: 0 done, "
        "1 a defect, 64 wrong usage, 65 bad data, 66 a missing input, 75 stopped or a peer went away: run it again with "
        "--resume auto.",
        add_help=False,
        allow_abbrev=False,
    )

    def option(name: str, help: str, **more: object) -> None:
        parser.add_argument(f"--{name}", help=help, **more)  # type: ignore[arg-type]

    parser.add_argument("-h", "--help", action="store_true", help="show this, and every setting of the recipe")
    option("restarts", "restart at most N times in a row without a new checkpoint (default: 0)", type=int, default=0)
    option("nproc-per-node", "ranks on this machine (default: one a GPU; without GPUs as many as divide the batch, up to 4)")
    option("nnodes", "machines of the job (default: 1)")
    option("node-rank", "number of this machine, from 0")
    option("master-addr", "name or address of machine 0")
    option("master-port", "a free port on machine 0 (default: 29500)")
    return parser


def run_attempts(arguments: argparse.Namespace, flags: list[str], recipe: Recipe, stop: StopRequest) -> int:
    """Run attempts until the job is done, is asked to stop, or has failed too often; return the exit code."""
    ranks = arguments.nproc_per_node or os.environ.get("PET_NPROC_PER_NODE")
    ranks = ranks or str(default_ranks(recipe, num_machines(arguments)))
    count = parsed_count(ranks)
    if ranks.isdecimal() and (count is None or count > recipe.data.global_batch):  # before so many processes are started
        raise UsageError(
            f"--nproc-per-node is {reprlib.repr(ranks)[1:-1]}; data.global_batch {recipe.data.global_batch} has a sequence for "
            "fewer"
        )
    checkpoints = Path(recipe.run_folder) / CHECKPOINTS
    restarts_left, backoff, resume = arguments.restarts, 1.0, []
    while True:
        before = newest_name(checkpoints)
        if before and is_finished(recipe):  # the other machines may have exited, and would not join the rendezvous
            log(f"{recipe.run_folder} is finished already", COMMAND)
            return 0
        with tempfile.TemporaryDirectory(prefix="lmdist-") as logs:
            code = wait_for(start_agent(arguments, ranks, logs, [*flags, *resume]), stop)
        if stop.requested:
            return code if code in FINAL_CODES else EXIT_AGAIN
        if newest_name(checkpoints) != before:
            restarts_left, backoff = arguments.restarts, 1.0  # there was progress, so this failure is a new one
        if code in FINAL_CODES or restarts_left == 0:
            return code
        restarts_left -= 1
        log(
            f"restarting from {newest_name(checkpoints) or 'the beginning'} in {backoff:.0f} s "
            f"({restarts_left} more without a new checkpoint)",
            COMMAND,
        )
        resume = ["--resume=auto"]
        until = time.monotonic() + backoff
        while time.monotonic() < until:
            if stop.requested:
                return EXIT_AGAIN
            time.sleep(POLL_SECONDS)
        backoff = min(2 * backoff, LONGEST_BACKOFF_SECONDS)


def start_agent(arguments: argparse.Namespace, ranks: str, logs: str, flags: list[str]) -> subprocess.Popen[bytes]:
    """Start torchrun, with the environment variables that make a CPU fast."""
    options = [f"--nproc-per-node={ranks}", "--max-restarts=0", f"--log-dir={logs}", "--signals-to-handle=SIGQUIT"]
    own = {name: getattr(arguments, name) for name in ("nnodes", "node_rank", "master_addr", "master_port")}
    options += [f"--{name.replace('_', '-')}={value}" for name, value in own.items() if value is not None]
    environment = {**MEMORY_ENVIRONMENT, **os.environ, FIRST_FAILURE: str(Path(logs) / "first_failure")}
    if count := parsed_count(ranks):  # torchrun resolves names, such as gpu
        environment.setdefault("OMP_NUM_THREADS", str(max(1, available_cpus() // count)))
    launcher = os.getpid()
    return subprocess.Popen(
        [sys.executable, "-m", "lmdist.job.agent", *options, "-m", "lmdist.train", *flags],
        env=environment,
        start_new_session=True,  # Ctrl-C reaches the launcher alone
        preexec_fn=lambda: die_with_parent(launcher),
    )


def wait_for(agent: subprocess.Popen[bytes], stop: StopRequest) -> int:
    """Wait for an agent to exit; return its exit code. Forward a stop to its ranks; kill it where it outlives them."""
    seen: set[int] = set()  # ranks that have run
    signalled: set[int] = set()  # ranks that a stop was forwarded to
    listed_at, ranks_ended_at, announced = 0.0, None, False
    try:
        while agent.poll() is None:
            time.sleep(POLL_SECONDS)
            now = time.monotonic()
            if now - listed_at < (LIST_SECONDS_STOPPING if stop.requested else LIST_SECONDS):
                continue
            listed_at = now
            ranks = children_of(agent)
            if ranks is None:
                continue
            seen |= ranks
            if ranks or not seen:
                ranks_ended_at = None
            elif ranks_ended_at is None:
                ranks_ended_at = now
            elif now - ranks_ended_at > AGENT_GRACE_SECONDS:
                log("torchrun outlives its ranks: it is killed", COMMAND)
                agent.kill()
            if stop.requested:
                if not announced:
                    announced = True
                    log("stop requested; the ranks finish their step and save it", COMMAND)
                if not seen:
                    agent.kill()  # it waits for its peers, or is still importing torch
                for rank in ranks - signalled:
                    with suppress(ProcessLookupError):
                        os.kill(rank, signal.SIGTERM)
                signalled |= ranks
    except KeyboardInterrupt:  # a second Ctrl-C does not wait for the step
        agent.kill()
        agent.wait()
        raise Stopped("interrupted; the last checkpoint is unchanged") from None
    return agent.returncode if agent.returncode >= 0 else EXIT_AGAIN


def children_of(agent: subprocess.Popen[bytes]) -> set[int] | None:
    """Return the process ids of an agent's running children; None where they cannot be listed."""
    import psutil

    try:
        children = psutil.Process(agent.pid).children()
        return {child.pid for child in children if child.status() != psutil.STATUS_ZOMBIE}
    except psutil.Error:
        return None


def check_loopback() -> None:
    """Raise UsageError where this machine cannot reach itself: its ranks would look for each other for minutes."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=10).close()
    except OSError as error:
        raise UsageError(
            f"this machine does not reach itself at 127.0.0.1 ({error.strerror or error}), as its ranks must: "
            "bring the loopback interface up (ip link set lo up)"
        ) from None


def num_machines(arguments: argparse.Namespace) -> str:
    """Return how many machines the job has, as it was given: a number, or a range of torchrun's such as 1:4."""
    return arguments.nnodes or os.environ.get("PET_NNODES", "1")


def default_ranks(recipe: Recipe, nnodes: str) -> int:
    """Return the most ranks that this machine's GPUs, or its CPUs, can run and that divide the global batch evenly."""
    most = min(available_cpus(), MAX_CPU_RANKS)
    if recipe.training.device != "cpu":
        most = num_gpus() or most
    if not (count := parsed_count(nnodes)):
        raise UsageError(
            f"--nnodes is {reprlib.repr(nnodes)[1:-1]}; a number from 1 on is expected, for the global batch is divided evenly"
        )
    batch_size = recipe.data.global_batch // recipe.training.accumulation
    return max((ranks for ranks in range(1, most + 1) if batch_size % (ranks * count) == 0), default=1)


def parsed_count(text: str) -> int | None:
    """Return a number of ranks or machines; None for a name, such as torchrun's gpu, and where no machine has so many."""
    return int(text) if text.isdecimal() and len(text) <= MOST_DIGITS else None


def num_gpus() -> int:
    """Return the number of this machine's GPUs that CUDA_VISIBLE_DEVICES allows."""
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    found = sum(line.startswith("GPU ") for line in listed.stdout.splitlines()) if listed.returncode == 0 else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return found if visible is None else min(found, len([device for device in visible.split(",") if device.strip()]))


if __name__ == "__main__":
    main()

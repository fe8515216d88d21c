"""torchrun as the launcher starts it: `python -m lmdist.job.agent TORCHRUN_ARGUMENTS`, one process for each attempt.

The agent starts the ranks of this machine and monitors them. It adds to torchrun what the launcher needs: it is killed with
its launcher, leaves signals to it, and reports by its exit code how the ranks ended. It imports torch.distributed for the
agent alone; the ranks' use is in training/distributed.py. It does not know what the ranks compute.
"""

from __future__ import annotations

import argparse
import logging
import os
import reprlib
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from typing import NoReturn

from lmdist.command_line import exit_on_error, run_as_process
from lmdist.console import log
from lmdist.errors import EXIT_AGAIN, EXIT_DATA, EXIT_MISSING_INPUT, EXIT_USAGE, UsageError, one_line
from lmdist.signals import AGENT, FIRST_FAILURE, die_with_parent
from lmdist.standard_streams import guard
from lmdist.stop_signals import STOP_SIGNALS

COMMAND = "lmdist-train"
DEFAULT_PORT = 29500
"""torchrun's own."""
MOST = 100_000
"""Of the ranks on a machine, and of the machines."""
JOIN_TIMEOUT_SECONDS = 600.0
"""How long a machine tries to reach machine 0; torchrun's own."""
REPORT_AFTER_SECONDS = 10.0
"""Waiting for other machines is reported after this time, and for ranks of theirs again and again."""
REPORT_AGAIN_SECONDS = 60.0
EXIT_GRACE_SECONDS = 5.0
"""How long an agent may take to exit by itself after machine 0 has ended the attempt."""


def main() -> None:
    """Run the ranks until they have ended."""
    guard()  # before torch, whose loggers take stderr as it is when they are made
    die_with_parent()
    # The launcher forwards a stop to the ranks as SIGTERM, and the agent waits for them. A rank inherits SIG_IGN, but not a
    # handler: so SIGTERM ends one that has no handler of its own yet, and is not lost.
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # of nohup
            signal.signal(number, lambda number, frame: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ[AGENT] = str(os.getpid())

    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import run

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # its errors are reported below
    with exit_on_error(COMMAND):
        arguments = read_arguments(sys.argv[1:])
    try:
        if arguments.rdzv_backend == "static" and arguments.nnodes != "1" and arguments.node_rank > 0:
            connection = connect(arguments.master_addr, arguments.master_port or DEFAULT_PORT)
            threading.Thread(target=exit_with, args=(connection,), name="machine 0", daemon=True).start()
        if arguments.nnodes != "1":
            threading.Thread(target=report_waiting, args=(arguments.nnodes,), name="waiting", daemon=True).start()
        run(arguments)
    except ChildFailedError as failed:
        codes = {rank: failure.exitcode for rank, failure in failed.failures.items()}
        for rank, code in sorted(codes.items()):
            if code < 0:
                log(f"rank {rank} was killed by {signal_name(-code)}", COMMAND)
        sys.exit(first_failure() or exit_code(list(codes.values())))
    except (DistError, TimeoutError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        log(f"the rendezvous of the machines failed: {reason}", COMMAND)
        sys.exit(EXIT_AGAIN)


def read_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Return torchrun's arguments, PET_ variables included. Raise UsageError for one that is invalid on this machine."""
    from torch.distributed.run import determine_local_world_size, get_args_parser, parse_min_max_nnodes

    def fail(message: str) -> NoReturn:
        raise UsageError(f"torchrun rejects a flag or a PET_ variable: {message}")

    parser = get_args_parser()
    parser.error = fail  # its own would print all of torchrun's options
    arguments = parser.parse_args(argv)
    for name, parse in (("nnodes", parse_min_max_nnodes), ("nproc_per_node", determine_local_world_size)):
        value = getattr(arguments, name)
        try:
            numbers = parse(value)
        except (ValueError, RuntimeError) as error:
            fail(f"{name} is {reprlib.repr(value)[1:-1]} ({one_line(error)})")
        if not all(1 <= number <= MOST for number in (numbers if isinstance(numbers, tuple) else (numbers,))):
            fail(f"{name} is {reprlib.repr(value)[1:-1]}, and must be from 1 to {MOST:,}")
    _, num_nodes = parse_min_max_nnodes(arguments.nnodes)
    if not 0 <= arguments.node_rank < num_nodes:
        fail(f"node_rank is {arguments.node_rank}, and of {num_nodes} machines it must be at most {num_nodes - 1}")
    if not 0 <= (arguments.master_port or 0) < 1 << 16:  # None by default
        fail(f"master_port is {arguments.master_port}, and must be from 0 to 65,535")
    return arguments


def connect(host: str, port: int) -> socket.socket:
    """Return a connection to the agent of machine 0; raise TimeoutError after JOIN_TIMEOUT_SECONDS."""
    began, reported = time.monotonic(), False
    while True:
        try:
            return socket.create_connection((host, port), timeout=10)
        except OSError as error:
            waited = time.monotonic() - began
            if waited > JOIN_TIMEOUT_SECONDS:
                raise TimeoutError(f"{host}:{port} does not answer ({error})") from None
            if not reported and waited > REPORT_AFTER_SECONDS:
                reported = True
                log(f"waiting for machine 0 at {host}:{port} ({error})", COMMAND)
            time.sleep(0.2)


def report_waiting(machines: str) -> None:
    """Report, now and then, that no rank has been started yet, because not all machines have joined."""
    import psutil

    pause = REPORT_AFTER_SECONDS
    while True:
        time.sleep(pause)
        if psutil.Process().children():
            return
        log(f"waiting until all {machines} machines have joined", COMMAND)
        pause = REPORT_AGAIN_SECONDS


def exit_with(connection: socket.socket) -> NoReturn:
    """Exit soon after the agent of machine 0, which closes its end of the connection when it exits.

    The rendezvous store lives in that agent. An agent that restarts quickly may still find the store of the previous attempt,
    while its peers use the store of the next one: either side would wait for the other until a timeout.
    """
    connection.settimeout(None)
    try:
        while connection.recv(1024):
            pass
    except OSError:
        pass
    time.sleep(EXIT_GRACE_SECONDS)
    log("machine 0 has ended the attempt", COMMAND)
    os._exit(EXIT_AGAIN)  # the ranks are killed with this process


def signal_name(number: int) -> str:
    """Return the name of a signal, or its number: most real-time signals have no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def first_failure() -> int:
    """Return the exit code of the rank of this machine that failed first, 0 where none has recorded it.

    What follows the first failure is no sign of its cause: a rank that has lost a peer, or is stopped by torchrun, exits
    with 75, and one whose libraries are torn down beside running threads may be killed by SIGABRT.
    """
    try:
        with open(os.environ[FIRST_FAILURE], encoding="ascii") as file:
            return int(file.read() or 0)
    except (KeyError, OSError, ValueError):
        return 0


def exit_code(codes: list[int]) -> int:
    """Return one exit code for all ranks: a user's mistake before a killed rank, a killed rank before its peers' codes."""
    for mistake in (EXIT_USAGE, EXIT_DATA, EXIT_MISSING_INPUT):
        if mistake in codes:
            return mistake
    return EXIT_AGAIN if min(codes) < 0 else min(codes)


if __name__ == "__main__":
    run_as_process(main)

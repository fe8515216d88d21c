"""torchrun as the launcher starts it: `python -m lmdist.job.agent TORCHRUN_ARGUMENTS`, one for each attempt at a job.

The agent starts the ranks of this machine and watches them. It adds to torchrun what the launcher needs: it ends with its
launcher, leaves the signals to it, and says by its exit code how the ranks ended. It does not know what they compute.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from typing import NoReturn

from lmdist.errors import EXIT_AGAIN, EXIT_DATA, EXIT_MISSING_INPUT, EXIT_USAGE, UsageError, exit_on_error, one_line
from lmdist.signals import AGENT, die_with_parent

JOIN_SECONDS = 600.0
"""Time that a machine waits for machine 0; torchrun's own."""
PATIENCE = 10.0
"""Seconds after which it says that it waits."""
LAST_SECONDS = 5.0
"""Time that an agent has to end by itself when machine 0 has ended."""


def main() -> None:
    """Run the ranks to their end."""
    die_with_parent()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # the launcher passes a stop on to the ranks; the agent waits for them
    os.environ[AGENT] = str(os.getpid())

    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import run

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # what there is to say is said below
    with exit_on_error("lmdist-train"):
        arguments = read_arguments(sys.argv[1:])
    try:
        if arguments.rdzv_backend == "static" and arguments.nnodes != "1" and arguments.node_rank > 0:
            hold_on_to_machine_0(arguments)
        run(arguments)
    except ChildFailedError as failed:
        codes = {rank: failure.exitcode for rank, failure in failed.failures.items()}
        for rank, code in sorted(codes.items()):
            if code < 0:
                sys.stderr.write(f"lmdist-train: rank {rank} was ended by {signal.Signals(-code).name}\n")
        sys.exit(exit_code(list(codes.values())))
    except (DistError, TimeoutError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        sys.stderr.write(f"lmdist-train: the machines of the job did not find each other: {reason}\n")
        sys.exit(EXIT_AGAIN)


def read_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """torchrun's arguments, also those in PET_ variables; raises UsageError for one that means nothing on this machine."""
    from torch.distributed.run import determine_local_world_size, get_args_parser, parse_min_max_nnodes

    def refuse(message: str) -> NoReturn:
        raise UsageError(f"torchrun takes no such thing, from a flag or a PET_ variable: {message}")

    parser = get_args_parser()
    parser.error = refuse  # its own would print all of torchrun's options
    arguments = parser.parse_args(argv)
    for name, read in (("nnodes", parse_min_max_nnodes), ("nproc_per_node", determine_local_world_size)):
        given = getattr(arguments, name)
        try:
            numbers = read(given)
        except (ValueError, RuntimeError) as error:
            refuse(f"{name} is {given} ({one_line(error)})")
        if min(numbers if isinstance(numbers, tuple) else (numbers,)) < 1:
            refuse(f"{name} is {given}, and must be at least 1")
    _, nodes = parse_min_max_nnodes(arguments.nnodes)
    if not 0 <= arguments.node_rank < nodes:
        refuse(f"node_rank is {arguments.node_rank}, and of {nodes} machines it must be at most {nodes - 1}")
    return arguments


def hold_on_to_machine_0(arguments: argparse.Namespace) -> None:
    """Keep a connection to the agent of machine 0, and end this attempt when that one ends.

    All ranks meet in a store that lives in that agent. An agent which comes back quickly may still find the store of the
    attempt before, and its ranks that of the next one: then either side waits for the other until a timeout.
    """
    place = (arguments.master_addr, arguments.master_port or 29500)
    began, silent = time.monotonic(), True
    while True:
        try:
            connection = socket.create_connection(place, timeout=10)
            break
        except OSError as error:
            waited = time.monotonic() - began
            if waited > JOIN_SECONDS:
                raise TimeoutError(f"{place[0]}:{place[1]} does not answer ({error})") from None
            if silent and waited > PATIENCE:
                silent = False
                sys.stderr.write(f"lmdist-train: waiting for machine 0 at {place[0]}:{place[1]} ({error})\n")
            time.sleep(0.2)

    def wait() -> None:
        connection.settimeout(None)
        try:
            while connection.recv(1024):
                pass
        except OSError:
            pass
        time.sleep(LAST_SECONDS)
        sys.stderr.write("lmdist-train: machine 0 has ended its attempt\n")
        os._exit(EXIT_AGAIN)  # and the ranks with it

    threading.Thread(target=wait, name="machine 0", daemon=True).start()


def exit_code(codes: list[int]) -> int:
    """One exit code for all ranks: a user's mistake before a killed rank, a killed rank before what became of its peers."""
    for mistake in (EXIT_USAGE, EXIT_DATA, EXIT_MISSING_INPUT):
        if mistake in codes:
            return mistake
    return EXIT_AGAIN if min(codes) < 0 else min(codes)


if __name__ == "__main__":
    main()

"""Processes of a benchmark: workers, pinned to one core or not, a stopwatch, and the end of all when the benchmark is stopped.

A worker is the benchmark's own script with `--worker` and a list in JSON. It reads a question a line from stdin and answers
each with a line of JSON on stdout. It is killed with its parent.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any

import psutil

from lmdist.signals import die_with_parent

CORE = min(os.sched_getaffinity(0))
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>


def pin() -> None:
    """Pin this process to one core."""
    os.sched_setaffinity(0, {CORE})


def seconds_of(action: Callable[[], object]) -> float:
    """Return how long `action` takes."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


class Worker:
    """A worker process, `pinned` to one core or on all of them."""

    def __init__(self, script: str, arguments: Sequence[Any], environment: Mapping[str, str], *, pinned: bool = True) -> None:
        parent = os.getpid()

        def prepare() -> None:
            die_with_parent(parent)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the benchmark's; it kills its workers
            if pinned:
                pin()

        self.process = subprocess.Popen(
            [sys.executable, script, "--worker", json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            preexec_fn=prepare,
        )

    def ask(self, question: str) -> dict[str, Any]:
        """Return its answer."""
        answer = self.try_to_ask(question, 3600)
        assert answer is not None, f"{self.process.args} failed"
        return answer

    def try_to_ask(self, question: str, seconds: float) -> dict[str, Any] | None:
        """Return its answer; None if it fails or takes longer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        alarm = threading.Timer(seconds, self.process.kill)
        alarm.daemon = True
        alarm.start()
        try:
            self.process.stdin.write(f"{question}\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            alarm.cancel()
        return json.loads(answer) if answer else None

    def close(self) -> None:
        """Kill it: what it still computes, if anything, nobody waits for."""
        self.process.kill()
        self.process.communicate()


def exit_when_stopped() -> None:
    """Have SIGINT and SIGTERM kill all descendants of this process and raise SystemExit with 128 + the signal's number."""
    for number in STOP_SIGNALS:
        signal.signal(number, stop)


def stop(number: int, frame: FrameType | None) -> None:
    """Kill all descendants and raise SystemExit; further signals are ignored, so that the rows are written."""
    for each in STOP_SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    threading.excepthook = lambda _: None  # threads that talk to the killed processes
    if sys.platform.startswith("linux"):  # adopt those whose parents are killed first
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    while descendants := psutil.Process().children(recursive=True):
        for process in descendants:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(descendants, timeout=10)
    raise SystemExit(128 + number)

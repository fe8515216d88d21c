"""Worker processes of a benchmark, each pinned to one core, and a stopwatch.

A worker is the benchmark's own script with `--worker` and a list in JSON. It reads a question a line from stdin and answers
each with a line of JSON on stdout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

CORE = min(os.sched_getaffinity(0))


def pin() -> None:
    """Pin this process to one core."""
    os.sched_setaffinity(0, {CORE})


def seconds_of(action: Callable[[], object]) -> float:
    """Return how long `action` takes."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


class Worker:
    """A worker process, pinned to one core."""

    def __init__(self, script: str, arguments: Sequence[Any], environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, script, "--worker", json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            preexec_fn=pin,
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
        alarm.start()
        try:
            self.process.stdin.write(f"{question}\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        alarm.cancel()
        return json.loads(answer) if answer else None

    def close(self) -> None:
        """Close its stdin and wait for its end."""
        self.process.communicate()

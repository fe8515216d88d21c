"""benchmarks/torture.py with three kills, and with two hosts where this machine permits network namespaces."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import torture as benchmark
from support.hosts import needs_hosts
from support.jobs import train
from workers import STOP_SIGNALS

Torture = Callable[..., list[dict[str, Any]]]


class Job(benchmark.Job):
    """A job of the benchmark, whose ranks are forks of this process where nothing kills it."""

    def run(self, kills: list[tuple[int, str]]) -> None:
        if kills:
            super().run(kills)
        else:
            train(self.ranks * len(self.hosts), *self.flags, f"--run_folder={self.name}", cwd=self.scratch)


@pytest.fixture
def torture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Torture]:
    """Return a function that runs the benchmark, which has to succeed, and returns its rows."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    monkeypatch.setattr(benchmark, "Job", Job)

    def run(*flags: str) -> list[dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", [benchmark.__file__, *flags, "--json", str(tmp_path / "rows.json")])
        benchmark.main()
        return json.loads((tmp_path / "rows.json").read_text())

    yield run
    for number, handler in handlers.items():  # which a benchmark replaces
        signal.signal(number, handler)


@pytest.mark.slow
def test_three_kills_do_not_change_the_parameters(torture: Torture) -> None:
    *kills, summary = torture("--ranks=1", "--kills=3", "--steps=90", "--seed=3", "--kinds=rank,launcher,stop")
    assert {row["variant"] for row in kills} == {"rank", "launcher", "stop"}
    assert summary["same"]


@pytest.mark.slow
@needs_hosts
def test_each_of_two_hosts_is_killed_and_recovers(torture: Torture) -> None:
    *kills, summary = torture("--hosts=2", "--ranks=1", "--kills=2", "--steps=60", "--seed=4", "--kinds=host")
    assert [row["note"] for row in kills] == ["host 1", "host 0, the rendezvous host"]
    assert summary["same"]

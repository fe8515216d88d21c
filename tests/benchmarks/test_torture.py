"""benchmarks/torture.py with three kills, and with two hosts where this machine permits network namespaces."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import torture as benchmark
from support.hosts import needs_hosts


def torture(tmp_path: Path, *flags: str) -> list[dict]:
    """Return the rows of a run, which has to succeed."""
    file = tmp_path / "rows.json"
    done = subprocess.run([sys.executable, benchmark.__file__, *flags, "--json", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(file.read_text())


@pytest.mark.slow
def test_three_kills_do_not_change_the_parameters(tmp_path):
    *kills, summary = torture(tmp_path, "--ranks=1", "--kills=3", "--steps=90", "--seed=3", "--kinds=rank,launcher,stop")
    assert {row["variant"] for row in kills} == {"rank", "launcher", "stop"}
    assert summary["same"]


@pytest.mark.slow
@needs_hosts
def test_each_of_two_hosts_is_killed_and_recovers(tmp_path):
    *kills, summary = torture(tmp_path, "--hosts=2", "--ranks=1", "--kills=2", "--steps=60", "--seed=4", "--kinds=host")
    assert [row["note"] for row in kills] == ["host 1", "host 0, the rendezvous host"]
    assert summary["same"]

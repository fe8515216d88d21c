"""benchmarks/torture.py with three kills, and with two hosts where the machine lets us make them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.hosts import needs_hosts

TORTURE = Path(__file__).parents[2] / "benchmarks" / "torture.py"


def torture(tmp_path: Path, *flags: str) -> list[dict]:
    """The rows of a run that went well."""
    file = tmp_path / "rows.json"
    done = subprocess.run([sys.executable, TORTURE, *flags, "--json", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(file.read_text())


@pytest.mark.slow
def test_three_kills_and_the_same_end(tmp_path):
    *kills, whole = torture(tmp_path, "--ranks=1", "--kills=3", "--steps=90", "--seed=3", "--kinds=rank,launcher,stop")
    assert {row["variant"] for row in kills} == {"rank", "launcher", "stop"}
    assert whole["same"]


@pytest.mark.slow
@needs_hosts
def test_each_of_two_hosts_dies_and_comes_back(tmp_path):
    *kills, whole = torture(tmp_path, "--hosts=2", "--ranks=1", "--kills=2", "--steps=60", "--seed=4", "--kinds=host")
    assert [row["note"] for row in kills] == ["host 1", "host 0, the rendezvous host"]
    assert whole["same"]

"""launch/node.sh on two hosts, and what it says to wrong usage."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from corpora import chain, write_data_folder
from hosts import Host, hosts, needs_hosts
from jobs import SMALL, installed, losses, train_here

NODE = Path(__file__).parents[1] / "launch" / "node.sh"


def start(host: Host, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command, environment = host.command(NODE, *arguments), {**installed(), "PET_NPROC_PER_NODE": "1"}
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
@needs_hosts
def test_two_machines_are_one_job(tmp_path):
    """With the same losses as one rank, though the machines have nothing in common but a network and the run folder."""
    data = {"train": chain(451, 30), "valid": chain(103, 30, seed=1)}
    write_data_folder(tmp_path / "data", data, 30)
    flags = [*SMALL, "--model.dropout=0", "--training.steps=6", "--run_folder=two", "--data.folder=data"]
    with hosts("host-a", "host-b") as (first, second):
        later = start(second, tmp_path, "1", "2", "host-a", *flags)
        job = start(first, tmp_path, "0", "2", "host-a", *flags)
        said = job.communicate(timeout=120)[0]
        assert job.returncode == 0, said
        said_later = later.communicate(timeout=60)[0]
        assert later.returncode == 0, said_later
        assert "rank(s)" not in said_later, "machine 0 alone speaks"
        assert "on 2 rank(s)" in said, said
        train_here(*flags, f"--data.folder={tmp_path / 'data'}", f"--run_folder={tmp_path / 'one'}")
        np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=0, atol=1e-5)

        # A wrong recipe ends the launcher of each machine; nobody waits for the others.
        flags.append("--model.nhid=3")
        both = [start(host, tmp_path, str(number), "2", "host-a", *flags) for number, host in enumerate((first, second))]
        assert [process.communicate(timeout=60)[0].count("nhid") > 0 for process in both] == [True, True]
        assert [process.returncode for process in both] == [64, 64]


WRONG = {
    "nothing": ([], "0 arguments"),
    "no machine 0": (["0", "2"], "2 arguments"),
    "a flag for machine 0": (["0", "2", "--config"], "'--config' is given"),
    "a number too large": (["2", "2", "host-a"], "machine 2 of 2"),
    "a name for a number": (["host-a", "2", "0"], "machine host-a of 2"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_usage_is_said(case):
    arguments, message = WRONG[case]
    done = subprocess.run([NODE, *arguments], capture_output=True, text=True)
    assert done.returncode == 64
    assert message in done.stderr
    assert "usage: launch/node.sh NODE_RANK NNODES MASTER_ADDR" in done.stderr


def test_help_is_no_mistake():
    done = subprocess.run([NODE, "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: launch/node.sh")


def test_flags_come_after_its_own_and_are_passed_on_word_by_word(tmp_path):
    (tmp_path / "lmdist-train").write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done; exit 66\n')
    (tmp_path / "lmdist-train").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        [NODE, "1", "3", "host a", "--restarts", "2", "--prepare.inputs", "[a b.csv]"],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
    )
    given = dict(zip(*[iter(done.stdout.splitlines())] * 2, strict=True))
    assert done.returncode == 66
    assert given == {
        "--nnodes": "3",
        "--node-rank": "1",
        "--master-addr": "host a",
        "--restarts": "2",  # the last one counts
        "--resume": "auto",
        "--prepare.inputs": "[a b.csv]",
    }

"""launch/node.sh on two hosts, as launch/multi-node.md starts it, and its answer to wrong usage."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import psutil
import pytest

from corpora import chain, write_data_folder
from support.hosts import hosts, needs_hosts
from support.jobs import installed, losses, train_here, wait_for_steps

NODE = Path(__file__).parents[2] / "launch" / "node.sh"
PAGE = NODE.with_name("multi-node.md")


@pytest.mark.slow
@needs_hosts
def test_the_page_joins_two_machines_by_ssh_and_stops_them(tmp_path):
    """With the same losses as one rank, though the machines have nothing in common but a network and the run folder."""
    start_all, stop_all = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    write_data_folder(tmp_path / "data", {"train": chain(451, 30)}, 30)
    (tmp_path / "launch").symlink_to(NODE.parent)
    (tmp_path / "my.toml").write_text(
        'run_folder = "run"\n[data]\nfolder = "data"\nglobal_batch = 8\nwindow = 7\n'
        '[training]\ndevice = "cpu"\nepochs = 4000\nlog_every = 1\nprecision = "fp32"\n'
        "[model]\nembedding_size = 16\nhidden_size = 24\ndropout = 0\n[optimizer]\nlearning_rate = 0.02\n"
        '[schedule]\nname = "constant"\n[tracking]\nmlflow = false\n'
    )
    with hosts("host-a", "host-b") as machines:
        ssh = "\n".join(f'{host.name}) exec {shlex.join(host.command("sh", "-c"))} "$2" ;;' for host in machines)
        (tmp_path / "ssh").write_text(f'#!/bin/sh\ncase "$1" in\n{ssh}\nesac\n')  # a stand-in that goes to the host
        (tmp_path / "ssh").chmod(0o755)
        environment = installed()
        environment |= {"PATH": f"{tmp_path}:{environment['PATH']}", "PET_NPROC_PER_NODE": "1"}
        script = f"set -e\n{start_all}\nread -r line\n{stop_all}"
        shell = subprocess.Popen(["bash", "-c", script], cwd=tmp_path, env=environment, stdin=subprocess.PIPE, text=True)
        try:
            wait_for_steps(tmp_path / "run", 6)
            launchers = [psutil.Process(int((tmp_path / f"node-{rank}.pid").read_text())) for rank in range(2)]
            shell.communicate("stop\n", timeout=120)
            assert shell.returncode == 0
            assert not psutil.wait_procs(launchers, timeout=300)[1]
        finally:
            shell.kill()
            shell.communicate()
    logs = [(tmp_path / f"node-{rank}.log").read_text() for rank in range(2)]
    assert "on 2 ranks" in logs[0]
    assert " ranks, " not in logs[1], "machine 0 alone logs"
    assert "stopped on request after step" in logs[0]
    assert all("stop requested" in log for log in logs), logs
    places = [f"--config={tmp_path / 'my.toml'}", f"--data.folder={tmp_path / 'data'}", f"--run_folder={tmp_path / 'one'}"]
    train_here(*places, "--training.steps=6")
    np.testing.assert_allclose(losses(tmp_path / "run")[:6], losses(tmp_path / "one"), rtol=0, atol=1e-5)


@pytest.mark.slow
@needs_hosts
def test_a_wrong_recipe_ends_the_launcher_of_each_machine(tmp_path):
    """Nobody waits for the others."""
    with hosts("host-a", "host-b") as machines:
        both = [
            subprocess.Popen(
                host.command(NODE, str(rank), "2", "host-a", "--model.nhid=3"),
                cwd=tmp_path,
                env=installed(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank, host in enumerate(machines)
        ]
        assert all("nhid" in process.communicate(timeout=120)[0] for process in both)
    assert [process.returncode for process in both] == [64, 64]


WRONG = {
    "nothing": ([], "0 arguments"),
    "no machine 0": (["0", "2"], "2 arguments"),
    "a flag for machine 0": (["0", "2", "--config"], "'--config' is given"),
    "a number too large": (["2", "2", "host-a"], "machine 2 of 2"),
    "a name for a number": (["host-a", "2", "0"], "machine host-a of 2"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_usage_is_reported(case):
    arguments, message = WRONG[case]
    done = subprocess.run([NODE, *arguments], capture_output=True, text=True)
    assert done.returncode == 64
    assert message in done.stderr
    assert "usage: launch/node.sh NODE_RANK NNODES MASTER_ADDR" in done.stderr


def test_help_exits_with_0():
    done = subprocess.run([NODE, "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: launch/node.sh")


def test_flags_follow_its_own_and_are_passed_on_unchanged(tmp_path):
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

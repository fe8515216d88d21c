"""The hosts and pods of the other tests: networks, names, processes, users and writable places of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import namespaces
from support.hosts import Sandbox, first_process, hosts, needs_hosts, needs_pods

SERVER = "import socket; s = socket.create_server(('', 4000)); s.accept()[0].sendall(socket.gethostname().encode())"
CLIENT = """
import socket, sys, time
for _ in range(1200):
    try:
        print(socket.create_connection((sys.argv[1], 4000), timeout=10).recv(100).decode())
        break
    except ConnectionRefusedError:
        time.sleep(0.05)
"""


def output(command: list[str]) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=60).stdout.strip()


@needs_hosts
def test_hosts_reach_each_other_by_name_until_a_cable_is_pulled():
    here = os.uname().nodename
    with hosts("lmdist-train-0.lmdist-train", "lmdist-train-1.lmdist-train") as (first, second):
        server = subprocess.Popen(first.command(sys.executable, "-c", SERVER))
        assert output(second.command(sys.executable, "-c", CLIENT, first.name)) == "lmdist-train-0"
        assert server.wait(timeout=60) == 0
        first.unplug()
        with pytest.raises(subprocess.CalledProcessError):
            output(second.command(sys.executable, "-c", "import socket; socket.create_connection(('lmdist-train-0', 1), 0.3)"))
        server = subprocess.Popen(first.command(sys.executable, "-c", SERVER))
        first.plug()
        assert output(second.command(sys.executable, "-c", CLIENT, "lmdist-train-0")) == "lmdist-train-0"
        assert server.wait(timeout=60) == 0

        running = subprocess.Popen(first.command("sleep", "600"))
        beside = subprocess.Popen(second.command("sleep", "600"))
        while {psutil.Process(process.pid).name() for process in (running, beside)} != {"sleep"}:
            time.sleep(0.01)
        first.kill_all()
        assert running.wait(timeout=60) == -signal.SIGKILL
        assert beside.poll() is None
    assert beside.wait(timeout=60) == -signal.SIGKILL, "no process of a removed host is left"
    assert os.uname().nodename == here
    assert "lmdist" not in Path("/etc/hosts").read_text()


@needs_hosts
def test_hosts_of_a_killed_test_are_removed_by_the_next():
    script = "import os, signal, namespaces\nwith namespaces.hosts('a') as (a,): os.kill(os.getpid(), signal.SIGKILL)"
    killed = subprocess.Popen([sys.executable, "-c", script], cwd=Path(namespaces.__file__).parent)
    assert killed.wait(timeout=60) == -signal.SIGKILL
    left = f"lmdist-{killed.pid}-"
    assert left in output(["ip", "netns", "list"])
    with hosts("a"):
        assert left not in output(["ip", "netns", "list"])


@needs_pods
def test_a_pod_is_isolated_and_writes_to_its_mounts_only(tmp_path):
    (tmp_path / "runs").mkdir()
    os.chown(tmp_path / "runs", 10001, 10001)
    (tmp_path / "recipe.toml").write_text("[model]\n")
    with hosts("pod-0.pods", "pod-1.pods") as (first, second):
        pod = Sandbox(
            first,
            {"PATH": "/usr/bin:/bin", "A": "b c"},
            mounts={"/runs": tmp_path / "runs"},
            configuration={"/etc-lmdist/recipe.toml": tmp_path / "recipe.toml"},
        )
        script = """
            echo $$ $(id -u):$(id -g) $(hostname) $(ls -d /proc/[0-9]* | wc -l)
            echo $(tr '\\0' '\\n' < /proc/1/environ | grep -v ^PWD= | sort)
            for place in / /etc /usr /recipe /etc-lmdist /dev /runs /tmp /dev/shm; do
                touch $place/probe 2>/dev/null && echo writes to $place
            done
            echo x 2>/dev/null >> /etc-lmdist/recipe.toml || cat /etc-lmdist/recipe.toml
            getent hosts pod-1.pods
        """
        lines = output(pod.command("sh", "-c", script)).splitlines()
        assert lines[0].startswith("1 10001:10001 pod-0 ")
        assert lines[1] == "A=b c PATH=/usr/bin:/bin"
        assert lines[2:5] == ["writes to /runs", "writes to /tmp", "writes to /dev/shm"]
        assert lines[5] == "[model]"
        assert lines[-1].split() == ["10.77.0.2", "pod-1.pods", "pod-1"]
        assert (tmp_path / "runs" / "probe").stat().st_uid == 10001

        python = Sandbox(second, {"PATH": str(Path(sys.executable).parent)}).command(
            "python", "-c", "import os; print(os.getpid())"
        )
        assert output(python) == "1", "the pod has Python, wherever it is installed"

        job = subprocess.Popen(pod.command("sh", "-c", "sleep 600 & : > /runs/started; wait"))
        process = first_process(job)
        while not (tmp_path / "runs" / "started").exists():
            time.sleep(0.01)
        (child,) = process.children()
        process.kill()
        assert job.wait(timeout=60) != 0
        psutil.wait_procs([child], timeout=60)
        assert not child.is_running(), "the pod dies with its process 1"

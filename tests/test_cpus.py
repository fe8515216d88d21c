"""The cores that a process may use, in fake control groups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lmdist import cpus as machine

GROUPS = {
    "no control groups": ({}, 64),
    "version 2, a container with a namespace": (
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"},
        2,
    ),
    "a fraction is rounded up": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
    "half a core is one": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
    "version 2 without a limit": ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "max 100000\n"}, 64),
    "the least of all above counts": (
        {
            "proc/self/cgroup": "0::/kubepods/pod1/main\n",
            "sys/fs/cgroup/kubepods/pod1/main/cpu.max": "max 100000\n",
            "sys/fs/cgroup/kubepods/pod1/cpu.max": "300000 100000\n",
            "sys/fs/cgroup/kubepods/cpu.max": "6000000 100000\n",
        },
        3,
    ),
    "a sibling's does not": (
        {"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "max 100000\n", "sys/fs/cgroup/b/cpu.max": "1000 100000\n"},
        64,
    ),
    "version 1, told its path on the machine": (
        {
            "proc/self/cgroup": "5:memory:/docker/b0b1\n4:cpu,cpuacct:/docker/b0b1\n1:name=systemd:/docker/b0b1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        4,
    ),
    "version 1 without a limit, version 2 beside it": (
        {
            "proc/self/cgroup": "3:cpuset:/\n1:cpu:/\n0::/../outside\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        64,
    ),
    "a limit above the cores that there are": (
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "12800000 100000\n"},
        64,
    ),
    "nonsense is passed over": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "1 0\n"}, 64),
}


@pytest.mark.parametrize("case", GROUPS)
def test_a_quota_is_as_good_as_fewer_cores(case, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
    files, expected = GROUPS[case]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert machine.available_cpus(tmp_path) == expected


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity on this system")
def test_the_machine_of_the_tests_has_cores():
    assert 1 <= machine.available_cpus(Path("/")) <= len(os.sched_getaffinity(0))


def test_threads_are_as_many_as_cpus_but_for_a_users_own_number(monkeypatch):
    for name in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # monkeypatch restores what was there
        monkeypatch.delenv(name)
    monkeypatch.setattr(machine, "available_cpus", lambda: 3)
    machine.limit_threads()
    assert (os.environ["OMP_NUM_THREADS"], os.environ["GOMP_SPINCOUNT"]) == ("3", str(machine.SPINS))
    monkeypatch.setattr(machine, "available_cpus", lambda: 5)
    machine.limit_threads()
    assert os.environ["OMP_NUM_THREADS"] == "3"

"""The CPUs that a process may use, and the environment variables that make it fast on them.

A container sees all CPUs of its machine and may run on each of them for a part of the time: `limits.cpu: 2` on a machine of
64 CPUs is a quota of its control group. One thread for each CPU of the machine would use up the quota at once, and then all
of them would be throttled together. This module knows the control groups of Linux, versions 1 and 2, and nothing of lmdist.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

MEMORY_ENVIRONMENT = {
    "THP_MEM_ALLOC_ENABLE": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 62),
}
"""How a process that trains on a CPU allocates memory: torch's tensors in huge pages, and, by glibc, what a step has freed is
kept for the next one. Otherwise the kernel takes it back and clears it again for each large tensor of each step."""
SPINS = 10_000
"""How often a thread of OpenMP looks for work before it sleeps; GNU's default of 300,000 keeps its CPU for milliseconds. Where
another process holds one of two CPUs, evaluation took 150 times as long with the default as asleep, and 10 times with this; on
quiet CPUs this costs it an eighth, and sleeping at once a half."""


def available_cpus(root: Path = Path("/")) -> int:
    """Return the number of CPUs that this process may keep busy, at least one; `root` is the folder of /proc and /sys."""
    may_run_on = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([may_run_on, *(math.ceil(quota) for quota in quotas(root))]))


def limit_threads() -> None:
    """Have torch, which must not be imported yet, start a thread for each CPU that this process may keep busy, and no more.

    Neither does a thread without work hold its CPU for long. Variables that the user has set are kept.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(available_cpus()))
    os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))


def quotas(root: Path) -> Iterator[float]:
    """Yield the CPU seconds per second of this process' control group and its parents, where they are limited."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:  # 0::/user.slice in version 2; 4:cpu,cpuacct:/docker/b0b1 in version 1
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounted = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        # A container may see its path on the machine while its own group is mounted as the topmost one: folders that do not
        # exist are skipped, and the walk ends at the mount.
        own = mounted.joinpath(*(part for part in path.split("/") if part not in ("", "..")))
        for group in [own, *own.parents]:
            with suppress(OSError, ValueError, ZeroDivisionError):  # no such file, or no limit: "max 100000"
                if controllers:
                    quota, period = (
                        int((group / "cpu.cfs_quota_us").read_text()),
                        int((group / "cpu.cfs_period_us").read_text()),
                    )
                else:
                    quota, period = map(int, (group / "cpu.max").read_text().split())
                if quota > 0:  # -1 is no limit in version 1
                    yield quota / period
            if group == mounted:
                break

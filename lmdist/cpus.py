"""What of this machine is ours: the cores that a process may use.

A container sees all cores of its machine and may run on each of them, for a part of the time: `limits.cpu: 2` on a machine of
64 cores is a quota of its control group. As many threads as the machine has cores would use it up in a moment, and then all of
them stand still together. This module knows Linux' control groups, of either version, and nothing of lmdist.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def available_cpus(root: Path = Path("/")) -> int:
    """Cores that this process may keep busy, at least one; `root` is where /proc and /sys are."""
    may_run_on = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([may_run_on, *(math.ceil(quota) for quota in quotas(root))]))


def quotas(root: Path) -> Iterator[float]:
    """Processor seconds a second that this process' control group and those above it may use, where they are limited."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:  # 0::/user.slice in version 2; 4:cpu,cpuacct:/docker/b0b1 in version 1
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounted = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        # A container may be told its path on the machine and have its own group mounted as if it were the topmost one: what
        # is not there is passed over, and the walk ends at the mount.
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

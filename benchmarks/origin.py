"""Where and of what a figure was measured: the machine, the versions, the commit, the command and the day.

beside = facts(("lmdist", "torch"), "python benchmarks/NAME.py")
write_rows(Path("NAME.json"), [{**row, **beside} for row in rows])
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any


def facts(packages: Sequence[str], command: str, device: str = "cpu") -> dict[str, Any]:
    """What stands beside the figures of a run on `device` that used these packages and was started by this command."""
    machine = f"{os.cpu_count()} cores, {processor()}"
    if device == "cuda":
        import torch

        machine = f"{torch.cuda.get_device_name()}, {machine}"
    return {
        "machine": machine,
        "versions": {name: version(name) for name in packages},
        "commit": git("rev-parse", "HEAD"),
        "command": command,
        "date": date.today().isoformat(),
    }


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as benchmarks/results/ has them."""
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def git(*arguments: str) -> str:
    """What git says of this repository."""
    where = Path(__file__).parent
    return subprocess.run(["git", *arguments], cwd=where, stdout=subprocess.PIPE, text=True).stdout.strip()


def processor() -> str:
    """The processor's name, as Linux has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())

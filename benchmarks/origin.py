"""The rows of a benchmark: collected, completed with where and of what they were measured, and written however it ends.

    add_json_option(parser)
    arguments = parser.parse_args()
    with collect_rows(arguments.json, ("lmdist", "torch"), command_line(parser, arguments)) as rows:
        rows += measure(...)

Each row gets the machine, the versions, the commit, the command and the day. A run that is stopped or fails writes the rows
it has, with `partial` in each of them; Ctrl-C and SIGTERM kill the processes that it started and exit with 130 and 143.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lmdist
from workers import exit_when_stopped

Row = dict[str, Any]

RESULTS = Path(__file__).parent / "results"
UNNAMED = Path()
"""The value of --json without a file name."""
OUTPUTS = ("json", "plot")
"""Options that say where figures go, and change none."""


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add the option --json [FILE]."""
    parser.add_argument(
        "--json",
        nargs="?",
        type=json_file,
        const=UNNAMED,
        metavar="FILE",
        help="write the rows to this file (without a name: benchmarks/results/NAME-MACHINE-DATE.json), also when stopped",
    )


def json_file(name: str) -> Path:
    """Return the path of a file for rows; another name than *.json is probably an argument that follows --json."""
    if not name.endswith(".json"):
        raise argparse.ArgumentTypeError(f"the rows go to a file *.json, not to {name}")
    return Path(name)


def command_line(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> str:
    """Return the command that started a benchmark, with each option that differs from its default.

    `arguments` are those that were given, before --quick changes them. A file or folder outside the current folder has its
    name and not its place.
    """
    words = ["python", f"benchmarks/{parser.prog}"]
    for action in parser._actions:
        value = getattr(arguments, action.dest, None)
        if action.dest in OUTPUTS or value in (None, action.default):
            continue
        flag = action.option_strings[:1]  # none of a positional argument
        values = value if isinstance(value, list) else [value]
        words += flag if action.nargs == 0 else [word for each in values for word in (*flag, shown(each))]
    return shlex.join(words)


def shown(value: Any) -> str:
    """Return the value of an option as a command has it."""
    if isinstance(value, float):
        return f"{value:g}"
    path = Path(str(value))
    return path.name if path.is_absolute() or ".." in path.parts else str(value)


@contextmanager
def collect_rows(
    path: Path | None, packages: Sequence[str], command: str, device: str = "cpu", suffix: str = ""
) -> Iterator[list[Row]]:
    """Yield a list for rows; at the end, and when the run is stopped or fails, write them to `path`, if there is one.

    `suffix` is that of NAME in the name of a file that --json does not name. In a field that both have, a row's own value
    replaces that of `facts`.
    """
    beside = facts(packages, command, device)
    if path == UNNAMED:
        quick = "-quick" if "--quick" in sys.argv else ""
        path = RESULTS / f"{Path(sys.argv[0]).stem}{suffix}{quick}-{machine_kind(device)}-{beside['date']}.json"
    rows: list[Row] = []
    exit_when_stopped()
    try:
        yield rows
    except BaseException:
        beside["partial"] = True
        raise
    finally:
        rows[:] = [row | beside | row for row in rows]
        if path and rows:
            write_rows(path, rows)
            print(f"{len(rows)} rows in {path}" + (", of a run that did not end" if "partial" in beside else ""), flush=True)


def facts(packages: Sequence[str], command: str, device: str = "cpu") -> dict[str, Any]:
    """What stands beside the figures of a run on `device` that used these packages and was started by this command."""
    machine = f"{os.cpu_count()} cores, {processor()}"
    if device == "cuda":
        import torch

        machine = f"{torch.cuda.get_device_name()}, {machine}"
    return {
        "machine": machine,
        "amx": has_amx(),
        "versions": {name: version_of(name) for name in packages},
        "commit": git("rev-parse", "HEAD"),
        "command": command,
        "date": date.today().isoformat(),
    }


def version_of(package: str) -> str:
    """The version of a package; lmdist's own also where it runs from a copy of the repository."""
    try:
        return version(package)
    except PackageNotFoundError:
        return lmdist.__version__ if package == "lmdist" else "not installed"


def machine_kind(device: str = "cpu") -> str:
    """Return the machine's part of a result's file name: cpu2-amx, cpu2-noamx, or the GPU's name."""
    if device == "cuda":
        import torch

        return re.sub(r"[^a-z0-9]", "", torch.cuda.get_device_name().lower())
    return f"cpu{os.cpu_count()}-{'amx' if has_amx() else 'noamx'}"


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as benchmarks/results/ has them."""
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def git(*arguments: str) -> str:
    """What git says of this repository; nothing where there is no git, or only a copy of the files."""
    where = Path(__file__).parent
    try:
        return subprocess.run(["git", *arguments], cwd=where, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def processor() -> str:
    """The processor's name, as Linux has it."""
    return cpuinfo("model name") or platform.processor()


def has_amx() -> bool:
    """Return whether the processor multiplies bf16 matrices in hardware, by AMX."""
    return "amx_bf16" in cpuinfo("flags").split()


def cpuinfo(field: str) -> str:
    """Return a field of the first processor in Linux's /proc/cpuinfo; an empty string elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":")[1].strip() for line in lines if line.startswith(field)), "")

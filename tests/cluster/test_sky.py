"""launch/sky.yaml: its script under a real shell, with the variables that SkyPilot sets on each machine."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
TASK = yaml.safe_load((ROOT / "launch" / "sky.yaml").read_text())


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_machine_starts_its_part_of_the_job(rank: str, tmp_path: Path) -> None:
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    (tmp_path / "lmdist-train").write_text(f"#!{sys.executable}\nimport sys; print(sys.argv[1:]); sys.exit(75)\n")
    (tmp_path / "lmdist-train").chmod(0o755)
    variables = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SKYPILOT_NODE_RANK": rank,
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_TASK_ID": "sky-managed-2026-11-29_lmdist_8-0",
        **TASK["envs"],
    }
    done = subprocess.run(["bash", "-c", TASK["run"]], cwd=tmp_path, env=variables, capture_output=True, text=True)
    arguments = ["--nnodes", "2", "--node-rank", rank, "--master-addr", "10.0.0.1", "--restarts", "20", "--resume", "auto"]
    arguments += [*shlex.split(TASK["envs"]["LMDIST_FLAGS"]), "--run_folder", "/runs/sky-managed-2026-11-29_lmdist_8-0"]
    assert done.stdout == f"{arguments}\n", done.stderr
    assert done.returncode in TASK["resources"]["job_recovery"]["recover_on_exit_codes"]


def test_the_names_in_it_exist() -> None:
    assert (ROOT / TASK["envs"]["LMDIST_FLAGS"].removeprefix("--config ")).is_file()
    assert "/runs" in TASK["file_mounts"]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    [named] = re.findall(r"\.\[(.+)\]", TASK["setup"])
    assert set(named.split(",")) <= set(extras)

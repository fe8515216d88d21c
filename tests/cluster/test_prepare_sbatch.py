"""launch/prepare.sbatch: an array counts the shards, and a job merges them."""

from __future__ import annotations

import subprocess
from pathlib import Path

from lmdist.settings import PrepareSettings
from lmdist.text.prepare import prepare
from support.jobs import installed

SCRIPT = Path(__file__).parents[2] / "launch" / "prepare.sbatch"


def submit(
    folder: Path, arguments: list[str], task: int | None = None, first: int = 0, last: int = 2
) -> subprocess.CompletedProcess[str]:
    """Run the script as Slurm runs a task of an array, or a job without one."""
    array = {"TASK_ID": task, "TASK_MIN": first, "TASK_MAX": last, "TASK_COUNT": last - first + 1} if task is not None else {}
    variables = {f"SLURM_ARRAY_{name}": str(value) for name, value in array.items()}
    environment = {**installed(), **variables}
    return subprocess.run(["bash", SCRIPT, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def test_the_array_and_the_merge_write_the_folder_of_one_process(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"a {number}.txt").write_text("\n\n".join(f"text {text} of file {number}" for text in range(20)))
    arguments = ["a *.txt", "-o", "data", "--tokenizer", "wordpunct"]
    for task in (2, 0, 1):
        done = submit(tmp_path, arguments, task)
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith(f"written to data.shards/0000{task}-of-00003\n")
    for _ in range(2):  # and once more, as after the loss of its node
        done = submit(tmp_path, [*arguments, "--merge", "--overwrite"])
        assert done.returncode == 0, done.stderr
    assert submit(tmp_path, arguments, 1).stdout == "data.shards/00001-of-00003 is done\n", "though there is a data folder"
    prepare(PrepareSettings(inputs=[str(tmp_path / "a *.txt")], tokenizer="wordpunct"), tmp_path / "whole")
    for name in ("train.bin", "valid.bin", "test.bin", "vocab.txt"):
        assert (tmp_path / "data" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_an_array_with_gaps_is_a_mistake(tmp_path: Path) -> None:
    done = submit(tmp_path, ["a.txt", "-o", "data"], 1, first=1)
    assert done.returncode == 64
    assert "an array from 0 without gaps is expected" in done.stderr

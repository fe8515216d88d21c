"""Checkpoints that cannot be bad: killed while saving, on a full disk, damaged afterwards."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from corpora import chain, write_data_folder
from lmdist.errors import DataError, Stopped, UsageError
from lmdist.settings import ModelSettings
from lmdist.training.checkpoints import write
from lmdist.training.checkpoints.format import Progress
from lmdist.training.checkpoints.read import open_checkpoint
from lmdist.training.checkpoints.retain import newest_checkpoint, remove_old, remove_unfinished
from lmdist.training.checkpoints.write import NICENESS, Saver, take_snapshot, write_checkpoint
from lmdist.training.data import DataFolder
from support.jobs import SMALL, after_one_step, losses, rows, small_data, train, train_here


@pytest.fixture
def state(tmp_path):
    """A data folder, a small model, its optimizer after one step, the streams' state and the recipe."""
    data = write_data_folder(tmp_path / "data", {"train": chain(400, 50)}, 50)
    return data, *after_one_step(ModelSettings(embedding_size=32, hidden_size=64), 50, rows=4)


CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}
"""The audit events of changes to files, beside those that open one to write."""


def kill_before_change(number: int) -> None:
    """Have this process killed before a change to files, the next of which is number 0."""
    left = itertools.count(number, -1)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if (event in CHANGES or (event == "open" and arguments[2] & os.O_ACCMODE != os.O_RDONLY)) and not next(left):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


class Saving:
    """Children that save step after step, each with the step's number in its parameters, and are killed."""

    def __init__(self, state: Any, checkpoints: Path) -> None:
        self.data, self.model, self.optimizer, self.streams, self.recipe = state
        self.checkpoints = checkpoints
        began = time.monotonic()
        for step in range(1, 6):
            self.save(step)
        self.step, self.seconds = 5, (time.monotonic() - began) / 5

    def save(self, step: int) -> None:
        with torch.no_grad():
            self.model.projection.bias.fill_(step)
        taken = take_snapshot(Progress(step), self.model, self.optimizer, self.streams)
        write_checkpoint(self.checkpoints, taken, self.recipe, DataFolder(self.data))
        remove_old(self.checkpoints, keep=2)

    def fork(self, saves: int, change: int | None = None) -> int:
        """Return the process id of a child that makes so many saves, and is killed before a change."""
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.write(writing, b"!")  # to copy a process that has run many tests takes longer than some of the waits below
                remove_unfinished(self.checkpoints)
                if change is not None:
                    kill_before_change(change)
                for number in range(saves):
                    self.save(self.step + 1 + number)
                os._exit(0)
            finally:
                os._exit(1)
        os.read(reading, 1)
        os.close(reading)
        os.close(writing)
        return child

    def check(self, kill: str) -> None:
        """Check that what a killed child has left can be read, and is not older than what there was before."""
        found = newest_checkpoint(self.checkpoints)
        assert found is not None, f"{kill}: nothing is left of step {self.step}"
        opened = open_checkpoint(found)  # checks the sums of all its files
        loaded, manifest = opened.model(), opened.manifest
        step = manifest["progress"]["step"]
        assert step >= self.step, f"{kill}: an earlier checkpoint than before"
        assert loaded.get_parameter("projection.bias").unique().tolist() == [step], f"{kill}: half of another step"
        fresh = torch.optim.AdamW(loaded.parameters())
        assert open_checkpoint(found).load_training(fresh)[0].step == step
        self.step = step


def test_a_kill_before_any_change_to_files_while_saving_leaves_nothing_that_cannot_be_read(state, tmp_path):
    saving = Saving(state, tmp_path / "checkpoints")
    change, status = -1, 1
    while status != 0:
        change += 1
        _, status = os.waitpid(saving.fork(1, change), 0)
        saving.check(f"killed before change {change}")
        assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL)
    assert change > 15, "a save makes more changes than these"
    for folder in saving.checkpoints.glob("step-*"):
        open_checkpoint(folder)


def test_a_kill_at_any_moment_while_saving_leaves_nothing_that_cannot_be_read(state, tmp_path):
    """In the middle of a change as well."""
    saving = Saving(state, tmp_path / "checkpoints")
    generator, in_the_middle = random.Random(5), 0
    for kill in range(30):
        child = saving.fork(1_000_000)
        time.sleep(generator.uniform(0, 3 * saving.seconds))  # a third of the kills comes before the first save is done
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        in_the_middle += any(path.name.startswith(".") for path in saving.checkpoints.glob(".*"))
        saving.check(f"kill {kill}")
    assert saving.step > 8, "hardly anything was saved"
    assert in_the_middle > 2, "hardly any kill came while something was being written"


def test_a_write_that_fails_is_a_warning_and_the_last_one_a_stop(state, tmp_path, capsys):
    data, model, optimizer, streams, recipe = state
    checkpoints = tmp_path / "checkpoints"
    saver = Saver(checkpoints, recipe, DataFolder(data), keep=2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(step: int, largest_file: int) -> None:
        taken = take_snapshot(Progress(step), model, optimizer, streams)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, before[1]))
        try:
            saver.save(taken)
            saver.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    save(1, before[0])
    save(2, 40_000)
    assert "the checkpoint of step 2 could not be written" in capsys.readouterr().err
    assert sorted(path.name for path in checkpoints.iterdir()) == ["newest", "step-000000001"], "no half folder"
    with pytest.raises(Stopped, match=r"the newest one is step-000000001.*--resume auto"):
        saver.close()
    save(3, before[0])
    saver.close()
    newest = newest_checkpoint(checkpoints)
    assert newest is not None
    assert newest.name == "step-000000003"


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (OSError(errno.EROFS, "Read-only file system"), DataError),
        (OSError(errno.ELOOP, "Too many levels of symbolic links"), DataError),
        (FileExistsError(errno.EEXIST, "File exists"), DataError),
        (OSError(errno.ENOSPC, "No space left on device"), Stopped),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), Stopped),
        (SafetensorError("Error while serializing"), Stopped),  # of a full disk
    ],
)
def test_only_what_another_try_may_mend_is_a_stop(state, tmp_path, failure, kind):
    saver = Saver(tmp_path / "checkpoints", {}, DataFolder(state[0]), keep=2)
    saver.failure = failure
    with pytest.raises(kind, match="the newest one is none"):
        saver.close()


def test_old_checkpoints_that_cannot_be_removed_are_a_warning_and_the_new_one_is_saved(state, tmp_path, capsys, monkeypatch):
    def forbidden(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    data, model, optimizer, streams, recipe = state
    monkeypatch.setattr(write, "remove_old", forbidden)
    saver = Saver(tmp_path / "checkpoints", recipe, DataFolder(data), keep=2)
    saver.save(take_snapshot(Progress(7), model, optimizer, streams))
    saver.close()
    assert "old checkpoints could not be removed: [Errno 13]" in capsys.readouterr().err


def test_a_write_that_has_failed_does_not_replace_the_error_that_ends_the_training(state, tmp_path):
    saver = Saver(tmp_path / "checkpoints", {}, DataFolder(state[0]), keep=2)
    saver.failure = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(UsageError, match="diverged"), saver:
        raise UsageError("the training has diverged")


def test_a_checkpoint_is_overdue_once_after_so_many_minutes(state, tmp_path):
    saver = Saver(tmp_path / "checkpoints", {}, DataFolder(state[0]), keep=2)
    saver.asked -= 61
    assert [saver.is_overdue(minutes) for minutes in (0, 2, 1, 1)] == [False, False, True, False]


def test_a_link_in_the_place_of_a_checkpoint_is_no_full_disk(state, tmp_path):
    data, model, optimizer, streams, recipe = state
    saver = Saver(tmp_path / "checkpoints", recipe, DataFolder(data), keep=2)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-000000001").symlink_to(tmp_path)
    saver.save(take_snapshot(Progress(1), model, optimizer, streams))
    with pytest.raises(DataError, match="is a link"):
        saver.close()


def test_what_the_training_does_next_does_not_change_a_snapshot(state):
    _, model, optimizer, streams, _ = state
    taken = take_snapshot(Progress(1), model, optimizer, streams)
    kept = {name: value.clone() for name, value in {**taken.parameters, **taken.training}.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
        for values in optimizer.state_dict()["state"].values():
            values["exp_avg"].add_(1)
        streams[0].add_(1)
    for name, value in {**taken.parameters, **taken.training}.items():
        assert torch.equal(value, kept[name]), name


@pytest.mark.skipif(sys.platform != "linux", reason="a thread has no niceness of its own")
def test_the_thread_that_writes_leaves_the_cores_to_the_training(tmp_path):
    data = small_data(tmp_path / "data")
    model, optimizer, streams, recipe = after_one_step(ModelSettings(embedding_size=256, hidden_size=256), 5_000, rows=4)
    saver = Saver(tmp_path / "checkpoints", recipe, DataFolder(data), keep=2)
    own = os.getpriority(os.PRIO_PROCESS, 0)
    saver.save(take_snapshot(Progress(1), model, optimizer, streams))
    assert saver.thread is not None
    assert saver.thread.native_id is not None
    seen = set()
    with contextlib.suppress(ProcessLookupError):  # it has ended
        while True:
            seen.add(os.getpriority(os.PRIO_PROCESS, saver.thread.native_id))
            time.sleep(0.0005)
    saver.close()
    assert max(seen) == min(own + NICENESS, 19)
    assert os.getpriority(os.PRIO_PROCESS, 0) == own


def test_a_container_that_forbids_a_niceness_still_gets_its_checkpoints(state, tmp_path, monkeypatch):
    def forbidden(increment: int) -> int:
        raise PermissionError

    data, model, optimizer, streams, recipe = state
    monkeypatch.setattr(os, "nice", forbidden)
    saver = Saver(tmp_path / "checkpoints", recipe, DataFolder(data), keep=2)
    saver.save(take_snapshot(Progress(1), model, optimizer, streams))
    saver.close()
    assert newest_checkpoint(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step-000000001"


def test_a_newest_one_that_is_missing_is_named(state, tmp_path, capsys):
    data, model, optimizer, streams, recipe = state
    for step in (1, 2):
        taken = take_snapshot(Progress(step), model, optimizer, streams)
        write_checkpoint(tmp_path / "checkpoints", taken, recipe, DataFolder(data))
    shutil.rmtree(tmp_path / "checkpoints" / "step-000000002")
    found = newest_checkpoint(tmp_path / "checkpoints")
    assert found is not None
    assert found.name == "step-000000001"
    assert "'step-000000002', is missing" in capsys.readouterr().err


def test_a_damaged_newest_checkpoint_costs_a_warning_and_its_steps(tmp_path, capsys):
    """Truncated, with one bit turned, or gone: training goes on from the one before, to the same end."""
    data = small_data(tmp_path / "data")
    flags = [f"--data.folder={data}", "--model.dropout=0.3", "--checkpoint.every_steps=4", "--schedule.name=constant"]
    train_here(*flags, "--training.steps=12", f"--run_folder={tmp_path / 'whole'}")
    train_here(*flags, "--training.steps=8", f"--run_folder={tmp_path / 'begun'}")
    for damage in ("truncated", "bit", "gone"):
        run = tmp_path / damage
        shutil.copytree(tmp_path / "begun", run)
        newest = run / "checkpoints" / "step-000000008"
        weights = newest / "training.safetensors"
        if damage == "truncated":
            os.truncate(weights, weights.stat().st_size // 2)
        elif damage == "bit":
            content = bytearray(weights.read_bytes())
            content[len(content) // 2] ^= 4
            weights.write_bytes(content)
        else:
            shutil.rmtree(newest)
        capsys.readouterr()
        train_here(*flags, "--training.steps=12", f"--run_folder={run}", "--resume=auto")
        shown = capsys.readouterr().err
        assert "warning: " in shown
        assert "resuming after step 4" in shown
        assert losses(run) == losses(tmp_path / "whole")


def can_mount() -> bool:
    inside = ["unshare", "--mount", "sh", "-c", "mount -t tmpfs none /mnt"]
    return shutil.which("unshare") is not None and subprocess.run(inside, capture_output=True).returncode == 0


@contextlib.contextmanager
def disk(place: Path, size: str) -> Iterator[int]:
    """Mount a disk of a size in a namespace of its own, and yield the process that is there."""
    place.mkdir()
    script = f"mount -t tmpfs -o size={size} none {place} && echo mounted && exec cat"
    command = ["unshare", "--mount", "sh", "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as there:
        assert there.stdout
        assert there.stdout.readline() == "mounted\n"
        yield there.pid


def run_beside(process: int, *command: str | Path) -> None:
    """Run a command that sees the file systems of a process."""
    subprocess.run(["nsenter", f"--target={process}", "--mount", *command], check=True)


needs_disk = pytest.mark.skipif(not can_mount(), reason="no right to mount a small disk")


@pytest.mark.slow
@needs_disk
def test_a_full_disk_costs_warnings_and_the_last_checkpoint_and_nothing_before(tmp_path):
    """A disk of its own for the run, full after a few checkpoints; then a larger one, to the same end."""
    data = write_data_folder(tmp_path / "data", {"train": chain(4510, 30), "valid": chain(103, 30, seed=1)}, 30)
    flags = [
        *SMALL,
        f"--data.folder={data}",
        "--checkpoint.every_steps=4",
        "--training.steps=60",
        "--training.validate_every=20",
    ]
    train_here(*flags, f"--run_folder={tmp_path / 'whole'}")
    place, kept = tmp_path / "disk", tmp_path / "kept"
    with disk(place, "420k") as there:
        full = train(1, *flags, "--run_folder=disk/run", cwd=tmp_path, code=75, beside=there)
        run_beside(there, "mount", "-o", "remount,size=4m", place)
        more = train(1, *flags, "--run_folder=disk/run", "--resume=auto", cwd=tmp_path, beside=there)
        run_beside(there, "cp", "-r", place / "run", kept)
    assert "could not be written" in full.stderr
    assert "Traceback" not in full.stderr + more.stderr
    assert losses(kept) == losses(tmp_path / "whole")
    assert len({row["step"] for row in rows(kept)}) == 60
    for name in ("model.safetensors", "training.safetensors"):
        one, two = (run / "checkpoints" / "step-000000060" / name for run in (kept, tmp_path / "whole"))
        assert one.read_bytes() == two.read_bytes()


@needs_disk
def test_a_disk_that_is_full_from_the_start_is_a_stop(tmp_path):
    small_data(tmp_path / "data")
    with disk(tmp_path / "disk", "4k") as there:
        run_beside(there, "dd", "if=/dev/zero", f"of={tmp_path / 'disk' / 'filler'}", "bs=4096", "count=1", "status=none")
        flags = ["--data.folder=data", "--run_folder=disk/run", "--training.steps=1"]
        done = train(1, *SMALL, *flags, cwd=tmp_path, code=75, beside=there)
    assert "No space left on device: make room" in done.stderr


@pytest.mark.slow
@needs_disk
def test_a_full_disk_while_preparing_leaves_no_half_folder(tmp_path):
    words = " ".join(f"word{number % 5000}" for number in range(60_000))
    (tmp_path / "text.txt").write_text("\n\n".join([words] * 20))
    (tmp_path / "disk").mkdir()
    prepare = f"{sys.executable} -m lmdist.text.prepare text.txt -o disk/data --tokenizer wordpunct --min-count 1"
    script = f"mount -t tmpfs -o size=1m none disk; {prepare}; echo code $?; ls -A disk"
    done = subprocess.run(["unshare", "--mount", "sh", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split()[-2:] == ["code", "65"], done.stdout + done.stderr
    assert "No space left on device" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr

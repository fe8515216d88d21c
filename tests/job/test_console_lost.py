"""A training job goes on without its console, and what ends a console is a stop: real pipes, terminals and full disks."""

from __future__ import annotations

import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmdist.stop_signals import STOP_SIGNALS
from lmdist.training.checkpoints.read import open_checkpoint
from support.jobs import SMALL, environment, fingerprint, losses, rows, small_data, start, train, wait_for_steps

JOB = [sys.executable, "-m", "lmdist.job.launcher", "--nproc-per-node=1", "--data.folder=data", "--run_folder=run", *SMALL]
SHORT = ["--training.steps=30", "--checkpoint.every_steps=10"]
LONG = ["--training.steps=100000", "--training.validate_every=100000"]
ENDLESS_SAMPLE = ["--training.steps=3", "--sample.final_words=1000000"]


def shell(command: str, cwd: Path) -> int:
    """Return the exit code of the first program that fails in a pipeline."""
    return subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], cwd=cwd, env=environment(), timeout=300).returncode


def check_is_whole(run: Path) -> None:
    """Check that a run of 30 steps is done, and that nothing was written into its files for the console."""
    assert len(losses(run)) == 30
    newest, _ = fingerprint(run)
    assert newest == "step-000000030"
    open_checkpoint(run / "checkpoints" / newest)


@pytest.mark.slow
@pytest.mark.parametrize("console", ["2>&1 | head -1", ">&- 2>&- <&-", ">/dev/full 2>&1"])
def test_a_job_needs_no_console(tmp_path, console):
    small_data(tmp_path / "data")
    assert shell(f"{shlex.join([*JOB, *SHORT])} {console}", tmp_path) == 0
    check_is_whole(tmp_path / "run")


def test_a_rank_whose_log_is_on_a_full_disk_trains_to_the_end(tmp_path):
    small_data(tmp_path / "data")
    flags = ["--data.folder=data", "--run_folder=run", *SMALL, *SHORT]
    (rank,) = start(1, *flags, cwd=tmp_path, outputs=[Path("/dev/full")] * 2)
    rank.join()
    assert rank.exitcode == 0
    check_is_whole(tmp_path / "run")


@pytest.mark.slow
def test_a_terminal_that_is_closed_stops_the_job_with_its_last_step_saved(tmp_path):
    small_data(tmp_path / "data")
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(tmp_path)
        os.execvpe(JOB[0], [*JOB, *LONG], environment())
    wait_for_steps(tmp_path / "run", 5)
    os.close(terminal)  # the kernel sends SIGHUP to the launcher, and every write of the ranks fails with EIO
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 75
    assert fingerprint(tmp_path / "run")[0] == f"step-{rows(tmp_path / 'run')[-1]['step']:09d}"


@pytest.mark.slow
def test_nohup_outlives_its_terminal_and_ctrl_c_after_tee_is_gone_saves(tmp_path):
    small_data(tmp_path / "data")
    reading, writing = os.pipe()
    job = subprocess.Popen(["nohup", *JOB, *LONG], cwd=tmp_path, env=environment(), stdout=writing, stderr=writing)
    os.close(writing)
    wait_for_steps(tmp_path / "run", 5)
    os.close(reading)  # as tee does at Ctrl-C, which reaches it as well
    job.send_signal(signal.SIGHUP)
    wait_for_steps(tmp_path / "run", len(rows(tmp_path / "run")) + 5)
    job.send_signal(signal.SIGINT)
    assert job.wait(timeout=120) == 75
    assert fingerprint(tmp_path / "run")[0] == f"step-{rows(tmp_path / 'run')[-1]['step']:09d}"


@pytest.mark.slow
def test_slurms_signal_stops_the_last_sample_and_the_next_start_takes_it_anew(tmp_path):
    """SIGUSR1, which `sbatch --signal` sends, in a sample without end: all is saved, and nothing is marked as finished."""
    small_data(tmp_path / "data")
    job = subprocess.Popen([*JOB, *ENDLESS_SAMPLE], cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not (tmp_path / "run/checkpoints/newest").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    time.sleep(0.5)
    job.send_signal(signal.SIGUSR1)
    _, stderr = job.communicate(timeout=60)
    assert job.returncode == 75, stderr
    assert "in the last sample" in stderr
    assert not (tmp_path / "run/finished.toml").exists()
    places = ["--data.folder=data", "--run_folder=run"]
    train(1, *SMALL, *places, "--training.steps=3", "--sample.final_words=20", "--resume=auto", cwd=tmp_path)
    assert (tmp_path / "run/sample.txt").read_text().split()
    assert (tmp_path / "run/finished.toml").exists()


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGHUP])
def test_a_stop_before_the_launcher_listens_is_held_back(tmp_path, stop):
    """As process 1 of a container, to which an unhandled signal does not arrive: it is blocked before the imports."""
    script = f"from lmdist.job import main; import sys; sys.argv = {['lmdist-train', *JOB[3:]]!r}; main()"
    job = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # whatever these tests were started by
    )
    status = Path(f"/proc/{job.pid}/status")
    while not (blocked := int(re.findall(r"SigBlk:\s*(\w+)", status.read_text())[0], 16)):
        time.sleep(0.0005)
    assert {number for number in signal.Signals if blocked >> (number - 1) & 1} == {signal.SIGINT, *STOP_SIGNALS}
    job.send_signal(stop)
    _, stderr = job.communicate(timeout=60)
    assert (job.returncode, stderr) == (75, "lmdist-train: stopped on request before the first step: run it again\n")

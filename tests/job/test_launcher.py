"""lmdist-train as an operator uses it: real torchrun, real signals, real kills."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest

from corpora import chain, write_data_folder
from lmdist.config import load
from lmdist.errors import DataError, Stopped, UsageError
from lmdist.job import agent, launcher
from lmdist.job.agent import exit_code
from lmdist.signals import FIRST_FAILURE, StopRequest
from lmdist.storage.checksums import BLOCK_BYTES
from lmdist.tracking.run_folder import check_run_folder, is_finished
from lmdist.train import reported_once
from support.jobs import SMALL, environment, fingerprint, losses, rows, small_data, train, train_here, wait_for_steps

LONG = [*SMALL, "--model.dropout=0.3", "--training.epochs=25", "--checkpoint.every_steps=5", "--training.timeout_seconds=10"]


@pytest.fixture
def data(tmp_path):
    return small_data(tmp_path / "data")


def start(tmp_path: Path, *flags: str, ranks: int = 2, **variables: str) -> subprocess.Popen[str]:
    """lmdist-train on the small data folder, writing stderr to a file beside it."""
    command = [sys.executable, "-m", "lmdist.job.launcher", f"--nproc-per-node={ranks}", "--data.folder=data", *flags]
    with (tmp_path / "stderr").open("w") as stderr:
        return subprocess.Popen(command, cwd=tmp_path, env={**environment(), **variables}, stderr=stderr, text=True)


def printed(tmp_path: Path) -> str:
    return (tmp_path / "stderr").read_text()


def descendants(job: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(job.pid).children(recursive=True)


def ranks_of(job: subprocess.Popen[str]) -> list[psutil.Process]:
    found = [process for process in descendants(job) if process.ppid() != job.pid]
    return sorted((process for process in found if rank_of(process)), key=rank_of)


def rank_of(process: psutil.Process) -> str:
    """Return the rank of a process; empty where it has none, or not any more."""
    with suppress(psutil.Error):
        return process.environ().get("RANK", "")
    return ""


@pytest.mark.slow
def test_a_killed_rank_and_two_clean_stops_give_the_result_of_an_undisturbed_run(data, tmp_path):
    flags = [*LONG, "--training.epochs=15"]
    train(2, *flags, "--data.folder=data", "--run_folder=whole", cwd=tmp_path)
    run = tmp_path / "disturbed"
    job = start(tmp_path, *flags, "--run_folder=disturbed", "--resume=auto", "--restarts=1")
    wait_for_steps(run, 15)
    ranks_of(job)[1].kill()
    wait_for_steps(run, 30)  # the launcher has restarted the ranks
    ranks_of(job)[1].send_signal(signal.SIGTERM)  # one rank alone, as on a node that is drained
    wait_for_steps(run, 45)  # a stop that the launcher did not request is a failure to it
    job.send_signal(signal.SIGINT)  # Ctrl-C is a stop like any other
    assert job.wait(timeout=60) == 75
    assert "rank 1 was killed by SIGKILL" in printed(tmp_path)
    assert printed(tmp_path).count("restarting from step-") == 2
    assert f"stopped on request after step {rows(run)[-1]['step']}" in printed(tmp_path)
    assert fingerprint(run)[0] == f"step-{rows(run)[-1]['step']:09d}", "the last step is saved"

    train(2, *flags, "--data.folder=data", f"--run_folder={run}", "--resume=auto", cwd=tmp_path)
    assert losses(run) == losses(tmp_path / "whole")
    assert losses(run, "valid/loss") == losses(tmp_path / "whole", "valid/loss")
    assert fingerprint(run) == fingerprint(tmp_path / "whole")


@pytest.mark.slow
def test_a_launcher_that_is_killed_leaves_no_orphan_and_one_that_gives_up_exits_with_75(data, tmp_path):
    job = start(tmp_path, *LONG, "--run_folder=run", ranks=1)
    wait_for_steps(tmp_path / "run", 5)
    processes = descendants(job)
    assert len(processes) >= 2
    job.kill()
    job.wait()
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive

    job = start(tmp_path, *LONG, "--run_folder=run", "--resume=auto", ranks=1)
    wait_for_steps(tmp_path / "run", len(rows(tmp_path / "run")) + 5)
    ranks_of(job)[0].kill()
    assert job.wait(timeout=60) == 75
    assert "rank 0 was killed by SIGKILL" in printed(tmp_path)
    assert "Traceback" not in printed(tmp_path)


MISTAKES = {
    "a flag of nobody's": (["--nproc=2", "--model.nhid=3"], 64, "nhid"),
    "ranks that do not divide": (["--data.global_batch=9"], 64, "a number of ranks out of [1, 3, 9]"),
    "a machine in words": (["--node-rank=first"], 64, "invalid int value: 'first'"),
    "a block that rank 1 alone reads": (
        ["--nproc-per-node=2", "--data.folder=damaged"],
        65,
        "train.bin is damaged in its block 3 of 3",
    ),
    "more than any memory": (["--nproc-per-node=2", "--model.hidden_size=1000000"], 64, "this machine's memory is full"),
    "no such data": (["--nproc-per-node=1", "--data.folder=nowhere"], 66, "nowhere does not exist"),
    "a file for a folder": (["--run_folder=data/vocab.txt"], 64, "data/vocab.txt is not a folder"),
    "a folder for a file": (["--run_folder=odd"], 64, "odd/checkpoints/newest is no file"),
    "restarts in words": (["--restarts=many"], 64, "invalid int value: 'many'"),
    "restarts without end": (["--restarts=-1"], 64, "--restarts is -1; it must be from 0 to 1,000,000,000,000"),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_reported_once_and_its_exit_code_is_returned(data, tmp_path, mistake):
    flags, code, message = MISTAKES[mistake]
    (tmp_path / "odd/checkpoints/newest").mkdir(parents=True)
    if "--data.folder=damaged" in flags:
        damaged = write_data_folder(tmp_path / "damaged", {"train": chain(5 * BLOCK_BYTES // 4, 30)}, 30) / "train.bin"
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"\1")
    job = start(tmp_path, *SMALL, "--restarts=3", *flags)
    assert job.wait(timeout=60) == code
    assert printed(tmp_path).count(message) == 1
    assert "Traceback" not in printed(tmp_path)
    assert "restarting from" not in printed(tmp_path), "another attempt would only repeat it"


def handles(job: subprocess.Popen[str], number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal; Python sets one up only when it runs."""
    caught = next(line for line in Path(f"/proc/{job.pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) & 1 << number - 1)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["the launcher has started", "the agent imports torch", "a rank has started"])
def test_a_stop_before_the_first_step_is_a_stop(data, tmp_path, moment):
    job = start(tmp_path, *LONG, "--run_folder=run")
    while not handles(job, signal.SIGTERM):
        time.sleep(0.01)
    if moment == "a rank has started":  # and handles no signal yet
        while not ranks_of(job):
            time.sleep(0.01)
    else:
        time.sleep({"the launcher has started": 0.1, "the agent imports torch": 0.7}[moment])
    processes = descendants(job)
    job.terminate()
    assert job.wait(timeout=60) == 75
    assert not psutil.wait_procs(processes, timeout=60)[1]
    assert "stop" in printed(tmp_path)
    assert "Traceback" not in printed(tmp_path)


def can_unshare() -> bool:
    command = ["unshare", "--pid", "--net", "--fork", "--mount-proc", "true"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not can_unshare(), reason="no right to make a PID namespace")
def test_as_process_1_it_handles_a_stop(data, tmp_path):
    flags = ["--nproc-per-node=1", "--data.folder=data", *LONG, "--run_folder=run"]
    inside = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, "-m", "lmdist.job.launcher", *flags]
    with (tmp_path / "stderr").open("w") as stderr:
        container = subprocess.Popen(inside, cwd=tmp_path, env=environment(), stderr=stderr)
    wait_for_steps(tmp_path / "run", 5)
    (first,) = psutil.Process(container.pid).children()
    first.terminate()
    assert container.wait(timeout=60) == 75
    assert "stopped on request after step" in printed(tmp_path)


@pytest.mark.slow
def test_torchruns_variables_join_two_nodes_in_one_job(data, tmp_path):
    """One launcher with flags, the other with the variables that Kubeflow's trainer sets."""
    flags = [*SMALL, "--model.dropout=0", "--training.steps=6"]
    port = str(29600 + os.getpid() % 1000)
    first = start(
        tmp_path,
        *flags,
        "--run_folder=two",
        "--nnodes=2",
        "--node-rank=0",
        "--master-addr=127.0.0.1",
        f"--master-port={port}",
        ranks=1,
    )
    names = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": port}
    second = subprocess.Popen(
        [sys.executable, "-m", "lmdist.job.launcher", "--data.folder=data", "--run_folder=two", *flags],
        cwd=tmp_path,
        env={**environment(), **names, "PET_NPROC_PER_NODE": "1", "PET_MAX_RESTARTS": "5"},
    )
    assert first.wait(timeout=120) == 0
    assert second.wait(timeout=60) == 0
    assert "on 2 ranks" in printed(tmp_path)
    train_here(*flags, f"--data.folder={data}", f"--run_folder={tmp_path / 'one'}")
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=0, atol=1e-5)


def test_help_shows_the_launchers_options_and_the_recipes(tmp_path):
    done = subprocess.run([sys.executable, "-m", "lmdist.job.launcher", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    shown = " ".join(done.stdout.split())
    assert "--restarts" in shown
    assert "Size of an LSTM layer's state" in shown


def test_a_second_stop_does_not_change_the_exit_code():
    """As when Slurm or Kubernetes signals one launcher twice: Python removes its handlers before it exits."""
    script = """if True:
        import os
        from lmdist.job import launcher
        class Late:
            def __init__(self): self.kill, self.process = os.kill, os.getpid()
            def __del__(self): self.kill(self.process, 15)
        late = Late()
        launcher.run_attempts = lambda *_: 75
        launcher.main([])
    """
    assert subprocess.run([sys.executable, "-c", script]).returncode == 75


@pytest.mark.parametrize(
    ("arguments", "variables", "code"),
    [
        ([], {}, 64),
        (["--nnodes=2", "--node-rank=0"], {}, 64),
        (["--nnodes=2", "--node-rank=1"], {}, 0),
        ([], {"PET_NNODES": "2", "PET_NODE_RANK": "1"}, 0),
    ],
)
def test_only_machine_0_must_be_able_to_write_the_run(arguments: list[str], variables: dict[str, str], code: int) -> None:
    script = """if True:
        import sys
        from lmdist.job import launcher
        launcher.run_attempts = lambda *_: 0
        launcher.main([*sys.argv[1:], "--run_folder=/dev/null/run"])
    """
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=environment() | variables, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    assert ("--run_folder: /dev/null is not a folder" in done.stderr) == (code == 64)


def test_links_are_refused_on_every_machine(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    check_run_folder(tmp_path / "run", writes=False)
    (tmp_path / "run" / "metrics.jsonl").symlink_to(tmp_path / "victim")
    with pytest.raises(DataError, match="is a link"):
        check_run_folder(tmp_path / "run", writes=False)


def test_a_machine_that_restarts_after_the_end_of_the_run_waits_for_no_peer(data, tmp_path, monkeypatch):
    """As when one of two machines is lost after the other has exited: there is no peer, and nothing to do."""
    monkeypatch.chdir(tmp_path)
    train_here("--data.folder=data", "--training.steps=3", "--training.precision=auto")
    machine_1 = ["--nnodes=2", "--node-rank=1", "--master-addr=127.0.0.1", "--master-port=1"]
    again = [*SMALL, "--training.steps=3", "--training.precision=auto", "--resume=auto"]
    assert start(tmp_path, *machine_1, *again).wait(timeout=60) == 0
    assert printed(tmp_path) == "lmdist-train: runs/demo is finished already\n"
    other = load(["--data.folder=data", "--training.steps=4", "--resume=auto", *SMALL])
    assert not is_finished(other), "more steps are to be done"


def test_an_agent_that_outlives_its_ranks_is_killed(monkeypatch, capsys):
    monkeypatch.setattr(launcher, "AGENT_GRACE_SECONDS", 0.3)
    monkeypatch.setattr(launcher, "LIST_SECONDS", 0.1)  # or its child may start and exit between two listings
    script = "import subprocess, time; subprocess.run(['sleep', '0.5']); time.sleep(600)"
    torchrun = subprocess.Popen([sys.executable, "-c", script])
    assert launcher.wait_for(torchrun, StopRequest()) == 75
    assert torchrun.returncode == -signal.SIGKILL
    assert "torchrun outlives its ranks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nproc_per_node=gpus"], "nproc_per_node is gpus"),
        (["--nproc_per_node=0"], "nproc_per_node is 0, and must be from 1 to 100,000"),
        (["--nnodes=two"], "nnodes is two"),
        (["--nnodes=2", "--node_rank=2"], "node_rank is 2, and of 2 machines it must be at most 1"),
    ],
)
def test_an_argument_that_torchrun_rejects_is_the_users_mistake(arguments, message):
    with pytest.raises(UsageError, match=message):
        agent.read_arguments([*arguments, "-m", "lmdist.train"])


def test_a_machine_that_waits_for_machine_0_reports_it_once(monkeypatch, capsys):
    monkeypatch.setattr(agent, "REPORT_AFTER_SECONDS", 0.2)
    monkeypatch.setattr(agent, "JOIN_TIMEOUT_SECONDS", 1.0)
    with pytest.raises(TimeoutError, match="does not answer"):
        agent.connect("127.0.0.1", 1)
    assert capsys.readouterr().err.count("waiting for machine 0 at 127.0.0.1:1") == 1


@pytest.mark.slow
def test_machine_0_that_waits_for_others_says_so_again_and_again(data, tmp_path):
    """A real torchrun alone in a job of two machines."""
    waiting = "agent.REPORT_AFTER_SECONDS = agent.REPORT_AGAIN_SECONDS = 0.3"
    flags = [
        "--nnodes=2",
        "--node-rank=0",
        "--master-addr=127.0.0.1",
        f"--master-port={29600 + os.getpid() % 1000}",
        "-m",
        "lmdist.train",
    ]
    code = f"import sys; from lmdist.job import agent; {waiting}; sys.argv[1:] = {flags!r}; agent.main()"
    first = subprocess.Popen([sys.executable, "-c", code], env=environment(), stderr=subprocess.PIPE, text=True)
    assert first.stderr is not None
    lines = [first.stderr.readline() for _ in range(2)]
    first.kill()
    first.communicate()
    assert lines == ["lmdist-train: waiting until all 2 machines have joined\n"] * 2


@pytest.mark.skipif(not can_unshare(), reason="no right to make a network namespace")
def test_a_machine_that_does_not_reach_itself_is_told_at_once(data, tmp_path):
    """A container without its loopback interface: gloo and torchrun's store would try for minutes."""
    alone = ["unshare", "--net", sys.executable, "-m", "lmdist.job.launcher", "--data.folder=data", *SMALL]
    done = subprocess.run(alone, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr.count("\n")) == (64, 1)
    assert "does not reach itself at 127.0.0.1" in done.stderr


def test_the_first_rank_that_fails_says_why_and_its_code_is_the_jobs(tmp_path, monkeypatch):
    """What the other ranks do afterwards is no sign of the cause: torchrun stops them, or they lose their peer."""
    monkeypatch.setenv(FIRST_FAILURE, str(tmp_path / "first_failure"))
    assert agent.first_failure() == 0
    with pytest.raises(SystemExit) as stopped, reported_once(is_main=False):
        raise Stopped("another rank was lost")
    assert (stopped.value.code, agent.first_failure()) == (75, 0)
    with pytest.raises(UsageError, match="memory"), reported_once(is_main=False):  # which is printed, though it is not rank 0
        raise UsageError("the memory is full")
    with pytest.raises(SystemExit) as second, reported_once(is_main=True):  # and is not printed again
        raise DataError("no such file")
    assert (second.value.code, agent.first_failure()) == (65, 64)


def test_a_signal_without_a_name_has_its_number():
    assert [agent.signal_name(number) for number in (signal.SIGKILL, 35)] == ["SIGKILL", "signal 35"]


def test_a_defect_on_one_rank_is_not_run_again_for_ever(tmp_path, monkeypatch):
    monkeypatch.setenv(FIRST_FAILURE, str(tmp_path / "first_failure"))
    with pytest.raises(ZeroDivisionError), reported_once(is_main=False):
        _ = 1 / 0
    assert agent.first_failure() == 1


def test_the_default_number_of_ranks_divides_the_batch(monkeypatch):
    monkeypatch.setattr(launcher, "num_gpus", lambda: 8)
    assert launcher.default_ranks(load(["--data.global_batch=20"]), "1") == 5
    assert launcher.default_ranks(load(["--data.global_batch=20"]), "2") == 5
    assert launcher.default_ranks(load(["--data.global_batch=20", "--training.accumulation=4"]), "1") == 5
    monkeypatch.setattr(launcher, "available_cpus", lambda: 64)
    assert launcher.default_ranks(load(["--data.global_batch=20", "--training.device=cpu"]), "1") == 4


def test_a_users_mistake_precedes_a_killed_rank_and_that_its_peers():
    assert exit_code([75, 65]) == 65
    assert exit_code([-9, 1, 75]) == 75
    assert exit_code([1, 75]) == 1
    assert exit_code([75]) == 75

"""launch/slurm.sbatch under a real Slurm on two hosts of this machine, and its decisions under a mock as well."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from lmdist.storage.reading import read_json
from support.hosts import Host, hosts, needs_hosts
from support.jobs import SMALL, fingerprint, installed, losses, rows, small_data, wait_for_steps

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "slurm.sbatch"
LONG = [*SMALL, "--model.dropout=0.3", "--schedule.name=constant", "--training.epochs=20", "--nproc-per-node=1"]

# --- a real Slurm --------------------------------------------------------------------------------------------------

CONFIGURATION = """
ClusterName=lmdist
SlurmctldHost=node-0
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5  # a requeued job waits for so long
SlurmUser=root
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1
# Timeouts are generous: the machine may be busy.
MessageTimeout=60
TCPTimeout=30
BatchStartTimeout=120
KillWait=120
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
NodeName=node-[0-1] CPUs=1 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES State=UP
"""


@dataclass
class Slurm:
    """A cluster of two machines."""

    login: Host
    configuration: Path

    def run(self, *command: str | Path) -> str:
        """Run one of Slurm's commands, and return its output."""
        environment = {**installed(), "SLURM_CONF": str(self.configuration)}
        done = subprocess.run(self.login.command(*command), cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def submit(self, folder: Path, *flags: str) -> str:
        """Submit a job of two nodes without GPUs, and return its id."""
        options = ["--nodes=2", "--gpus-per-node=0", "--cpus-per-task=1", f"--output={folder}/log", "--parsable"]
        return self.run("sbatch", *options, SCRIPT, f"--data.folder={folder}/data", f"--run_folder={folder}/run", *flags)

    def facts(self, job: str) -> dict[str, str]:
        """Return the fields of a job."""
        facts = self.run("scontrol", "show", "job", job, "--oneliner")
        return {name: value for name, _, value in (fact.partition("=") for fact in facts.split())}

    def end(self, job: str) -> tuple[str, str, str]:
        """Wait for a job, and return its state, its exit code, and how often it was requeued."""
        until = time.monotonic() + 300
        while True:
            facts = self.facts(job)
            if facts["JobState"] not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
                return facts["JobState"], facts["ExitCode"], facts["Restarts"]
            assert time.monotonic() < until, facts
            time.sleep(1)


@contextmanager
def cluster() -> Iterator[Slurm]:
    """Start a cluster, whose daemons and jobs are terminated with the context."""
    with tempfile.TemporaryDirectory(prefix="lmdist-slurm-") as folder, hosts("node-0", "node-1") as machines:
        configuration = Path(folder) / "slurm.conf"
        configuration.write_text(CONFIGURATION.format(folder=folder))
        # slurmd requires a version, although these hosts have no control groups.
        (Path(folder) / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        for name in ("state", "node-0", "node-1"):
            (Path(folder) / name).mkdir()
        commands = [machines[0].command("slurmctld", "-D", "-i", "-f", configuration)]
        commands += [machine.command("slurmd", "-D", "-f", configuration) for machine in machines]
        daemons = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for command in commands]
        slurm = Slurm(machines[0], configuration)
        try:
            until = time.monotonic() + 120
            while slurm.run("sinfo", "--noheader", "--format=%T %D") != "idle 2":
                if time.monotonic() > until:
                    last = [path.read_text().splitlines()[-1:] for path in Path(folder).glob("*.log")]
                    pytest.skip(f"this Slurm does not start: {last}")
                time.sleep(0.2)
            yield slurm
        finally:
            for machine in machines:
                machine.kill_all()
            for daemon in daemons:
                daemon.wait()


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    missing = [tool for tool in ("slurmctld", "slurmd", "sbatch", "srun", "scancel", "sinfo") if not shutil.which(tool)]
    if missing:
        pytest.skip(f"no {', '.join(missing)}")
    with cluster() as slurm:
        yield slurm


@pytest.fixture
def folder(tmp_path):
    small_data(tmp_path / "data")
    return tmp_path


@pytest.mark.slow
@needs_hosts
def test_a_stopped_job_is_requeued_and_a_cancelled_one_is_not(slurm, folder, tmp_path_factory):
    """Both save on request, and the first one ends in the state that the other one, not stopped until then, passes."""
    job = slurm.submit(folder, *LONG)
    wait_for_steps(folder / "run", 20)
    slurm.run("scancel", "--signal=TERM", job)  # as --signal makes Slurm send before the time limit
    assert slurm.end(job) == ("COMPLETED", "0:0", "1"), (folder / "log").read_text()
    log = (folder / "log").read_text()
    assert "on 2 ranks" in log
    assert log.count("stopped on request after step") == log.count("the job is requeued") == 1

    cancelled = tmp_path_factory.mktemp("cancelled")
    (cancelled / "data").symlink_to(folder / "data")
    job = slurm.submit(cancelled, *LONG, "--training.epochs=4000", "--checkpoint.keep=1000")
    wait_for_steps(cancelled / "run", len(rows(folder / "run")) + 1)
    slurm.run("scancel", job)
    assert slurm.end(job) == ("CANCELLED", "0:15", "0")
    until = time.monotonic() + 120
    while fingerprint(cancelled / "run")[0] != f"step-{rows(cancelled / 'run')[-1]['step']:09d}":
        assert time.monotonic() < until
        time.sleep(0.2)
    assert "stopped on request after step" in (cancelled / "log").read_text()

    newest, files = fingerprint(folder / "run")
    assert read_json(cancelled / "run" / "checkpoints" / newest / "manifest.json")["files"] == files
    assert losses(cancelled / "run")[: len(losses(folder / "run"))] == losses(folder / "run")


@pytest.mark.slow
@needs_hosts
def test_a_wrong_recipe_fails_once(slurm, folder):
    assert slurm.end(slurm.submit(folder, "--model.nhid=3")) == ("FAILED", "64:0", "0"), (folder / "log").read_text()
    assert "--model.nhid" in (folder / "log").read_text()


# --- a mock --------------------------------------------------------------------------------------------------------

MOCKS = {
    "srun": f"""#!{sys.executable}
import os, signal, subprocess, sys, time
command = sys.argv[1:]
with open("srun-options", "w") as file:
    while command[0].startswith("--"):
        print(command.pop(0), file=file)
variables = [{{**os.environ, "SLURM_NODEID": str(node)}} for node in range(int(os.environ["SLURM_JOB_NUM_NODES"]))]
tasks = [subprocess.Popen(command, env=task, start_new_session=True) for task in variables]
asked = False
while any(task.poll() is None for task in tasks):
    if not asked and any(task.poll() for task in tasks):
        asked = True
        for task in tasks:
            if task.poll() is None:
                os.killpg(task.pid, signal.SIGTERM)  # Slurm signals every process of a task
    time.sleep(0.02)
sys.exit(max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks))
""",
    "scontrol": """#!/bin/sh
case $1 in
show) printf 'node-a\\nnode-b\\n' ;;
requeue) echo "$2" >> requeued ;;
esac
""",
    "lmdist-train": """#!/bin/sh
trap 'exit 75' TERM
echo "$@" "$PET_MASTER_PORT" "$SRUN_CPUS_PER_TASK" >> "started-$4"
until [ -e started-0 ] && [ -e started-1 ]; do sleep 0.02; done
eval "end=\\$END_$4"
[ "$end" != killed ] || kill -KILL $$
while [ "$end" = wait ]; do sleep 0.05; done
exit "$end"
""",
}
DECISIONS = {
    "done": (["0", "0"], 0),
    "asked to stop": (["75", "75"], 75),
    "one gives up, the other is asked to stop": (["75", "wait"], 75),
    "the usage is wrong": (["64", "64"], 64),
    "bad data on machine 0": (["65", "wait"], 65),
    "a missing recipe on machine 1": (["wait", "66"], 66),
    "a defect on machine 1": (["wait", "1"], 1),
    "a killed launcher": (["killed", "wait"], 137),
}


@pytest.mark.parametrize("case", DECISIONS)
def test_only_75_is_requeued_and_a_mistake_takes_precedence(case, tmp_path):
    ends, code = DECISIONS[case]
    done = run_with_mocks(tmp_path, {"END_0": ends[0], "END_1": ends[1]})
    assert done.returncode == code, done.stderr
    for node in range(2):
        started = (tmp_path / f"started-{node}").read_text()
        expected = f"--nnodes 2 --node-rank {node} --master-addr node-a --restarts 20 --resume auto --config a b.toml 10042 3\n"
        assert started == expected
    requeued = tmp_path / "requeued"
    assert (requeued.read_text() if requeued.exists() else "") == ("20042\n" if code == 75 else "")
    assert (tmp_path / "srun-options").read_text() == "--kill-on-bad-exit=1\n"


def test_a_container_runs_in_the_folder_of_the_job(tmp_path):
    """By pyxis, whose options srun has where it is installed."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    image = {"LMDIST_IMAGE": "registry.example.com#lmdist-train:0.1.0", "LMDIST_MOUNTS": "/data:/data:ro"}
    done = run_with_mocks(folder, {"END_0": "0", "END_1": "0", **image})
    assert done.returncode == 0, done.stderr
    assert (folder / "srun-options").read_text().splitlines() == [
        "--kill-on-bad-exit=1",
        "--container-image=registry.example.com#lmdist-train:0.1.0",
        f"--container-mounts={folder}:{folder},/data:/data:ro",
        f"--container-workdir={folder}",
        "--no-container-entrypoint",
    ]


def run_with_mocks(folder: Path, more: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the script in a folder, on two machines that a mock of Slurm has."""
    for name, script in MOCKS.items():
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    (folder / "launch").symlink_to(ROOT / "launch")
    variables = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "20042",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "3",
        **more,
    }
    command = ["bash", SCRIPT, "--config", "a b.toml"]
    return subprocess.run(command, cwd=folder, env={**os.environ, **variables}, capture_output=True, text=True, timeout=60)


def test_the_first_job_takes_one_gpu_of_one_machine():
    options = [line.split()[1] for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH ")]
    assert {"--nodes=1", "--gpus-per-node=1"} <= set(options)
    advised = {line.split()[1].partition("=")[0] for line in SCRIPT.read_text().splitlines() if line.startswith("##SBATCH ")}
    assert {"--account", "--partition"} <= advised


def test_a_job_from_another_folder_is_an_error(tmp_path):
    done = subprocess.run(["bash", SCRIPT], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 66
    assert f"there is no launch/node.sh in {tmp_path}" in done.stderr

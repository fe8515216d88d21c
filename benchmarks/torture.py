"""A job that is killed again and again ends as an undisturbed one: the same sha256 of the parameters, or this fails.

    python benchmarks/torture.py                                    # 3 kills on one host
    python benchmarks/torture.py --kills 20 --seed 7 --json benchmarks/results/torture-MACHINE-DATE.json
    sudo python benchmarks/torture.py --hosts 2 --kills 10          # two hosts: network namespaces on this machine

Kinds of kills, sampled at random, each at a random step:

    rank       SIGKILL to a random rank
    launcher   SIGKILL to a random launcher, whose ranks must exit within 5 seconds
    stop       SIGTERM to a random launcher: a clean stop
    freeze     SIGSTOP to a random rank: its peers must notice it
    host       SIGKILL to everything on a random host at once, the rendezvous host as likely as the other
    partition  no packet passes between the hosts for 25 seconds

Like a Job controller, this script restarts a launcher that exits with another code than 0; it does nothing else. Recovery is
the time from the kill to the first step that is done after it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from namespaces import Host, hosts
from origin import Row, add_json_option, collect_rows, command_line, processor

STEPS = 400
JOB = (
    "--model.embedding_size=64 --model.hidden_size=128 --model.dropout=0.3 --data.global_batch=8 --data.window=20 "
    "--training.device=cpu --training.log_every=1 --training.validate_every=90 --training.timeout_seconds=10 "
    "--checkpoint.every_steps=20 --sample.words=0 --tracking.mlflow=false --resume=auto"
).split()
ONE_HOST = ("rank", "launcher", "stop", "freeze")
HOSTS = ("host-0", "host-1")
TWO_HOSTS = ("rank", "launcher", "stop", "host", "partition")
PARTITION = 25.0


def main() -> None:
    """Run the job undisturbed and tortured, compare, print a table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--kinds", help="kinds to sample from, separated by commas (default: all that the hosts allow)")
    parser.add_argument("--hosts", type=int, choices=(1, 2), default=1, help="2 needs root, iproute2 and util-linux")
    parser.add_argument("--ranks", type=int, default=2, help="ranks on each host (default: 2)")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="2 kills in 120 steps")
    add_json_option(parser)
    arguments = parser.parse_args()
    command = command_line(parser, arguments)
    if arguments.quick:
        arguments.kills, arguments.steps = 2, 120
    kinds = arguments.kinds.split(",") if arguments.kinds else list(TWO_HOSTS if arguments.hosts == 2 else ONE_HOST)

    with (
        collect_rows(arguments.json, ("lmdist", "torch"), command) as rows,
        tempfile.TemporaryDirectory(prefix="torture-") as scratch,
        machines(arguments.hosts) as available,
    ):
        prepare(Path(scratch))
        flags = [*JOB, "--data.folder=data", f"--training.steps={arguments.steps}"]
        quiet = Job(Path(scratch), "quiet", available, arguments.ranks, flags)
        quiet.run(kills=[])
        expected = quiet.fingerprint()
        print(f"undisturbed: {arguments.steps} steps, parameters {expected[:16]}")
        generator = random.Random(arguments.seed)
        steps = sorted(generator.sample(range(5, arguments.steps - 15), arguments.kills))
        # Every kind comes once before one comes twice.
        sampled = [kind for _ in range(arguments.kills) for kind in generator.sample(kinds, len(kinds))][: arguments.kills]
        tortured = Job(Path(scratch), "tortured", available, arguments.ranks, flags, generator)
        try:
            tortured.run(kills=list(zip(steps, sampled, strict=True)))
        finally:
            rows += kill_rows(tortured, arguments)
        same = tortured.fingerprint() == expected and tortured.losses() == quiet.losses()
        rows.append(summary_row(tortured, arguments, same))
    for row in rows:
        print(f"{row['case']:<22}{row['variant']:<10}{row['value']:>6} {row['unit']:<8} {row['note']}")
    if not same:
        sys.exit("the tortured job did not end as the undisturbed one")


def beside(arguments: argparse.Namespace) -> Row:
    """Return what all rows have."""
    machine = f"{os.cpu_count()} cores, {processor()}, {arguments.hosts} host(s) x {arguments.ranks} ranks"
    return {"ratio": None, "spread": None, "machine": machine}


def kill_rows(job: Job, arguments: argparse.Namespace) -> list[Row]:
    """Return a row for each kill."""
    return [
        {"case": f"kill at step {step}", "variant": kind, "value": round(seconds, 1), "unit": "s", "note": note}
        | beside(arguments)
        for step, kind, seconds, note in job.recoveries
    ]


def summary_row(job: Job, arguments: argparse.Namespace, same: bool) -> Row:
    """Return the row for all kills."""
    seconds = [seconds for _, _, seconds, _ in job.recoveries] or [0.0]
    return {
        "case": f"seed {arguments.seed}",
        "variant": "all",
        "value": len(job.recoveries),
        "unit": "kills",
        "note": f"parameters and losses {'the same' if same else 'DIFFER'}; recovery median "
        f"{statistics.median(seconds):.1f} s, longest {max(seconds):.1f} s; {job.starts} launcher starts",
        "same": same,
        **beside(arguments),
    }


def prepare(scratch: Path) -> None:
    """Prepare a data folder of a text in which every second word follows from the one before."""
    generator = random.Random(0)
    words = []
    for _ in range(40_000):
        word = min(int(generator.paretovariate(0.8)), 199)
        words += [f"w{word}", f"w{(word * 7 + 1) % 200}"]
    lines = [" ".join(words[start : start + 20]) for start in range(0, len(words), 20)]
    (scratch / "train.txt").write_text("\n".join(lines[:-100]) + "\n")
    (scratch / "valid.txt").write_text("\n".join(lines[-100:]) + "\n")
    files = ["--train", "train.txt", "--valid", "valid.txt", "--tokenizer", "whitespace", "--min-count", "1"]
    subprocess.run(
        [sys.executable, "-m", "lmdist.text.prepare", *files, "-o", "data"], cwd=scratch, check=True, capture_output=True
    )


@dataclass
class Job:
    """One run, by a launcher on each host, and the kills of it."""

    scratch: Path
    name: str
    hosts: Sequence[Host | None]
    """The hosts of the launchers; None is this machine as it is."""
    ranks: int
    flags: list[str]
    generator: random.Random = field(default_factory=random.Random)
    launchers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    recoveries: list[tuple[int, str, float, str]] = field(default_factory=list)
    starts: int = 0

    def start(self, host: int) -> subprocess.Popen[bytes]:
        """Start the launcher of a host."""
        self.starts += 1
        command = [sys.executable, "-m", "lmdist.job.launcher", f"--nproc-per-node={self.ranks}", "--restarts=20"]
        command += [*self.flags, f"--run_folder={self.name}"]
        if (on := self.hosts[host]) is not None:
            command = on.command(*command, "--nnodes=2", f"--node-rank={host}", f"--master-addr={HOSTS[0]}")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with (self.scratch / f"{self.name}-{host}.log").open("ab") as log:  # the launcher's own stays open
            return subprocess.Popen(command, cwd=self.scratch, env=environment, stdout=log, stderr=log)

    def run(self, kills: list[tuple[int, str]]) -> None:
        """Run the job to its end through all the kills."""
        self.launchers = [self.start(host) for host in range(len(self.hosts))]
        try:
            for step, kind in kills:
                self.wait_for(lambda step=step: self.last_line().get("step", 0) >= step, 300)
                at, killed = self.last_line()["step"], time.time()
                note = getattr(self, kind)()
                # A rank may be writing a line at the moment of the kill. No recovery takes less than a second.
                self.wait_for(lambda killed=killed: self.last_line().get("time", 0) > killed + 1, 300)
                self.recoveries.append((at, kind, self.last_line()["time"] - killed, note))
                print(f"step {at}: {kind}, {note}; going on after {self.recoveries[-1][2]:.1f} s", flush=True)
            self.wait_for(lambda: all(launcher.poll() == 0 for launcher in self.launchers), 600)
        finally:
            for launcher in self.launchers:
                launcher.kill()

    def wait_for(self, condition: Any, seconds: float) -> None:
        """Wait, and restart launchers that exit."""
        until = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > until:
                logs = [(self.scratch / f"{self.name}-{host}.log").read_text()[-2000:] for host in range(len(self.hosts))]
                raise TimeoutError(f"the job makes no progress for {seconds} s\n" + "\n".join(logs))
            for host, launcher in enumerate(self.launchers):
                if launcher.poll() is not None and not self.finished():
                    self.launchers[host] = self.start(host)
            time.sleep(0.05)

    def finished(self) -> bool:
        """Return whether a launcher has exited with 0: the job is done, and no launcher is restarted."""
        return any(launcher.poll() == 0 for launcher in self.launchers)

    def last_line(self) -> dict[str, Any]:
        """Return the last complete line of the run's metrics."""
        try:
            lines = (self.scratch / self.name / "metrics.jsonl").read_bytes().splitlines()
            return json.loads(lines[-1])
        except (OSError, IndexError, ValueError):
            return {}

    def losses(self) -> dict[tuple[int, str], float]:
        """Return every loss that was logged; a step that is logged twice is an error."""
        found: dict[tuple[int, str], float] = {}
        for line in (self.scratch / self.name / "metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            for key in ("train/loss", "valid/loss"):
                if key in row:
                    assert (row["step"], key) not in found, row
                    found[row["step"], key] = row[key]
        return found

    def fingerprint(self) -> str:
        """Return the sha256 of the last checkpoint's parameters and training state."""
        newest = max((self.scratch / self.name / "checkpoints").glob("step-*"))
        digest = hashlib.sha256(newest.name.encode())
        for name in ("model.safetensors", "training.safetensors"):
            digest.update((newest / name).read_bytes())
        return digest.hexdigest()

    def children(self, launcher: subprocess.Popen[bytes]) -> list[psutil.Process]:
        """Return a launcher's agent and ranks."""
        try:
            return psutil.Process(launcher.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def pick_rank(self) -> psutil.Process:
        """Return a random rank."""
        found = [
            process
            for launcher in self.launchers
            for process in self.children(launcher)
            if "lmdist.train" in process.cmdline() and "lmdist.job.agent" not in process.cmdline()
        ]
        return self.generator.choice(sorted(found, key=lambda process: process.pid))

    def rank(self) -> str:
        """Kill a rank."""
        process = self.pick_rank()
        number = process_rank(process)
        process.kill()
        return f"rank {number}"

    def freeze(self) -> str:
        """Stop a rank, as a machine that swaps does."""
        process = self.pick_rank()
        number = process_rank(process)
        process.suspend()
        return f"rank {number}"

    def launcher(self) -> str:
        """Kill a launcher; its child processes must be terminated soon."""
        host = self.generator.randrange(len(self.launchers))
        children = self.children(self.launchers[host])
        self.launchers[host].kill()
        _, alive = psutil.wait_procs(children, timeout=5)
        assert not alive, f"orphans after 5 s: {alive}"
        return f"host {host}, {len(children)} child processes terminated"

    def stop(self) -> str:
        """Request a stop, as Kubernetes and Slurm do."""
        host = self.generator.randrange(len(self.launchers))
        self.launchers[host].terminate()
        code = self.launchers[host].wait(timeout=60)
        assert code == 75, f"a clean stop ends with 75, not {code}"
        return f"host {host}"

    def host(self) -> str:
        """Kill everything on a host at once."""
        host = self.generator.randrange(len(self.launchers))
        for process in [psutil.Process(self.launchers[host].pid), *self.children(self.launchers[host])]:
            process.kill()
        return f"host {host}" + (", the rendezvous host" if host == 0 else "")

    def partition(self) -> str:
        """Cut the connection between the hosts for a while."""
        host = self.hosts[0]
        assert host is not None, "a partition takes two hosts"
        host.unplug()
        time.sleep(PARTITION)
        host.plug()
        return f"{PARTITION:.0f} s long, included"


@contextmanager
def machines(number: int) -> Iterator[Sequence[Host | None]]:
    """Yield this machine as it is, or two hosts on it."""
    if number == 1:
        yield [None]
        return
    with hosts(*HOSTS) as both:
        yield both


def process_rank(process: psutil.Process) -> str:
    """Return the number of a rank."""
    return process.environ().get("RANK", "?")


if __name__ == "__main__":
    main()

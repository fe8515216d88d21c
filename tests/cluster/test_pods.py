"""The manifests at work: their own commands run in pods on this machine, under a Job controller.

Only what needs GPUs is changed: PET_NPROC_PER_NODE is 1 instead of gpu, the device is the CPU, and flags after the manifest's
own make the model small and the training short. A short text replaces the demo corpus. The claims are folders; what else of a
cluster is missing stands in IGNORED of pods.py and cluster.py.
"""

from __future__ import annotations

import copy
import csv
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from corpora import chain
from support.cluster import Cluster, Job, RunningPod
from support.hosts import needs_pods
from support.jobs import fingerprint, loop_here, losses, rows
from support.manifests import KUBECTL, Document, documents

pytestmark = [
    pytest.mark.slow,
    needs_pods,
    pytest.mark.skipif(KUBECTL is None, reason="no kubectl to render the manifests"),
]
ON_A_CPU = ["--training.device=cpu"]
SMALL = (
    "--data.global_batch=64 --model.embedding_size=24 --model.hidden_size=32 --model.dropout=0 --schedule.name=constant "
    "--training.precision=fp32 --training.steps=60 --training.log_every=1 --checkpoint.every_steps=8 --sample.words=0"
).split()


def changed(found: Sequence[Document], *flags: str) -> list[Document]:
    """Return the objects with more flags of the Job, and one rank per pod instead of one per GPU."""
    changed_objects = copy.deepcopy(list(found))
    for document in changed_objects:
        if document["kind"] == "Job":
            (container,) = document["spec"]["template"]["spec"]["containers"]
            container["args"] += flags
            for variable in container["env"]:
                if variable["name"] == "PET_NPROC_PER_NODE" and variable["value"] == "gpu":
                    variable["value"] = "1"
    return changed_objects


def with_recipe(found: Sequence[Document], recipe: str) -> list[Document]:
    """Return the objects with another recipe in their ConfigMap."""
    changed_objects = copy.deepcopy(list(found))
    for document in changed_objects:
        if document["kind"] == "ConfigMap" and "recipe.toml" in document["data"]:
            document["data"]["recipe.toml"] = recipe
    return changed_objects


def write_text(claims: Path) -> None:
    """Write a short text in place of the demo corpus, as a pod of the overlay shell would."""
    path = claims / "lmdist-data" / "demo.csv"
    path.parent.mkdir(parents=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["title", "content"])
        writer.writerows([title, " ".join(f"w{word}" for word in chain(800, 200, seed=title))] for title in range(40))
    os.chown(path, 1000, 1000)


def step(run: Path) -> int:
    """Return the last logged step of a run."""
    try:
        return rows(run)[-1]["step"]
    except (OSError, IndexError, ValueError):
        return 0


@pytest.fixture(scope="module")
def multi_node() -> list[Document]:
    return changed(documents("multi-node"), *ON_A_CPU, *SMALL)


@dataclass
class Trained:
    """A namespace in which the Job of the overlay cpu-smoke has finished."""

    cluster: Cluster
    server: RunningPod
    """Of the overlay mlflow, started before the Job."""
    job: Job
    writable: set[str]
    """The writable places of the pods of the Job."""

    @property
    def run(self) -> Path:
        return self.cluster.claims / "lmdist-runs" / "lmdist-smoke"

    def tracked(self) -> list[tuple[str, str]]:
        """Return the runs of the server, and their status."""
        return runs(self.cluster.claims / "mlflow" / "mlflow.db")


def runs(database: Path) -> list[tuple[str, str]]:
    """Return the names of the runs in an MLflow store, and their status."""
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute("select name, status from runs").fetchall()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, empty_store) -> Iterator[Trained]:
    """The overlays mlflow and cpu-smoke in one namespace; the Job trains 60 of 200 steps."""
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        write_text(cluster.claims)
        (cluster.claims / "mlflow").mkdir()
        shutil.copy(empty_store, cluster.claims / "mlflow" / "mlflow.db")
        for overlay in ("mlflow", "serve", "cpu-export"):
            cluster.apply(documents(overlay))
        cluster.apply(changed(documents("cpu-smoke"), *SMALL))
        server = start(cluster, "mlflow", "/health")
        job = Job(cluster, "lmdist-smoke")
        result = Trained(cluster, server, job, set.union(*(pod.writable() for pod in job.active.values())))
        # At its end a job waits for the server for a few seconds only, too short to import mlflow on a busy machine: the
        # training is suspended until the server has the run.
        assert not job.run(until=lambda: step(result.run) > 0)
        ranks = [process for pod in job.active.values() for process in pod.processes() if is_rank(process)]
        assert len(ranks) == 2
        for rank in ranks:
            rank.suspend()
        cluster.wait(lambda: bool(result.tracked()), 100)
        for rank in ranks:
            rank.resume()
        job.run()
        yield result


def is_rank(process: psutil.Process) -> bool:
    """Return whether a process of a pod is a rank, not the agent or the uploader."""
    with suppress(psutil.NoSuchProcess):
        return process.cmdline()[1:4] == ["-u", "-m", "lmdist.train"]
    return False


def test_two_nodes_train_to_the_end_and_write_to_their_volumes_only(trained, tmp_path):
    job, run, claims = trained.job, trained.run, trained.cluster.claims
    assert job.condition == "Complete"
    assert [pod.exit_code for pod in job.ended] == [0, 0]
    assert {pod.host.name for pod in job.ended} == {"lmdist-smoke-0", "lmdist-smoke-1"}
    assert "on 2 ranks" in job.ended[0].printed() + job.ended[1].printed()

    assert trained.writable == {"/data", "/runs", "/tmp", "/dev/shm"}
    owners = {(path.stat().st_uid, path.stat().st_gid) for path in claims.glob("lmdist-*/**/*")}
    assert owners == {(1000, 1000)}
    assert not (run.parent / "mlflow.db").exists(), "metrics go to the server"
    assert trained.tracked() == [("lmdist-smoke", "FINISHED")]
    with closing(sqlite3.connect(claims / "mlflow" / "mlflow.db")) as database:
        (points,) = database.execute("select count(*) from metrics where key = 'train/loss'").fetchone()
    assert points == len(losses(run)) == 60

    objects = trained.cluster.objects.values()
    (recipe,) = (document["data"]["recipe.toml"] for document in objects if "recipe.toml" in document.get("data", {}))
    (tmp_path / "recipe.toml").write_text(recipe)
    places = [f"--data.folder={claims / 'lmdist-data' / 'demo'}", f"--run_folder={tmp_path / 'one'}"]
    flags = [f"--config={tmp_path / 'recipe.toml'}", *SMALL, *places, "--tracking.mlflow=false", "--training.steps=10"]
    loop_here(*flags)
    np.testing.assert_allclose(losses(run)[:10], losses(tmp_path / "one"), rtol=0, atol=1e-5)


def test_the_loss_of_a_node_and_a_drain_cost_a_few_steps(trained, multi_node, tmp_path):
    """In a namespace without a server, the result is that of the undisturbed job with a server."""
    with Cluster(tmp_path) as cluster:
        shutil.copytree(trained.cluster.claims / "lmdist-data", cluster.claims / "lmdist-data")
        cluster.apply(changed(multi_node, "--tracking.mlflow=false"))
        job = Job(cluster, "lmdist-train")
        run = cluster.claims / "lmdist-runs" / "lmdist-train"
        assert not job.run(until=lambda: step(run) >= 10)
        lost, survivor = job.active[1], job.active[0]
        job.lose(1)
        assert not job.run(until=lambda: step(run) >= 30)
        assert job.active[0] is survivor, "a pod whose peer is lost stays, and restarts its ranks"
        assert job.active[1].host.address != lost.host.address
        drained = job.active[0]
        job.drain(0)
        assert job.run() == "Complete"
        assert (lost.exit_code, drained.exit_code) == (137, 75)
        assert job.exit_codes()[0] == 2
        assert job.failures == 0, "neither counts as a failure of the Job"

        template = copy.deepcopy(job.template)
        template["spec"]["containers"][0] |= {"command": ["lmdist-sync"], "args": ["/runs/lmdist-train"]}
        pod = cluster.start(template, "lmdist-sync-x2x7z")
        cluster.wait(lambda: pod.exit_code is not None, 300)
        assert pod.exit_code == 0, pod.printed()
    assert losses(run) == losses(trained.run)
    assert fingerprint(run) == fingerprint(trained.run)
    assert {path.name for path in run.parent.iterdir()} == {"lmdist-train", "mlflow.db", "mlruns"}
    assert runs(run.parent / "mlflow.db") == [("lmdist-train", "FINISHED")], "without a server the store is a file"


def test_what_a_cluster_has_trained_is_exported_and_served(trained):
    """The overlays cpu-export and serve."""
    cluster, server = trained.cluster, trained.server
    export = Job(cluster, "lmdist-export")
    assert not export.run(until=lambda: bool(export.active[0].processes()))
    assert export.active[0].writable() == {"/runs", "/tmp", "/dev/shm"}, "data is mounted read-only"
    assert export.run() == "Complete"

    (container,) = cluster.objects["Deployment", "lmdist-serve"]["spec"]["template"]["spec"]["containers"]
    before_stop = container["lifecycle"]["preStop"]["exec"]["command"]
    assert before_stop[0] == "sleep"
    before_stop[1] = "600"  # as long as it takes here
    model = start(cluster, "lmdist-serve", "/ping")
    assert model.writable() == {"/tmp", "/dev/shm"}
    body = json.dumps({"inputs": ["w3 w5"], "params": {"max_new_tokens": 5}})
    (prediction,) = json.loads(answer(request(server, model, "/invocations", body)))["predictions"]
    assert prediction["text"].startswith("w3 w5")
    model.stop()
    assert answer(request(server, model, "/ping")), "it answers until all nodes have removed it from the Service"
    assert model.hook
    model.hook.terminate()
    cluster.wait(lambda: model.exit_code is not None, model.container.grace_seconds)
    assert model.exit_code == 0

    assert server.writable() == {"/mlflow", "/tmp", "/dev/shm"}
    server.stop()
    cluster.wait(lambda: server.exit_code is not None, server.container.grace_seconds)
    assert server.exit_code == 0


def start(cluster: Cluster, deployment: str, health: str) -> RunningPod:
    """Start a pod of a Deployment, and return it once it answers its probes."""
    pod = cluster.start(cluster.objects["Deployment", deployment]["spec"]["template"], f"{deployment}-5d4c7b8f96-x2x7z")
    assert pod.container.health == dict.fromkeys(("startupProbe", "readinessProbe", "livenessProbe"), health)
    probe = subprocess.Popen(request(pod, pod, health, patience=300), stdout=subprocess.DEVNULL)
    cluster.wait(lambda: probe.poll() is not None or pod.exit_code is not None, 330)
    assert probe.returncode == 0, pod.printed()
    return pod


def request(asker: RunningPod, pod: RunningPod, path: str, body: str = "", patience: int = 0) -> list[str]:
    """Return a command that sends a request to a pod from the host of a pod, and repeats it for `patience` seconds.

    It is one process for all attempts: starting Python for each would take the CPU from the pod.
    """
    script = """if True:
        import sys, time, urllib.error, urllib.request
        headers = {"Content-Type": "application/json"} if sys.argv[2] else {}
        request = urllib.request.Request(sys.argv[1], sys.argv[2].encode() or None, headers)
        until = time.monotonic() + int(sys.argv[3])
        while True:
            try:
                print(urllib.request.urlopen(request, timeout=120).read().decode() or "empty")
                break
            except urllib.error.URLError as error:
                if isinstance(error, urllib.error.HTTPError) or time.monotonic() > until:
                    raise
                time.sleep(0.2)
    """
    address = f"http://{pod.host.address}:{pod.container.port}{path}"
    return asker.host.command(sys.executable, "-c", script, address, body, str(patience))


def answer(request: list[str]) -> str:
    """Return the answer to a request, which has to succeed."""
    return subprocess.run(request, check=True, stdout=subprocess.PIPE, text=True).stdout


MISTAKES = {
    "no such setting": ("multi-node", "[model]\nnhid = 3\n", 64, "nhid"),
    "a table of no columns": (
        "multi-node",
        '[prepare]\ninputs = ["/data/empty.csv"]\n[data]\nfolder = "/data/made"\n',
        65,
        "empty.csv",
    ),
    "no such text": (
        "base",
        '[prepare]\ninputs = ["/data/articles*.csv"]\n[data]\nfolder = "/data/made"\n',
        66,
        "articles*.csv",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_fails_the_job_at_once_in_one_line(mistake, tmp_path):
    overlay, recipe, code, message = MISTAKES[mistake]
    with Cluster(tmp_path) as cluster:
        (cluster.claims / "lmdist-data").mkdir(parents=True)
        (cluster.claims / "lmdist-data" / "empty.csv").touch()
        cluster.apply(with_recipe(changed(documents(overlay), *ON_A_CPU, *SMALL), recipe))
        job = Job(cluster, "lmdist-train")
        assert job.run() == "Failed: PodFailurePolicy"
        failed = [pod for pod in job.ended if pod.exit_code == code]
        assert failed, job.exit_codes()
        assert set(job.exit_codes()) <= {code, 75}
        assert len(job.ended) == job.completions, "no pod is replaced"
        for pod in failed:
            assert len([line for line in pod.printed().splitlines() if ": error: " in line]) <= 1
            assert "restarting from" not in pod.printed()
            assert "Traceback" not in pod.printed()
        assert message in "".join(pod.printed() for pod in failed)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs")
def test_a_node_without_the_gpus_that_were_promised_fails_the_job(tmp_path):
    with Cluster(tmp_path) as cluster:
        cluster.apply(documents("base"))
        job = Job(cluster, "lmdist-train")
        assert job.run() == "Failed: PodFailurePolicy"
        first = job.ended[0]
        assert first.exit_code == 64
        (line,) = first.printed().splitlines()
        assert "nproc_per_node is gpu (Cuda is not available.)" in line


def test_a_pod_killed_for_its_memory_counts_as_a_failure(multi_node, tmp_path):
    with Cluster(tmp_path) as cluster:
        cluster.apply(multi_node)
        job = Job(cluster, "lmdist-train")
        assert not job.run(until=lambda: len(job.active[0].processes()) > 1)  # its launcher handles signals from here on
        for failures in range(1, job.backoff_limit + 2):
            job.kill(1)
            job.run(until=lambda failures=failures: job.failures == failures)
        assert job.run() == "Failed: BackoffLimitExceeded"
        assert job.exit_codes() == {137: 4, 75: 1}, "the other pod is stopped with the Job"

"""The manifests do what they say: their own commands run in pods on this machine, under a Job controller.

What no machine without GPUs can do is changed, and nothing else: PET_NPROC_PER_NODE is 1 in place of gpu, the device is the
CPU, and flags after the manifest's own make the model small and the training short. The claims are folders; whatever else of
a cluster is not here stands in IGNORED of pods.py and cluster.py.
"""

from __future__ import annotations

import copy
import json
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster import Cluster, Job, RunningPod
from hosts import needs_pods
from jobs import fingerprint, losses, rows, train
from manifests import KUBECTL, Document, documents

pytestmark = [
    pytest.mark.slow,
    needs_pods,
    pytest.mark.skipif(KUBECTL is None, reason="no kubectl to render the manifests"),
]
ON_A_CPU = ["--training.device=cpu"]
SMALL = (
    "--prepare.min_count=30 --model.embedding_size=24 --model.hidden_size=32 --model.dropout=0 --schedule.name=constant "
    "--training.precision=fp32 --training.steps=60 --training.log_every=1 --training.timeout_seconds=10 "
    "--checkpoint.every_steps=8 --sample.words=0"
).split()
WITHOUT_MLFLOW = "--tracking.mlflow=false"


def changed(found: Sequence[Document], *flags: str) -> list[Document]:
    """The objects with flags after those of the Job, and a rank for each pod in place of a rank for each GPU."""
    made = copy.deepcopy(list(found))
    for document in made:
        if document["kind"] == "Job":
            (container,) = document["spec"]["template"]["spec"]["containers"]
            container["args"] += flags
            for variable in container["env"]:
                if variable["name"] == "PET_NPROC_PER_NODE" and variable["value"] == "gpu":
                    variable["value"] = "1"
    return made


def with_recipe(found: Sequence[Document], recipe: str) -> list[Document]:
    """The objects with another recipe in their ConfigMap."""
    made = copy.deepcopy(list(found))
    for document in made:
        if document["kind"] == "ConfigMap" and "recipe.toml" in document["data"]:
            document["data"]["recipe.toml"] = recipe
    return made


def step(run: Path) -> int:
    """How far a run has come."""
    try:
        return rows(run)[-1]["step"]
    except (OSError, IndexError, ValueError):
        return 0


@pytest.fixture(scope="module")
def multi_node() -> list[Document]:
    return changed(documents("multi-node"), *ON_A_CPU, *SMALL)


@pytest.fixture(scope="module")
def undisturbed(multi_node, tmp_path_factory) -> Iterator[tuple[Job, set[str]]]:
    """The Job of the overlay multi-node after its end, and where its pods could write."""
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        cluster.apply(multi_node)
        job = Job(cluster, "lmdist-train")
        assert not job.run(until=lambda: step(cluster.claims / "lmdist-runs" / "lmdist-train") > 0)
        writable = set.union(*(pod.writable() for pod in job.active.values()))
        job.run()
        yield job, writable


def test_two_nodes_train_to_the_end_and_write_to_their_volumes_only(undisturbed, multi_node, tmp_path):
    job, writable = undisturbed
    claims = job.cluster.claims
    run = claims / "lmdist-runs" / "lmdist-train"
    assert job.condition == "Complete"
    assert [pod.exit_code for pod in job.ended] == [0, 0]
    assert {pod.host.name for pod in job.ended} == {"lmdist-train-0", "lmdist-train-1"}
    assert "on 2 rank(s)" in job.ended[0].said() + job.ended[1].said()

    assert writable == {"/data", "/runs", "/tmp", "/dev/shm"}
    owners = {(path.stat().st_uid, path.stat().st_gid) for path in claims.glob("*/**/*")}
    assert owners == {(1000, 1000)}
    assert {path.name for path in (claims / "lmdist-runs").iterdir()} == {"lmdist-train", "mlflow.db", "mlruns"}
    with closing(sqlite3.connect(claims / "lmdist-runs" / "mlflow.db")) as database:
        assert database.execute("select name, status from runs").fetchall() == [("lmdist-train", "FINISHED")]

    (recipe,) = (document["data"]["recipe.toml"] for document in multi_node if document["kind"] == "ConfigMap")
    (tmp_path / "recipe.toml").write_text(recipe)
    places = [f"--data.folder={claims / 'lmdist-data' / 'demo'}", "--run_folder=one"]
    flags = ["--config=recipe.toml", *ON_A_CPU, *SMALL, *places, WITHOUT_MLFLOW, "--training.steps=10"]
    train(1, *flags, cwd=tmp_path)
    np.testing.assert_allclose(losses(run)[:10], losses(tmp_path / "one"), rtol=0, atol=1e-5)


def test_the_loss_of_a_node_and_a_drain_cost_a_few_steps(undisturbed, tmp_path):
    whole = undisturbed[0].cluster.claims
    with Cluster(tmp_path) as cluster:
        shutil.copytree(whole / "lmdist-data", cluster.claims / "lmdist-data")
        cluster.apply(changed(documents("multi-node"), *ON_A_CPU, *SMALL, WITHOUT_MLFLOW))
        job = Job(cluster, "lmdist-train")
        run = cluster.claims / "lmdist-runs" / "lmdist-train"
        assert not job.run(until=lambda: step(run) >= 10)
        lost, survivor = job.active[1], job.active[0]
        job.lose(1)
        assert not job.run(until=lambda: step(run) >= 30)
        assert job.active[0] is survivor, "a pod whose peer is lost keeps its place, and starts its ranks anew"
        assert job.active[1].host.address != lost.host.address
        drained = job.active[0]
        job.drain(0)
        assert job.run() == "Complete"
        assert (lost.exit_code, drained.exit_code) == (137, 75)
        assert job.exit_codes()[0] == 2
        assert job.failures == 0, "neither is the Job's fault"
    assert losses(run) == losses(whole / "lmdist-runs" / "lmdist-train")
    assert fingerprint(run) == fingerprint(whole / "lmdist-runs" / "lmdist-train")


def test_a_cluster_without_gpus_trains_exports_and_serves_the_demo(undisturbed, tmp_path):
    """The overlays mlflow, cpu-smoke, export and serve in one namespace; of 200 steps 30 are done, on data made before."""
    with Cluster(tmp_path) as cluster:
        shutil.copytree(undisturbed[0].cluster.claims / "lmdist-data", cluster.claims / "lmdist-data")
        for overlay in ("mlflow", "serve", "export"):
            cluster.apply(documents(overlay))
        cluster.apply(changed(documents("cpu-smoke"), "--training.steps=30"))
        server = start(cluster, "mlflow", "/health")
        training = Job(cluster, "lmdist-smoke")
        assert training.run() == "Complete"
        assert training.exit_codes() == {0: 2}
        assert not (cluster.claims / "lmdist-runs" / "mlflow.db").exists()
        run = cluster.claims / "lmdist-runs" / "lmdist-smoke"
        with closing(sqlite3.connect(cluster.claims / "mlflow" / "mlflow.db")) as database:
            assert database.execute("select name, status from runs").fetchall() == [("lmdist-smoke", "FINISHED")]
            (points,) = database.execute("select count(*) from metrics where key = 'train/loss'").fetchone()
        assert points == len(losses(run))

        # The name of the run is one of the "names to edit" there.
        (container,) = cluster.objects["Job", "lmdist-export"]["spec"]["template"]["spec"]["containers"]
        container["args"] = [argument.replace("/runs/lmdist-train", "/runs/lmdist-smoke") for argument in container["args"]]
        export = Job(cluster, "lmdist-export")
        assert not export.run(until=lambda: bool(export.active[0].processes()))
        assert export.active[0].writable() == {"/runs", "/tmp", "/dev/shm"}, "data is mounted to be read"
        assert export.run() == "Complete"

        model = start(cluster, "lmdist-serve", "/ping")
        assert model.writable() == {"/tmp", "/dev/shm"}
        body = json.dumps({"inputs": ["we will"], "params": {"max_new_tokens": 5}})
        (prediction,) = json.loads(ask(server, model, "/invocations", body))["predictions"]
        assert prediction["text"].startswith("we will")
        model.stop()
        asked = time.monotonic()
        assert ask(server, model, "/ping"), "it answers until all have heard that it leaves"
        cluster.wait(lambda: model.exit_code is not None, model.container.grace_seconds)
        assert model.exit_code == 0
        assert time.monotonic() - asked > 3, "its preStop has run"

        assert server.writable() == {"/mlflow", "/tmp", "/dev/shm"}
        server.stop()
        cluster.wait(lambda: server.exit_code is not None, server.container.grace_seconds)
        assert server.exit_code == 0


def start(cluster: Cluster, deployment: str, health: str) -> RunningPod:
    """A pod of a Deployment, once its probes are answered."""
    pod = cluster.start(cluster.objects["Deployment", deployment]["spec"]["template"], f"{deployment}-5d4c7b8f96-x2x7z")
    assert {probe.path for probe in pod.container.probes.values()} == {health}
    assert set(pod.container.probes) == {"startupProbe", "readinessProbe", "livenessProbe"}
    cluster.wait(lambda: bool(ask(pod, pod, health)), 120)
    return pod


def ask(asker: RunningPod, pod: RunningPod, path: str, body: str = "") -> str:
    """What a pod answers at the port of its probes, asked from the host of a pod; nothing where it does not answer."""
    script = """if True:
        import sys, urllib.request
        headers = {"Content-Type": "application/json"} if sys.argv[2] else {}
        request = urllib.request.Request(sys.argv[1], sys.argv[2].encode() or None, headers)
        print(urllib.request.urlopen(request, timeout=20).read().decode() or "empty")
    """
    address = f"http://{pod.host.address}:{pod.container.probes['readinessProbe'].port}{path}"
    command = asker.host.command(sys.executable, "-c", script, address, body)
    return subprocess.run(command, capture_output=True, text=True).stdout


MISTAKES = {
    "no such setting": ("[model]\nnhid = 3\n", 64, "nhid"),
    "a table of no columns": ('[prepare]\ninputs = ["/data/empty.csv"]\n[data]\nfolder = "/data/made"\n', 65, "empty.csv"),
    "no such text": ('[prepare]\ninputs = ["/data/articles*.csv"]\n[data]\nfolder = "/data/made"\n', 66, "articles*.csv"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_fails_the_job_at_once_in_one_line(multi_node, mistake, tmp_path):
    recipe, code, message = MISTAKES[mistake]
    with Cluster(tmp_path) as cluster:
        (cluster.claims / "lmdist-data").mkdir(parents=True)
        (cluster.claims / "lmdist-data" / "empty.csv").touch()
        cluster.apply(with_recipe(multi_node, recipe))
        job = Job(cluster, "lmdist-train")
        assert job.run() == "Failed: PodFailurePolicy"
        failed = [pod for pod in job.ended if pod.exit_code == code]
        assert failed, job.exit_codes()
        assert set(job.exit_codes()) <= {code, 75}
        assert len(job.ended) == 2, "no pod comes twice"
        for pod in failed:
            assert len([line for line in pod.said().splitlines() if "error" in line]) <= 1
            assert "starting anew" not in pod.said()
            assert "Traceback" not in pod.said()
        assert message in "".join(pod.said() for pod in failed)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs")
def test_a_node_without_the_gpus_that_were_promised_fails_the_job(tmp_path):
    with Cluster(tmp_path) as cluster:
        cluster.apply(documents("multi-node"))
        job = Job(cluster, "lmdist-train")
        assert job.run() == "Failed: PodFailurePolicy"
        first = job.ended[0]
        assert first.exit_code == 64
        (line,) = first.said().splitlines()
        assert "nproc_per_node is gpu (Cuda is not available.)" in line


def test_a_pod_killed_for_its_memory_counts_as_a_failure(multi_node, tmp_path):
    with Cluster(tmp_path) as cluster:
        cluster.apply(multi_node)
        job = Job(cluster, "lmdist-train")
        for failures in range(1, job.backoff_limit + 2):
            assert not job.run(until=lambda: time.monotonic() - job.active[1].started > 1)
            job.kill(1)
            job.run(until=lambda failures=failures: job.failures == failures)
        assert job.run() == "Failed: BackoffLimitExceeded"
        assert job.exit_codes() == {137: 4, 75: 1}, "the other one is stopped with the Job"

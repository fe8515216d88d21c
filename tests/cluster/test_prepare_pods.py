"""k8s/overlays/prepare at work: its pods count the shards, one is killed, and another Job merges them when all are there."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest

from lmdist.config import read_section
from lmdist.settings import PrepareSettings
from lmdist.text.prepare import prepare
from support.cluster import Cluster, Job
from support.hosts import needs_pods
from support.manifests import K8S, KUBECTL, Document, documents

SHARDS = 3


def small() -> list[Document]:
    """The objects of the overlay, with fewer shards than eight."""
    found = documents("prepare")
    for document in found:
        if document["metadata"]["name"] == "lmdist-prepare" and document["kind"] == "Job":
            document["spec"].update(completions=SHARDS, parallelism=SHARDS)
            (container,) = document["spec"]["template"]["spec"]["containers"]
            container["args"] = [word.replace("/8", f"/{SHARDS}") for word in container["args"]]
    return found


@pytest.mark.slow
@needs_pods
@pytest.mark.skipif(KUBECTL is None, reason="no kubectl to render the manifests")
def test_the_pods_write_the_folder_of_one_process(tmp_path: Path) -> None:
    with Cluster(tmp_path / "cluster") as cluster:
        data = cluster.claims / "lmdist-data"
        data.mkdir(parents=True)
        for number in range(2):
            with (data / f"articles{number}.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["id", "content"])
                writer.writerows([row, " ".join(f"Word{row * 7 % 50 + word}" for word in range(40))] for row in range(1000))
            os.chown(data / f"articles{number}.csv", 1000, 1000)
        cluster.apply([document for document in documents("multi-node") if document["kind"] == "PersistentVolumeClaim"])
        cluster.apply(small())
        merge = Job(cluster, "lmdist-merge")
        merge.run(until=lambda: bool(merge.ended))
        assert (merge.ended[0].exit_code, merge.condition) == (75, ""), merge.ended[0].printed()
        shards = Job(cluster, "lmdist-prepare")
        shards.kill(1)
        assert shards.run() == "Complete"
        assert shards.exit_codes() == {0: SHARDS, 137: 1} or shards.exit_codes() == {0: SHARDS, -9: 1}, shards.exit_codes()
        assert merge.run() == "Complete", merge.ended[-1].printed()

        settings = read_section(str(K8S / "overlays" / "prepare" / "recipe.toml"), "prepare", PrepareSettings)
        settings["inputs"] = [str(data / "articles*.csv")]
        prepare(PrepareSettings(**settings), tmp_path / "whole")
        for name in ("train.bin", "valid.bin", "test.bin", "vocab.txt", "text.json"):
            assert (data / "articles" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

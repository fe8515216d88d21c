"""The manifests of k8s/ as a cluster would get them, and the ways to look into them that all rules share.

    k8s/base, k8s/overlays/NAME ──kubectl kustomize──> Render ──pods()──> Pod, Pod ...      Job, Deployment, Pod, JobSet and
                                                          └──rules──> sentences            TrainingRuntime hold pods alike

A rule is a function that takes a `Render` and gives a sentence for each thing that is wrong. The rules lie beside this module:
manifest_schemas.py, manifest_objects.py, manifest_pods.py, manifest_jobs.py, manifest_services.py; what each must find lies in
manifest_mutations.py. No cluster is asked for anything.
"""

from __future__ import annotations

import copy
import functools
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
KUBECTL = shutil.which("kubectl")

Document = dict[str, Any]
Labels = dict[str, str]

OVERLAYS = ["base", *sorted(path.parent.name for path in K8S.glob("overlays/*/kustomization.yaml"))]
STANDS_ON = {"export": ["base", "mlflow"], "serve": ["mlflow", "export"], "shell": ["base"]}
"""What has to be applied before an overlay. All others use the server of `mlflow` where there is one."""

CLUSTER_SCOPED = {"Namespace", "ClusterQueue", "ResourceFlavor", "ClusterTrainingRuntime"}
NAME, COMPONENT = "app.kubernetes.io/name", "app.kubernetes.io/component"
JOB_NAME, JOB_INDEX = "batch.kubernetes.io/job-name", "batch.kubernetes.io/job-completion-index"
JOBSET_NAME = "jobset.sigs.k8s.io/jobset-name"
GPU = "nvidia.com/gpu"


@dataclass
class Render:
    """The documents of an overlay, and those that it stands on."""

    name: str
    documents: list[Document]
    others: list[Document]

    @property
    def everything(self) -> list[Document]:
        """All documents that are there once the overlay is applied."""
        return [*self.documents, *self.others]


@dataclass
class Pod:
    """A pod, or the template of one, wherever it lies."""

    owner: Document
    """The document that it lies in."""
    metadata: Document
    spec: Document
    job: Document | None = None
    """The specification of its Job."""
    job_name: str = ""
    """The name that its Job has, or is given by a JobSet."""
    set_name: str = ""
    """The name of its JobSet, or the one that the Trainer makes for a TrainJob."""
    subdomain: str | None = None
    """The headless Service by which its hostname is looked up."""
    trainer: Document | None = None
    """The TrainJob that starts it."""

    def __str__(self) -> str:
        return title(self.owner)

    @property
    def labels(self) -> Labels:
        """Its labels in the manifests; controllers add some."""
        return self.metadata.get("labels") or {}

    @property
    def component(self) -> str:
        """Its part in lmdist: train, export, serve ..."""
        return self.labels.get(COMPONENT, "")

    @property
    def containers(self) -> list[Document]:
        """All containers, those that run first as well."""
        return [*(self.spec.get("initContainers") or []), *(self.spec.get("containers") or [])]

    @property
    def gpus(self) -> int:
        """GPUs of all of its containers."""
        return sum(int(amount(look(container, "resources", "limits", GPU) or 0)) for container in self.containers)

    @property
    def trains(self) -> bool:
        """Whether it is a node of a training."""
        return any(command(container) == "lmdist-train" for container in self.containers)

    @property
    def count(self) -> int:
        """How many such pods there are at a time, or may be."""
        if self.job is not None:
            return self.job.get("parallelism", 1)
        return self.owner["spec"].get("replicas", 2) if self.owner["kind"] == "Deployment" else 1

    def hostname(self, index: int) -> str:
        """The name of the pod of an index of an Indexed Job."""
        return f"{self.job_name}-{index}"

    def labels_of(self, index: int) -> Labels:
        """The labels of the pod of an index in the cluster, with those of the controllers."""
        added = {JOB_NAME: self.job_name, JOBSET_NAME: self.set_name, JOB_INDEX: str(index) if self.indexed else ""}
        return {**self.labels, **{name: value for name, value in added.items() if value}}

    @property
    def indexed(self) -> bool:
        """Whether its Job numbers its pods."""
        return self.job is not None and self.job.get("completionMode") == "Indexed"

    def field(self, path: str) -> str | None:
        """What a fieldRef gives in the pod of index 0; None where Kubernetes knows no such field of it."""
        fields = {"metadata.namespace": self.owner["metadata"].get("namespace", ""), "metadata.name": "POD"}
        fields |= {f"metadata.labels['{name}']": value for name, value in self.labels_of(0).items()}
        if self.indexed:
            fields[f"metadata.annotations['{JOB_INDEX}']"] = "0"
        return fields.get(path)

    def environment(self, container: Document, everything: list[Document]) -> dict[str, str]:
        """The variables of a container as the kubelet sets them: in their order, $(NAME) from those before."""
        variables: dict[str, str] = {}
        for entry in container.get("env") or []:
            source = entry.get("valueFrom") or {}
            if "fieldRef" in source:
                value = self.field(source["fieldRef"]["fieldPath"])
            elif "configMapKeyRef" in source:
                reference = source["configMapKeyRef"]
                found = find(everything, "ConfigMap", reference.get("name"))
                value = look(found or {}, "data", reference.get("key"))
            else:
                value = expanded(str(entry.get("value", "")), variables)
            if value is not None:
                variables[entry["name"]] = value
        return variables

    def arguments(self, container: Document, everything: list[Document]) -> list[str]:
        """The arguments of a container, $(NAME) as the kubelet replaces it."""
        variables = self.environment(container, everything)
        return [expanded(str(argument), variables) for argument in container.get("args") or []]

    def volume(self, name: str) -> Document:
        """A volume by its name."""
        return next((volume for volume in self.spec.get("volumes") or [] if volume.get("name") == name), {})

    def mounted(self, container: Document, path: str) -> tuple[Document, Document]:
        """The mount and the volume that a path lies in; empty where it lies in the image."""
        mounts = [mount for mount in container.get("volumeMounts") or [] if inside(path, mount.get("mountPath", ""))]
        mount = max(mounts, key=lambda mount: len(mount["mountPath"]), default={})
        return mount, self.volume(mount.get("name", ""))


Rule = Callable[[Render], Iterable[str]]
RULES: dict[str, Rule] = {}
"""All rules by their names."""


def rule(function: Rule) -> Rule:
    """Make a function one of the rules."""
    RULES[function.__name__] = function
    return function


def faults(render: Render, names: Iterable[str] = ()) -> list[str]:
    """What rules, all of them where none is named, find wrong in a render: each with its name before it."""
    return [f"{name}: {sentence}" for name in names or RULES for sentence in RULES[name](render)]


@functools.cache
def kustomized(folder: Path) -> str:
    """What `kubectl kustomize` makes of a folder."""
    assert KUBECTL, "kubectl is not here"
    done = subprocess.run([KUBECTL, "kustomize", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def documents(name: str, k8s: Path = K8S) -> list[Document]:
    """The documents of the base or an overlay, new ones at each call."""
    return copy.deepcopy(read(kustomized(k8s / name if name == "base" else k8s / "overlays" / name)))


@functools.cache
def read(text: str) -> list[Document]:
    """The documents of a YAML file."""
    return [document for document in yaml.load_all(text, yaml.CSafeLoader) if document]


def namespace() -> list[Document]:
    """The namespace that all overlays are applied to."""
    return copy.deepcopy(read((K8S / "namespace.yaml").read_text()))


def rendered(name: str) -> Render:
    """An overlay and what it stands on."""
    return Render(name, documents(name), [*namespace(), *(document for other in before(name) for document in documents(other))])


def before(name: str) -> list[str]:
    """The overlays that are applied before one."""
    return STANDS_ON.get(name, [] if name == "mlflow" else ["mlflow"])


def pods(found: list[Document]) -> Iterator[Pod]:
    """Every pod and template of a pod in some documents."""
    for document in found:
        kind, name, spec = document["kind"], document["metadata"]["name"], document.get("spec") or {}
        match kind:
            case "Pod":
                yield Pod(document, document["metadata"], spec, subdomain=spec.get("subdomain"))
            case "Deployment":
                yield Pod(document, look(spec, "template", "metadata") or {}, look(spec, "template", "spec") or {})
            case "Job":
                template = look(spec, "template", "spec") or {}
                metadata = look(spec, "template", "metadata") or {}
                yield Pod(document, metadata, template, spec, name, subdomain=template.get("subdomain"))
            case "JobSet":
                yield from pods_of_set(document, spec, name, None)
            case "TrainingRuntime":
                jobs = [
                    other
                    for other in found
                    if other["kind"] == "TrainJob" and look(other, "spec", "runtimeRef", "name") == name
                ]
                set_name = jobs[0]["metadata"]["name"] if jobs else name
                yield from pods_of_set(document, look(spec, "template", "spec") or {}, set_name, jobs[0] if jobs else {})


def pods_of_set(document: Document, spec: Document, name: str, trainer: Document | None) -> Iterator[Pod]:
    """The templates of a JobSet, whose subdomain the controller sets in each."""
    subdomain = look(spec, "network", "subdomain") or name
    for replicated in spec.get("replicatedJobs") or []:
        job = look(replicated, "template", "spec") or {}
        metadata, template = look(job, "template", "metadata") or {}, look(job, "template", "spec") or {}
        yield Pod(document, metadata, template, job, f"{name}-{replicated.get('name')}-0", name, subdomain, trainer)


def job_sets(found: list[Document]) -> Iterator[tuple[Document, Document]]:
    """Every JobSet's specification, with the document that it lies in: a JobSet or a TrainingRuntime."""
    for document in found:
        if document["kind"] == "JobSet":
            yield document, document["spec"]
        elif document["kind"] == "TrainingRuntime":
            yield document, look(document, "spec", "template", "spec") or {}


def of_kind(found: list[Document], *kinds: str) -> list[Document]:
    """The documents of some kinds."""
    return [document for document in found if document["kind"] in kinds]


def find(found: list[Document], kind: str, name: str | None) -> Document | None:
    """A document by kind and name."""
    return next((document for document in of_kind(found, kind) if document["metadata"]["name"] == name), None)


def look(value: Any, *keys: Any) -> Any:
    """What lies under some keys, one below the other; None where it is not there."""
    for key in keys:
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


def title(document: Document) -> str:
    """A document as sentences name it."""
    return f"{document['kind']}/{document['metadata']['name']}"


def command(container: Document) -> str:
    """The program of a container; empty where the image says."""
    return (container.get("command") or [""])[0]


def expanded(text: str, variables: dict[str, str]) -> str:
    """A text with $(NAME) replaced as the kubelet does: $$ is a dollar, an unknown name stays as it is."""

    def value(match: re.Match[str]) -> str:
        return "$" if match[0] == "$$" else variables.get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([A-Za-z_][\w.-]*)\)", value, text)


def inside(path: str, folder: str) -> bool:
    """Whether a path is a folder or lies in it."""
    return bool(folder) and (path == folder or path.startswith(folder.rstrip("/") + "/"))


def selects(selector: Document | None, labels: Labels) -> bool:
    """Whether a label selector takes labels; an empty one takes all, none takes nothing."""
    if selector is None:
        return False
    for asked in selector.get("matchExpressions") or []:
        held = labels.get(asked["key"])
        fits = {
            "In": held in asked.get("values", []),
            "NotIn": held not in asked.get("values", []),
            "Exists": held is not None,
            "DoesNotExist": held is None,
        }
        if not fits[asked["operator"]]:
            return False
    return all(labels.get(key) == value for key, value in (selector.get("matchLabels") or {}).items())


FACTORS = {"": 1, "n": 1e-9, "u": 1e-6, "m": 1e-3} | {
    unit: factor
    for power, letter in enumerate("kMGTPE", start=1)
    for unit, factor in ((letter, 1000**power), (f"{letter.upper()}i", 1024**power))
}


def amount(quantity: Any) -> float:
    """A quantity of Kubernetes as a number: 500m is 0.5, 4Gi is 4 * 2**30."""
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)([A-Za-z]*)", str(quantity))
    if not match or match[2] not in FACTORS:
        raise ValueError(f"{quantity!r} is no quantity of Kubernetes")
    return float(match[1]) * FACTORS[match[2]]

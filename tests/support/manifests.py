"""The manifests of k8s/ as a cluster receives them, and the queries that all rules share.

    k8s/base, k8s/overlays/NAME ──kubectl kustomize──> Render ──pods()──> Pod, Pod ...      a Job, Deployment, Pod, JobSet or
                                                          └──rules──> sentences            TrainingRuntime holds pods

A rule is a function that takes a `Render` and yields a sentence for each fault. The rules lie in manifest_schemas.py (the
schemas of Kubernetes and Kubeflow), manifest_fields.py (tables of fields and their values), manifest_jobs.py (what a job agrees
on) and manifest_network.py (connections between pods). manifest_mutations.py lists what each of them must find. No cluster is
needed.
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
REQUIRED_OVERLAYS = {
    "mlflow": [],
    "export": ["base", "mlflow"],
    "cpu-export": ["cpu-smoke", "mlflow"],
    "serve": ["mlflow", "export"],
    "shell": ["base"],
    "prepare": ["multi-node"],
}
"""What has to be applied before an overlay; for the overlays that are not listed, `mlflow`."""
NAME, COMPONENT = "app.kubernetes.io/name", "app.kubernetes.io/component"
JOB_NAME, JOB_INDEX = "batch.kubernetes.io/job-name", "batch.kubernetes.io/job-completion-index"
JOBSET_NAME = "jobset.sigs.k8s.io/jobset-name"
GPU = "nvidia.com/gpu"


@dataclass
class Render:
    """The documents of an overlay, and those of the overlays that it requires."""

    documents: list[Document]
    required: list[Document]

    @property
    def everything(self) -> list[Document]:
        """All documents that exist once the overlay is applied."""
        return [*self.documents, *self.required]


@dataclass
class Pod:
    """A pod or the template of one, in a document of any kind."""

    owner: Document
    """The document that holds it."""
    metadata: Document
    spec: Document
    job: Document | None = None
    """The specification of its Job."""
    job_name: str = ""
    """The name of its Job, which a JobSet derives from its own."""
    set_name: str = ""
    """The name of its JobSet, which the Trainer derives from the TrainJob."""
    subdomain: str | None = None
    """The headless Service by which its hostname is resolved."""
    by_trainer: bool = False
    """Whether a TrainJob starts it."""

    def __str__(self) -> str:
        return title(self.owner)

    @property
    def labels(self) -> Labels:
        return self.metadata.get("labels") or {}

    @property
    def component(self) -> str:
        """Its part in lmdist: train, export, serve ..."""
        return self.labels.get(COMPONENT, "")

    @property
    def namespace(self) -> str:
        return self.owner["metadata"].get("namespace", "")

    @property
    def containers(self) -> list[Document]:
        """All containers, init containers included."""
        return [*(self.spec.get("initContainers") or []), *(self.spec.get("containers") or [])]

    @property
    def ports(self) -> list[Document]:
        return [port for container in self.containers for port in container.get("ports") or []]

    @property
    def claims(self) -> list[str]:
        """The names of the PersistentVolumeClaims that it mounts."""
        sources = [volume.get("persistentVolumeClaim") for volume in self.spec.get("volumes") or []]
        return [source["claimName"] for source in sources if source]

    @property
    def gpus(self) -> int:
        return sum(int(amount(look(container, "resources", "limits", GPU) or 0)) for container in self.containers)

    @property
    def trains(self) -> bool:
        """Whether it is a node of a training."""
        return any(command(container) == "lmdist-train" for container in self.containers)

    @property
    def grace_seconds(self) -> int:
        return self.spec.get("terminationGracePeriodSeconds", 30)

    @property
    def count(self) -> int:
        """How many such pods run at a time, at least 2 where an autoscaler decides."""
        if self.job is not None:
            return self.job.get("parallelism", 1)
        return self.owner["spec"].get("replicas", 2) if self.owner["kind"] == "Deployment" else 1

    def hostname(self, index: int) -> str:
        """The hostname of the pod of an index of an Indexed Job."""
        return f"{self.job_name}-{index}"

    def metadata_of(self, index: int) -> Document:
        """The metadata of the pod of an index in the cluster, with the labels and annotations that controllers add."""
        number = {JOB_INDEX: str(index)} if self.job and self.job.get("completionMode") == "Indexed" else {}
        added = {JOB_NAME: self.job_name, JOBSET_NAME: self.set_name, **number}
        labels = {**self.labels, **{name: value for name, value in added.items() if value}}
        return {"name": "POD", "namespace": self.namespace, "labels": labels, "annotations": number}

    def environment(self, container: Document, objects: list[Document], index: int = 0) -> dict[str, str]:
        """The variables of a container in the pod of an index."""
        return environment(container, self.metadata_of(index), objects)

    def arguments(self, container: Document, objects: list[Document]) -> list[str]:
        """The arguments of a container, with $(NAME) replaced as by the kubelet."""
        variables = self.environment(container, objects)
        return [expanded(str(argument), variables) for argument in container.get("args") or []]

    def flags(self, container: Document, objects: list[Document]) -> dict[str, str]:
        """The arguments --NAME=VALUE of a container."""
        words = (word.removeprefix("--").partition("=") for word in self.arguments(container, objects) if "=" in word)
        return {name: value for name, _, value in words}

    def mounted(self, container: Document, path: str) -> tuple[Document, Document]:
        """The mount and the volume that a path lies in; empty where it lies in the image."""
        found = [mount for mount in container.get("volumeMounts") or [] if inside(path, mount.get("mountPath", ""))]
        mount = max(found, key=lambda mount: len(mount["mountPath"]), default={})
        volumes = self.spec.get("volumes") or []
        return mount, next((volume for volume in volumes if volume.get("name") == mount.get("name", "")), {})

    def can_keep(self, container: Document, path: str) -> bool:
        """Whether a path lies on a claim that the container can write to."""
        mount, volume = self.mounted(container, path)
        return "persistentVolumeClaim" in volume and not mount.get("readOnly")


Rule = Callable[[Render], Iterable[str]]
RULES: dict[str, Rule] = {}
"""All rules by their names."""


def rule(function: Rule) -> Rule:
    """Register a function as a rule."""
    RULES[function.__name__] = function
    return function


def faults(render: Render, names: Iterable[str] = ()) -> list[str]:
    """Return the sentences of the rules of some names, or of all rules, each after the name of its rule."""
    return [f"{name}: {sentence}" for name in names or RULES for sentence in RULES[name](render)]


@functools.cache
def kustomized(folder: Path) -> str:
    """Return what `kubectl kustomize` prints for a folder."""
    assert KUBECTL, "kubectl is missing"
    done = subprocess.run([KUBECTL, "kustomize", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def parsed(text: str) -> list[Document]:
    """Return the documents of a YAML file."""
    return [document for document in yaml.load_all(text, yaml.CSafeLoader) if document]


def documents(name: str, k8s: Path = K8S) -> list[Document]:
    """Return the documents of an overlay, new ones at each call."""
    return copy.deepcopy(parsed(kustomized(k8s / name if name == "base" else k8s / "overlays" / name)))


def namespace() -> list[Document]:
    """Return the namespace that all overlays are applied to."""
    return copy.deepcopy(parsed((K8S / "namespace.yaml").read_text()))


def required(name: str) -> list[str]:
    """Return the overlays that are applied before one."""
    return REQUIRED_OVERLAYS.get(name, ["mlflow"])


def rendered(name: str) -> Render:
    """Return an overlay with what it requires."""
    return Render(documents(name), [*namespace(), *(document for other in required(name) for document in documents(other))])


def pods(found: list[Document]) -> Iterator[Pod]:
    """Yield every pod and pod template of some documents."""
    for document in found:
        kind, name, spec = document["kind"], document["metadata"]["name"], document.get("spec") or {}
        template = spec.get("template") or {}
        inner = template.get("spec") or {}
        if kind == "Pod":
            yield Pod(document, document["metadata"], spec)
        elif kind == "Deployment":
            yield Pod(document, template.get("metadata") or {}, inner)
        elif kind == "Job":
            yield Pod(document, template.get("metadata") or {}, inner, spec, name, subdomain=inner.get("subdomain"))
        elif kind in ("JobSet", "TrainingRuntime"):
            trainers = of_kind(found, "TrainJob") if kind == "TrainingRuntime" else []
            trainers = [job for job in trainers if look(job, "spec", "runtimeRef", "name") == name]
            set_name = trainers[0]["metadata"]["name"] if trainers else name
            specification = inner if kind == "TrainingRuntime" else spec
            subdomain = look(specification, "network", "subdomain") or set_name  # the controller sets it in each pod
            for replicated in specification.get("replicatedJobs") or []:
                job = look(replicated, "template", "spec") or {}
                metadata, inner = look(job, "template", "metadata") or {}, look(job, "template", "spec") or {}
                job_name = f"{set_name}-{replicated.get('name')}-0"
                yield Pod(document, metadata, inner, job, job_name, set_name, subdomain, kind == "TrainingRuntime")


def job_sets(found: list[Document]) -> Iterator[tuple[Document, Document]]:
    """Yield every JobSet or TrainingRuntime with the JobSet's specification."""
    yield from ((document, document["spec"]) for document in of_kind(found, "JobSet"))
    yield from ((document, look(document, "spec", "template", "spec") or {}) for document in of_kind(found, "TrainingRuntime"))


def of_kind(found: list[Document], *kinds: str) -> list[Document]:
    """Return the documents of some kinds."""
    return [document for document in found if document["kind"] in kinds]


def find(found: list[Document], kind: str, name: str | None) -> Document | None:
    """Return a document by kind and name."""
    return next((document for document in of_kind(found, kind) if document["metadata"]["name"] == name), None)


def look(value: Any, *keys: Any) -> Any:
    """Return what lies under nested keys, or None; a key of a list is an index."""
    for key in keys:
        if isinstance(value, list) and str(key).isdigit() and int(key) < len(value):
            value = value[int(key)]
        elif isinstance(value, dict):
            value = value.get(key)
        else:
            return None
    return value


def title(document: Document) -> str:
    """Return a document's name in sentences."""
    return f"{document['kind']}/{document['metadata']['name']}"


def command(container: Document) -> str:
    """Return the program of a container; empty where the image decides."""
    return (container.get("command") or [""])[0]


def environment(container: Document, metadata: Document, objects: list[Document]) -> dict[str, str]:
    """Return the variables of a container as the kubelet sets them: in order, with $(NAME) from those before.

    A variable whose source does not exist is left out.
    """
    variables: dict[str, str] = {}
    for entry in container.get("env") or []:
        source = entry.get("valueFrom") or {}
        value = None if source else expanded(str(entry.get("value", "")), variables)
        if "fieldRef" in source:
            value = field_value(source["fieldRef"]["fieldPath"], metadata)
        elif "configMapKeyRef" in source:
            reference = source["configMapKeyRef"]
            value = look(find(objects, "ConfigMap", reference.get("name")), "data", reference.get("key"))
        elif source:
            raise NotImplementedError(f"a variable from {sorted(source)}")
        if value is not None:
            variables[entry["name"]] = value
    return variables


def field_value(path: str, metadata: Document) -> str | None:
    """Return the value of a fieldRef, or None where the pod has no such field."""
    match = re.fullmatch(r"metadata\.(name|namespace)|metadata\.(labels|annotations)\['([^']+)'\]", path)
    if match is None:
        return None
    return metadata.get(match[1]) if match[1] else metadata[match[2]].get(match[3])


def expanded(text: str, variables: dict[str, str]) -> str:
    """Replace $(NAME) as the kubelet does: $$ is a dollar, an unknown name stays."""

    def value(match: re.Match[str]) -> str:
        return "$" if match[0] == "$$" else variables.get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([A-Za-z_][\w.-]*)\)", value, text)


def inside(path: str, folder: str) -> bool:
    """Return whether a path is a folder or lies in it."""
    return bool(folder) and (path == folder or path.startswith(folder.rstrip("/") + "/"))


def selects(selector: Document | None, labels: Labels) -> bool:
    """Return whether a label selector selects labels: an empty one selects all, None nothing."""
    if selector is None:
        return False
    assert set(selector) <= {"matchLabels"}, selector
    return all(labels.get(key) == value for key, value in (selector.get("matchLabels") or {}).items())


FACTORS = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def amount(quantity: Any) -> float:
    """Return a quantity of Kubernetes as a number: 500m is 0.5, 4Gi is 4 * 2**30."""
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)([A-Za-z]*)", str(quantity))
    if not match or match[2] not in FACTORS:
        raise ValueError(f"{quantity!r} is not a quantity of Kubernetes")
    return float(match[1]) * FACTORS[match[2]]

"""Rules: names, namespaces, labels, what refers to what, and the comments above the files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

from yamllint import linter
from yamllint.config import YamlLintConfig

from support.manifests import (
    CLUSTER_SCOPED,
    COMPONENT,
    K8S,
    NAME,
    OVERLAYS,
    ROOT,
    Document,
    Pod,
    Render,
    find,
    look,
    namespace,
    of_kind,
    pods,
    rendered,
    rule,
    title,
)

DNS_1123 = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
LONGEST_LABEL = 63
POD_SUFFIX = "-abcde"
"""What a Job adds to the names of its pods."""


@rule
def names_are_dns_names(render: Render) -> Iterator[str]:
    """Names can be names in DNS, those of Services and pods of one label; a pod's hostname is not too long."""
    for document in render.documents:
        name = document["metadata"]["name"]
        if not DNS_1123.fullmatch(name):
            yield f"{title(document)} is no DNS-1123 name"
        if document["kind"] in ("Service", "Job", "JobSet", "TrainJob") and not DNS_1035.fullmatch(name):
            yield f"{title(document)} is no DNS-1035 label"
    for pod in pods(render.documents):
        inner = [
            *pod.containers,
            *(pod.spec.get("volumes") or []),
            *(port for c in pod.containers for port in c.get("ports") or []),
        ]
        for name in (str(entry.get("name", "")) for entry in inner):
            if not re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", name):
                yield f"{pod}: {name!r} is no DNS-1123 label"
        longest = pod.hostname(pod.count - 1) + POD_SUFFIX
        if pod.job is not None and len(longest) > LONGEST_LABEL:
            yield f"{pod}: its pods are called {longest}, which is longer than {LONGEST_LABEL}"


@rule
def objects_are_there_once(render: Render) -> Iterator[str]:
    """No two documents have the same kind and name."""
    for name, times in Counter(map(title, render.documents)).items():
        if times > 1:
            yield f"{name} is there {times} times"


@rule
def entries_are_there_once(render: Render) -> Iterator[str]:
    """In a pod no two containers, volumes, variables, ports or mounts have the same name or place."""
    for pod in pods(render.documents):
        lists: list[Iterable[str | int]] = [
            [container["name"] for container in pod.containers],
            [volume["name"] for volume in pod.spec.get("volumes") or []],
        ]
        for container in pod.containers:
            lists += [
                [entry["name"] for entry in container.get("env") or []],
                [port.get("name", "") for port in container.get("ports") or []],
                [port["containerPort"] for port in container.get("ports") or []],
                [mount["mountPath"] for mount in container.get("volumeMounts") or []],
            ]
        for names in lists:
            yield from (f"{pod}: {name} is there {times} times" for name, times in Counter(names).items() if times > 1)


@rule
def namespaces_agree(render: Render) -> Iterator[str]:
    """All documents are in one namespace, which holds pods to "restricted"; what belongs to the cluster is in none."""
    named = {title(document): document["metadata"].get("namespace") for document in render.documents}
    cluster = {title(document) for document in of_kind(render.documents, *CLUSTER_SCOPED)}
    yield from (f"{name} belongs to the cluster and says namespace {named[name]}" for name in cluster if named[name])
    inside = {name: where for name, where in named.items() if name not in cluster}
    yield from (f"{name} says no namespace" for name, where in inside.items() if not where)
    if len(spaces := {where for where in inside.values() if where}) > 1:
        yield f"there are several namespaces: {', '.join(sorted(spaces))}"
    for space in spaces:
        document = find(render.others, "Namespace", space)
        if document is None:
            yield f"the namespace {space} is not there"
        elif look(document, "metadata", "labels", "pod-security.kubernetes.io/enforce") != "restricted":
            yield f"the namespace {space} does not enforce the Pod Security Standard restricted"


@rule
def what_is_needed_comes_first(render: Render) -> Iterator[str]:
    """What the API server asks for when it takes an object comes before it: it is applied in the order of the render."""
    order = {title(document): number for number, document in enumerate(render.documents)}
    for document in of_kind(render.documents, "TrainJob"):
        reference = look(document, "spec", "runtimeRef") or {}
        needed = f"{reference.get('kind')}/{reference.get('name')}"
        if order.get(needed, -1) > order[title(document)]:
            yield f"{title(document)} comes before {needed}, and is refused without it"


@rule
def labels_agree(render: Render) -> Iterator[str]:
    """Whatever starts pods has their labels, and these say that they are lmdist's and what part of it."""
    for pod in pods(render.documents):
        for label in (NAME, COMPONENT):
            if not pod.labels.get(label):
                yield f"{pod}: its pods have no label {label}"
            elif pod.owner["kind"] != "TrainingRuntime" and look(pod.owner, "metadata", "labels", label) != pod.labels[label]:
                yield f"{pod} and its pods differ in the label {label}"
        if pod.labels.get(NAME) != "lmdist":
            yield f"{pod}: the label {NAME} of its pods is {pod.labels.get(NAME)}"


@rule
def what_is_named_is_there(render: Render) -> Iterator[str]:
    """Claims, ConfigMaps with their keys, Secrets and ServiceAccounts that a pod names are there, or may be absent."""
    for pod in pods(render.documents):
        for kind, name, key, optional in references(pod):
            found = find(render.everything, kind, name)
            if found is None and not optional:
                yield f"{pod}: there is no {kind} {name}"
            if (
                found is not None
                and key is not None
                and key not in {**(found.get("data") or {}), **(found.get("binaryData") or {})}
            ):
                yield f"{pod}: the {kind} {name} has no {key}"


def references(pod: Pod) -> Iterator[tuple[str, str | None, str | None, bool]]:
    """What a pod names: kind, name, key where it names one, and whether it may be absent."""
    yield "ServiceAccount", pod.spec.get("serviceAccountName", "default"), None, "serviceAccountName" not in pod.spec
    for volume in pod.spec.get("volumes") or []:
        for source, kind, key in (
            ("persistentVolumeClaim", "PersistentVolumeClaim", "claimName"),
            ("configMap", "ConfigMap", "name"),
            ("secret", "Secret", "secretName"),
        ):
            if source in volume:
                yield kind, volume[source].get(key), None, bool(volume[source].get("optional"))
    for container in pod.containers:
        for entry in container.get("env") or []:
            for source, kind in (("configMapKeyRef", "ConfigMap"), ("secretKeyRef", "Secret")):
                if reference := look(entry, "valueFrom", source):
                    yield kind, reference.get("name"), reference.get("key"), bool(reference.get("optional"))
        for source in container.get("envFrom") or []:
            for field, kind in (("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
                if reference := source.get(field):
                    yield kind, reference.get("name"), None, bool(reference.get("optional"))


# The files themselves -----------------------------------------------------------------------------------------------

LINES = ("Apply", "Check", "Logs", "Clean")
KINDS = {
    "job": "Job",
    "pod": "Pod",
    "pvc": "PersistentVolumeClaim",
    "hpa": "HorizontalPodAutoscaler",
    **{name.lower(): name for name in ("ConfigMap", "Service", "ServiceAccount", "NetworkPolicy", "Deployment", "Namespace")},
    **{name.lower(): name for name in ("PodDisruptionBudget", "JobSet", "TrainJob", "TrainingRuntime")},
    **{name.lower(): name for name in ("ClusterQueue", "LocalQueue", "ResourceFlavor")},
}
"""Kinds as kubectl is told them."""
VALUES = {"-n", "-l", "-o", "--for", "--timeout", "--sort-by", "--field-selector"}
"""Options of kubectl that take the next word, unless they have a value already."""


def yaml_files() -> list[Path]:
    """Every YAML file of k8s/."""
    return sorted([*K8S.rglob("*.yaml"), *K8S.rglob("*.yml")])


def comment_faults(path: Path, text: str) -> Iterator[str]:
    """What is wrong in the comment that a file opens with: lines that are missing, files and objects that are not there."""
    comment = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    found = {line.split(":")[0]: line.partition(":")[2].strip() for line in comment if line.startswith(LINES)}
    yield from (f"it opens with no line {name}" for name in LINES if not found.get(name))
    everything = rendered(path.parent.name).everything if path.parent.name in OVERLAYS else namespace()
    for line in comment:
        for call in re.findall(r"\bkubectl ([^;)]*)", re.sub(r" {2,}\(.*|, then .*", "", line)):
            words = call.replace('"', "").split()
            wrong = [*command_faults(words, names_there(everything)), *label_faults(words, list(pods(everything)))]
            yield from (f"{line!r}: {fault}" for fault in wrong)


def label_faults(words: list[str], there: list[Pod]) -> Iterator[str]:
    """Whether the labels that a kubectl command asks for are of no pod, or its lines of any: rank 0 alone has some to read."""
    asked = [word for before, word in pairwise(words) if before == "-l"]
    held = [pod.labels_of(index) for pod in there for index in range(pod.count)]
    if "logs" in words and not asked:
        for pod in there:
            if f"job/{pod.job_name}" in words and pod.count > 1:
                yield f"{pod} has {pod.count} pods, and kubectl shows the lines of any"
    for wanted in (dict(pair.split("=", 1) for pair in text.split(",")) for text in asked):
        found = [labels for labels in held if wanted.items() <= labels.items()]
        if {"logs", "pods"} & set(words) and not found:
            yield f"no pod has the labels {wanted}"
        elif "logs" in words and len(found) > 1:
            yield f"{len(found)} pods have the labels {wanted}"


def names_there(everything: list[Document]) -> set[tuple[str, str]]:
    """Kind and name of some documents, and of the children of JobSets and TrainJobs."""
    found = {(document["kind"], document["metadata"]["name"]) for document in [*everything, *namespace()]}
    for pod in pods(everything):
        found |= {("Job", pod.job_name), ("JobSet", pod.set_name)}
        found |= {("Pod", f"{pod.hostname(index)}-XXXXX") for index in range(pod.count)}
    return found


def command_faults(words: list[str], there: set[tuple[str, str]]) -> Iterator[str]:
    """Which files and objects that a kubectl command names are not there."""
    plain: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == "--":
            break
        value = next(rest, "") if word in VALUES else word.partition("=")[2]
        if word == "-n" and ("Namespace", value) not in there:
            yield f"there is no namespace {value}"
        if not word.startswith("-"):
            plain.append(word)
    for word in plain:
        if word.startswith("k8s/"):
            if not (ROOT / word).exists():
                yield f"there is no {word}"
        elif "/" in word and word.split("/")[0] in KINDS and (KINDS[word.split("/")[0]], word.split("/")[1]) not in there:
            yield f"there is no {word}"
    if plain[:1] == ["exec"] and "/" not in plain[1] and ("Pod", plain[1]) not in there:
        yield f"there is no pod {plain[1]}"
    if plain and plain[0] in ("get", "describe", "delete") and len(plain) > 2 and "/" not in plain[1]:
        for kind in plain[1].split(","):
            for name in plain[2:]:
                if kind not in KINDS:
                    yield f"{kind} is no kind"
                elif (KINDS[kind], name) not in there:
                    yield f"there is no {kind} {name}"


def lint_faults(text: str) -> list[str]:
    """What yamllint says of a file."""
    rules = YamlLintConfig(file=str(ROOT / ".yamllint"))
    return [f"line {problem.line}: {problem.desc}" for problem in linter.run(text, rules)]

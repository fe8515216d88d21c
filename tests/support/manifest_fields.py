"""Rules: tables of the values that fields must have, and what must hold of each object and each pod by itself.

A row of a table is (path, expected values or a predicate, reason). A field that is absent has the value None.
"""

from __future__ import annotations

import functools
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from lmdist import __version__
from support.manifests import (
    COMPONENT,
    GPU,
    NAME,
    ROOT,
    RULES,
    Document,
    Pod,
    Render,
    amount,
    command,
    expanded,
    find,
    job_sets,
    look,
    of_kind,
    pods,
    rule,
    selects,
    title,
)

Row = tuple[str, list[Any] | Callable[[Any], object], str]
Scope = Callable[[Render], Iterator[tuple[object, Any]]]

RESTRICTED = 'the Pod Security Standard "restricted" asks for it'
ABSENT = [None, False, []]
TRIED_AGAIN = "a failed job is tried again, but not for ever"
CLEANED_UP = "a finished job is deleted by its outermost owner"
NODE_JOB = 'a JobSet holds one Job, which the Trainer knows as "node"'
KUEUE = ["kueue.x-k8s.io/v1beta2"]
HOST = "kubernetes.io/hostname"


def given(value: Any) -> bool:
    return value is not None


def matches(pattern: str) -> Callable[[Any], object]:
    return lambda value: re.fullmatch(pattern, str(value))


def only(*keys: str) -> Callable[[Any], bool]:
    return lambda value: set(value or {}) <= set(keys)


def each_container(render: Render) -> Iterator[tuple[Pod, Document, str]]:
    """Yield every container with its pod and a name for both."""
    for pod in pods(render.documents):
        yield from ((pod, container, f"{pod}, container {container['name']}") for container in pod.containers)


def effective(render: Render) -> Iterator[tuple[str, Document]]:
    """Yield the containers, each with the security context that it has together with its pod's."""
    for pod, container, where in each_container(render):
        contexts = [entry.get("securityContext") or {} for entry in (pod.spec, container)]
        yield where, {**container, "securityContext": {**contexts[0], **contexts[1]}}


def specs(holds: Callable[[Pod], object] = lambda pod: True) -> Scope:
    """Return the scope of the pods' specifications."""
    return lambda render: ((pod, pod.spec) for pod in pods(render.documents) if holds(pod))


def jobs(holds: Callable[[Pod], object] = lambda pod: True) -> Scope:
    """Return the scope of the Jobs' specifications."""
    return lambda render: ((pod, pod.job) for pod in pods(render.documents) if pod.job is not None and holds(pod))


def kinds(*names: str) -> Scope:
    """Return the scope of the documents of some kinds."""
    return lambda render: ((title(document), document) for document in of_kind(render.documents, *names))


def databases(render: Render) -> Iterator[tuple[object, Document]]:
    """Yield the Deployments that mount a claim."""
    yield from ((pod, pod.owner["spec"]) for pod in pods(of_kind(render.documents, "Deployment")) if pod.claims)


TABLES: dict[str, tuple[Scope, list[Row]]] = {
    "pods": (
        specs(),
        [
            ("hostNetwork", ABSENT, RESTRICTED),
            ("hostPID", ABSENT, RESTRICTED),
            ("hostIPC", ABSENT, RESTRICTED),
            ("securityContext sysctls", ABSENT, RESTRICTED),
            ("securityContext windowsOptions hostProcess", ABSENT, RESTRICTED),
            ("automountServiceAccountToken", [False], "no pod has a token of the cluster"),
            ("enableServiceLinks", [False], "a Service called mlflow would set MLFLOW_PORT, which MLflow reads"),
        ],
    ),
    "pods_with_claims": (
        specs(lambda pod: pod.claims),
        [("securityContext fsGroup", given, "a user that is not root may write to the claim by its group only")],
    ),
    "containers": (
        effective,
        [
            ("securityContext allowPrivilegeEscalation", [False], RESTRICTED),
            ("securityContext privileged", ABSENT, RESTRICTED),
            ("securityContext procMount", [None, "Default"], RESTRICTED),
            ("securityContext runAsNonRoot", [True], RESTRICTED),
            ("securityContext runAsUser", lambda value: value != 0, RESTRICTED),
            ("securityContext seccompProfile type", ["RuntimeDefault", "Localhost"], RESTRICTED),
            ("securityContext capabilities drop", lambda value: "ALL" in (value or []), RESTRICTED),
            ("securityContext capabilities add", ABSENT, RESTRICTED),
            ("securityContext readOnlyRootFilesystem", [True], "a container writes to its volumes only"),
            ("image", matches(r".+:(?!latest)[\w.-]+(@sha256:\w+)?"), "an image has a tag that is a version"),
        ],
    ),
    "jobs": (
        jobs(),
        [
            ("template spec restartPolicy", ["Never"], "podFailurePolicy requires it"),
            ("podReplacementPolicy", ["Failed"], "a pod's successor would start while the pod still saves"),
            ("backoffLimit", given, TRIED_AGAIN),
            ("activeDeadlineSeconds", given, TRIED_AGAIN),
        ],
    ),
    "jobs_alone": (jobs(lambda pod: not pod.set_name), [("ttlSecondsAfterFinished", given, CLEANED_UP)]),
    "jobs_in_sets": (jobs(lambda pod: pod.set_name), [("ttlSecondsAfterFinished", [None], CLEANED_UP)]),
    "job_sets": (
        lambda render: ((title(owner), specification) for owner, specification in job_sets(render.documents)),
        [
            ("network enableDNSHostnames", [None, True], "the nodes find each other by name"),
            ("network publishNotReadyAddresses", [None, True], "nodes are ready once they have found each other"),
            ("network subdomain", [None], "JobSets with one subdomain share a Service, which selects the pods of one"),
            ("failurePolicy maxRestarts", given, TRIED_AGAIN),
            ("failurePolicy rules 0 name", matches(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?"), "JobSet's webhook asks for it"),
            ("failurePolicy rules 0 action", ["FailJobSet"], "another try would fail in the same way"),
            ("failurePolicy rules 0 onJobFailureReasons", [["PodFailurePolicy", "DeadlineExceeded"]], "these are final"),
            ("failurePolicy rules 1", [None], "any other failure is tried again"),
            ("replicatedJobs 0 name", ["node"], NODE_JOB),
            ("replicatedJobs 0 replicas", [None, 1], NODE_JOB),
            ("replicatedJobs 1", [None], NODE_JOB),
        ],
    ),
    "job_sets_alone": (kinds("JobSet"), [("spec ttlSecondsAfterFinished", given, CLEANED_UP)]),
    "runtimes": (
        kinds("TrainingRuntime"),
        [
            ("spec mlPolicy torch", given, "the Trainer sets the variables of torchrun"),
            (
                "spec template spec replicatedJobs 0 template metadata labels trainer.kubeflow.org/trainjob-ancestor-step",
                ["trainer"],
                "the Trainer finds the Job that trains by this label",
            ),
        ],
    ),
    "accounts": (kinds("ServiceAccount"), [("automountServiceAccountToken", [False], "no pod has a token of the cluster")]),
    "databases": (
        databases,
        [
            ("replicas", [1], "a database has one writer"),
            ("strategy type", ["Recreate"], "a database has one writer during an update, too"),
        ],
    ),
    "kueue": (
        kinds("ResourceFlavor", "LocalQueue", "ClusterQueue"),
        [
            ("apiVersion", KUEUE, "its fields are those of this version"),
            ("spec preemption withinClusterQueue", [None, "Never", "LowerPriority", "LowerOrNewerEqualPriority"], KUEUE[0]),
            (
                "spec",
                only("clusterQueue", "resourceGroups", "cohortName", "namespaceSelector", "preemption", "queueingStrategy"),
                "Kueue has no other fields that matter here",
            ),
        ],
    ),
}


def table_faults(scope: Scope, rows: list[Row], render: Render) -> Iterator[str]:
    """Yield the fields that differ from the rows of a table."""
    for where, value in scope(render):
        for path, expected, reason in rows:
            found = look(value, *path.split())
            if not (expected(found) if callable(expected) else found in expected):
                yield f"{where}: {path} is {found!r}: {reason}"


for name, table in TABLES.items():
    RULES[name] = functools.partial(table_faults, *table)


def below(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield every (key, value) of the dictionaries in a value."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if isinstance(key, str):
            yield key, inner
        yield from below(inner)


# Objects ------------------------------------------------------------------------------------------------------------

LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")


@rule
def names_are_dns_names(render: Render) -> Iterator[str]:
    """Names are valid in DNS, and those of pods fit into 63 characters with the suffix of the Job controller."""
    for document in render.documents:
        first = "[a-z]" if document["kind"] in ("Service", "Job", "JobSet", "TrainJob") else "[a-z0-9]"
        if not re.fullmatch(rf"{first}([-a-z0-9.]*[a-z0-9])?", document["metadata"]["name"]):
            yield f"{title(document)} is not a DNS name"
    for pod in pods(render.documents):
        entries = [*pod.containers, *(pod.spec.get("volumes") or []), *pod.ports]
        names = [str(entry.get("name", "")) for entry in entries]
        yield from (f"{pod}: {name!r} is not a DNS label" for name in names if not LABEL.fullmatch(name))
        if pod.job is not None and len(longest := pod.hostname(pod.count - 1) + "-abcde") > 63:
            yield f"{pod}: its pods are called {longest}, which is longer than 63 characters"


@rule
def nothing_comes_twice(render: Render) -> Iterator[str]:
    """No two documents have the same kind and name; no two entries of a pod have the same name, number or place."""
    lists: list[list[object]] = [[title(document) for document in render.documents]]
    for pod in pods(render.documents):
        lists += [[container["name"] for container in pod.containers]]
        lists += [[volume["name"] for volume in pod.spec.get("volumes") or []]]
        for container in pod.containers:
            lists += [
                [entry.get(key) for entry in container.get(part) or []]
                for part, key in (("env", "name"), ("ports", "name"), ("ports", "containerPort"), ("volumeMounts", "mountPath"))
            ]
    yield from (f"{entry} comes {times} times" for entries in lists for entry, times in Counter(entries).items() if times > 1)


@rule
def namespaces_agree(render: Render) -> Iterator[str]:
    """All objects are in one namespace, which enforces "restricted"; objects of the cluster are in none."""
    cluster = ("Namespace", "ClusterQueue", "ResourceFlavor", "ClusterTrainingRuntime")
    spaces = set()
    for document in render.documents:
        space = document["metadata"].get("namespace")
        if document["kind"] in cluster and space:
            yield f"{title(document)} belongs to the cluster and names the namespace {space}"
        elif document["kind"] not in cluster:
            spaces.add(space)
    for space in spaces:
        labels = look(find(render.required, "Namespace", space), "metadata", "labels")
        if len(spaces) > 1 or look(labels, "pod-security.kubernetes.io/enforce") != "restricted":
            yield f"the namespace {space} is one of {len(spaces)}, or does not enforce the Pod Security Standard restricted"


@rule
def requirements_come_first(render: Render) -> Iterator[str]:
    """A runtime comes before its TrainJob, which the API server rejects without it."""
    order = [title(document) for document in render.documents]
    for document in of_kind(render.documents, "TrainJob"):
        reference = look(document, "spec", "runtimeRef") or {}
        needed = f"{reference.get('kind')}/{reference.get('name')}"
        if needed in order and order.index(needed) > order.index(title(document)):
            yield f"{title(document)} comes before {needed}"


@rule
def labels_agree(render: Render) -> Iterator[str]:
    """Pods and their owners have the same labels of name and component; the name is lmdist."""
    for pod in pods(render.documents):
        owner = pod.labels if pod.owner["kind"] == "TrainingRuntime" else look(pod.owner, "metadata", "labels") or {}
        if pod.labels.get(NAME) != "lmdist" or not pod.component:
            yield f"{pod}: its pods have the labels {pod.labels}"
        yield from (f"{pod} and its pods differ in {key}" for key in (NAME, COMPONENT) if owner.get(key) != pod.labels.get(key))


SOURCES = {
    "persistentVolumeClaim": ("PersistentVolumeClaim", "claimName"),
    "secret": ("Secret", "secretName"),
    **dict.fromkeys(("configMap", "configMapKeyRef", "configMapRef"), ("ConfigMap", "name")),
    **dict.fromkeys(("secretKeyRef", "secretRef"), ("Secret", "name")),
}


def missing(spec: Document, objects: list[Document]) -> Iterator[str]:
    """Yield the objects, and the keys in them, that a pod names and that do not exist, unless they are optional."""
    references = [(key, value) for key, value in below(spec) if key in SOURCES]
    for key, reference in references:
        kind, name_key = SOURCES[key]
        found = find(objects, kind, reference.get(name_key))
        entries = {**(look(found, "data") or {}), **(look(found, "binaryData") or {})}
        if found is None and not reference.get("optional"):
            yield f"there is no {kind} {reference.get(name_key)}"
        elif found is not None and "key" in reference and reference["key"] not in entries:
            yield f"the {kind} {reference.get(name_key)} has no {reference['key']}"
    account = spec.get("serviceAccountName")
    if account and find(objects, "ServiceAccount", account) is None:
        yield f"there is no ServiceAccount {account}"


@rule
def references_exist(render: Render) -> Iterator[str]:
    """Claims, ConfigMaps with their keys, Secrets and ServiceAccounts that a pod names exist, or are optional."""
    yield from (f"{pod}: {fault}" for pod in pods(render.documents) for fault in missing(pod.spec, render.everything))


# Images, commands, variables ----------------------------------------------------------------------------------------


@rule
def images_have_the_right_version(render: Render) -> Iterator[str]:
    """Our images are of lmdist's version, and are pulled with one Secret; MLflow's server is not older than its clients.

    Their major version is the same.
    """
    pinned = re.search(r"^mlflow==([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned, "constraints.txt has no mlflow"
    client = [int(part) for part in pinned[1].split(".")]
    for pod, container, where in each_container(render):
        image = container.get("image", "")
        ours, mlflow = re.fullmatch(r"(?:.*/)?lmdist-[a-z]+:(.+)", image), re.search(r"/mlflow:v?([\d.]+)", image)
        if ours and ours[1] != __version__:
            yield f"{where}: the image is of {ours[1]}, and lmdist of {__version__}"
        if ours and pod.spec.get("imagePullSecrets") != [{"name": "lmdist-registry"}]:
            yield f"{where}: the image is not pulled with the Secret lmdist-registry"
        if mlflow and not client <= [int(part) for part in mlflow[1].split(".")] < [client[0] + 1]:
            yield f"{where}: MLflow is {mlflow[1]}, and its clients are {pinned[1]}"


@rule
def commands_exist(render: Render) -> Iterator[str]:
    """Containers, hooks and probes run commands of lmdist, or one of few others."""
    known = {*tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"], "mlflow", "sleep"}
    for _, container, where in each_container(render):
        started = [container, *(value for key, value in below(container) if key == "exec")]
        yield from (f"{where}: there is no command {command(one)!r}" for one in started if command(one) not in known)


@rule
def variables_have_values(render: Render) -> Iterator[str]:
    """A variable has one value or one source, which the pod has; $(NAME) comes after NAME, and none remains in arguments."""
    for pod, container, where in each_container(render):
        metadata, known = pod.metadata_of(0), {}
        for entry in container.get("env") or []:
            source = entry.get("valueFrom") or {}
            if ("value" in entry) + len(source) != 1:
                yield f"{where}: {entry['name']} has no value, or several"
            path = look(source, "fieldRef", "fieldPath")
            if path and not pod.environment({"env": [entry]}, []).get(entry["name"]):
                yield f"{where}: {entry['name']} is taken from {path}, which the pod does not have: {metadata}"
            if left := unexpanded(str(entry.get("value", "")), known):
                yield f"{where}: no variable before {entry['name']} sets {left}"
            known[entry["name"]] = ""
        texts = map(str, [*(container.get("command") or []), *(container.get("args") or [])])
        yield from (f"{where}: no variable sets {left}" for text in texts if (left := unexpanded(text, known)))


def unexpanded(text: str, known: dict[str, str]) -> str:
    """Return the first $(NAME) that the kubelet would leave in a text."""
    left = re.search(r"(?<!\$)\$\([A-Za-z_][\w.-]*\)", expanded(text, known))
    return left[0] if left else ""


# Volumes ------------------------------------------------------------------------------------------------------------

VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
"""Kinds of volumes that the Pod Security Standard "restricted" allows."""


@rule
def volumes_are_mounted(render: Render) -> Iterator[str]:
    """Every mount has a volume, every volume a mount and one source of a kind that "restricted" allows."""
    for pod in pods(render.documents):
        volumes = {volume["name"]: set(volume) - {"name"} for volume in pod.spec.get("volumes") or []}
        mounted = {mount["name"] for container in pod.containers for mount in container.get("volumeMounts") or []}
        yield from (f"{pod}: {name} is a mount or a volume, but not both" for name in sorted(mounted ^ set(volumes)))
        wrong = [name for name, kinds in volumes.items() if len(kinds) != 1 or kinds - VOLUMES]
        yield from (f"{pod}: the volume {name} has the sources {volumes[name]}" for name in wrong)


@rule
def empty_volumes_are_limited(render: Render) -> Iterator[str]:
    """/tmp is an emptyDir with a limit, and volumes in memory leave half of the container's memory."""
    for pod, container, where in each_container(render):
        mount, volume = pod.mounted(container, "/tmp")
        if mount.get("mountPath") != "/tmp" or mount.get("readOnly") or not look(volume, "emptyDir", "sizeLimit"):
            yield f"{where} cannot write to /tmp, or may fill the disk of its node"
        sources = [pod.mounted(container, mount["mountPath"])[1] for mount in container.get("volumeMounts") or []]
        limits = [look(source, "emptyDir", "sizeLimit") for source in sources if look(source, "emptyDir", "medium") == "Memory"]
        memory = amount(look(container, "resources", "limits", "memory") or 0)
        if None in limits or sum(map(amount, limits)) > memory / 2:
            yield f"{where}: its volumes may take {limits} of {memory / 2**30:g} GiB of memory"


@rule
def claims_can_be_shared(render: Render) -> Iterator[str]:
    """A claim of several pods is ReadWriteMany, unless the pods have to be on one node."""
    for pod in pods(render.documents):
        terms = look(pod.spec, "affinity", "podAffinity", "requiredDuringSchedulingIgnoredDuringExecution") or []
        together = any(term.get("topologyKey") == HOST and selects(term.get("labelSelector"), pod.labels) for term in terms)
        for claim in pod.claims if pod.count > 1 and not together else []:
            modes = look(find(render.everything, "PersistentVolumeClaim", claim), "spec", "accessModes") or []
            if "ReadWriteMany" not in modes:
                yield f"{pod}: {pod.count} pods on several nodes mount {claim}, which is {', '.join(modes)}"


# Scheduling and probes ----------------------------------------------------------------------------------------------


@rule
def placement_selects_pods(render: Render) -> Iterator[str]:
    """Pods are spread over pods of their own template, and placed near to pods that exist."""
    others = [other.labels for other in pods(render.everything)]
    for pod in pods(render.documents):
        for key, selector in below(pod.spec):
            of = {"topologySpreadConstraints": [pod.labels], "podAffinity": others}.get(key, [])
            for labels in (value for name, value in below(selector) if of and name == "labelSelector"):
                if not any(selects(labels, found) for found in of):
                    yield f"{pod}: {key} selects {labels}, which no such pod has"


@rule
def requests_are_limits(render: Render) -> Iterator[str]:
    """Every container requests cpu and memory and is limited to them; GPUs are integers, whose taint the pod tolerates."""
    for pod, container, where in each_container(render):
        sides = [look(container, "resources", side) or {} for side in ("requests", "limits")]
        for name in sorted({"cpu", "memory", *sides[0], *sides[1]}):
            if len({amount(side.get(name, "0")) for side in sides}) != 1 or not amount(sides[0].get(name, "0")):
                yield f"{where} requests {sides[0].get(name)} of {name} and is limited to {sides[1].get(name)}"
        if (asked := sides[1].get(GPU)) is None:
            continue
        tolerated = [entry for entry in pod.spec.get("tolerations") or [] if entry.get("key") in (GPU, None)]
        exists = [entry for entry in tolerated if entry.get("operator") == "Exists"]
        if not re.fullmatch(r"[1-9]\d*", str(asked)) or not any(e.get("effect") in ("NoSchedule", None) for e in exists):
            yield f"{where} requests {asked} GPUs, and the pod tolerates {tolerated}"


PROBES = ("startupProbe", "readinessProbe", "livenessProbe")


@rule
def probes_reach_a_port(render: Render) -> Iterator[str]:
    """Servers have all three probes; a probe names a port of its container, a path from the root, and no other host."""
    for pod, container, where in each_container(render):
        names, probes = {port.get("name") for port in container.get("ports") or []}, {*PROBES} & {*container}
        if pod.owner["kind"] == "Deployment" and len(probes) < 3:
            yield f"{where} has {len(probes)} probes of 3"
        for name in probes:
            probe = container[name]
            asked = [probe[kind] for kind in ("httpGet", "tcpSocket", "grpc") if kind in probe]
            if [request.get("port") for request in asked if request.get("port") not in names]:
                yield f"{where}: its {name} has another port than {names}"
            if not look(probe, "httpGet", "path") or not probe["httpGet"]["path"].startswith("/"):
                yield f"{where}: its {name} has no path from the root"
            if name != "readinessProbe" and probe.get("successThreshold", 1) != 1:
                yield f"{where}: successThreshold of its {name} must be 1"
        if found := [key for key, value in below(container) if key in ("host", "hostPort") and value]:
            yield f"{where} has a {found[0]}"


@rule
def probes_are_patient(render: Render) -> Iterator[str]:
    """A start may take a minute; a pod leaves the Service before it is killed, and a hook half the grace at most."""
    for pod, container, where in each_container(render):
        start, ready, live = (seconds_to_fail(container.get(name)) for name in PROBES)
        if start is not None and start < 60:
            yield f"{where} has {start} s to start"
        if ready is not None and live is not None and live <= ready:
            yield f"{where} is killed after {live} s without an answer, and unready after {ready} s"
        hook = look(container, "lifecycle", "preStop") or {}
        words = look(hook, "exec", "command") or ["sleep", look(hook, "sleep", "seconds") or 0]
        if words[0] == "sleep" and pod.grace_seconds < 2 * float(words[1]):
            yield f"{where} waits {words[1]} s of {pod.grace_seconds} before it is asked to stop"


def seconds_to_fail(probe: Document | None) -> int | None:
    """Return the seconds until a probe that always fails has failed."""
    if probe is None:
        return None
    return probe.get("initialDelaySeconds", 0) + probe.get("periodSeconds", 10) * probe.get("failureThreshold", 3)

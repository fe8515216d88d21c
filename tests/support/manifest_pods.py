"""Rules: what holds for any pod, wherever its template lies: rights, images, volumes, sizes, probes."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator

from lmdist import __version__
from support.manifests import (
    GPU,
    ROOT,
    Document,
    Pod,
    Render,
    amount,
    command,
    expanded,
    find,
    inside,
    look,
    of_kind,
    pods,
    rule,
    selects,
    title,
)

VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
"""Kinds of volumes that the Pod Security Standard "restricted" allows."""
FOREIGN_COMMANDS = {"mlflow", "uvicorn", "sleep"}
OUR_IMAGES = re.compile(r"(?:.*/)?(lmdist-[a-z]+):(.+)")
HOST = "kubernetes.io/hostname"


def each_container(render: Render) -> Iterator[tuple[Pod, Document, str]]:
    """Every container of a render, with its pod and a name for both."""
    for pod in pods(render.documents):
        for container in pod.containers:
            yield pod, container, f"{pod}, container {container['name']}"


# Rights -------------------------------------------------------------------------------------------------------------


@rule
def pods_are_restricted(render: Render) -> Iterator[str]:
    """Pods fit the Pod Security Standard "restricted", as the namespace asks."""
    for pod in pods(render.documents):
        context = pod.spec.get("securityContext") or {}
        yield from (f"{pod} says {name}" for name in ("hostNetwork", "hostPID", "hostIPC") if pod.spec.get(name))
        if context.get("sysctls") or look(context, "windowsOptions", "hostProcess"):
            yield f"{pod} changes its host"
        for volume in pod.spec.get("volumes") or []:
            if kinds := set(volume) - {"name"} - VOLUMES:
                yield f"{pod}: a volume may not be a {', '.join(sorted(kinds))}"
    for pod, container, where in each_container(render):
        yield from (f"{where} {fault}" for fault in container_rights(container, pod.spec.get("securityContext") or {}))


def container_rights(container: Document, of_pod: Document) -> Iterator[str]:
    """What "restricted" forbids in a container."""
    own = container.get("securityContext") or {}
    both = {**of_pod, **own}
    if own.get("allowPrivilegeEscalation") is not False:
        yield "may gain privileges: allowPrivilegeEscalation is not false"
    if own.get("privileged") or own.get("procMount", "Default") != "Default":
        yield "is privileged"
    if both.get("runAsNonRoot") is not True or both.get("runAsUser") == 0:
        yield "may run as root"
    if look(both, "seccompProfile", "type") not in ("RuntimeDefault", "Localhost"):
        yield "has no seccompProfile"
    if "ALL" not in (look(own, "capabilities", "drop") or []) or look(own, "capabilities", "add"):
        yield "keeps capabilities"
    if any(port.get("hostPort") for port in container.get("ports") or []):
        yield "takes a port of its host"
    hooks = [container.get(name) or {} for name in ("livenessProbe", "readinessProbe", "startupProbe")]
    hooks += [look(container, "lifecycle", name) or {} for name in ("preStop", "postStart")]
    if any(look(hook, kind, "host") for hook in hooks for kind in ("httpGet", "tcpSocket")):
        yield "is probed on another host"


@rule
def pods_need_no_cluster(render: Render) -> Iterator[str]:
    """No pod has a token of the cluster, or the addresses of all Services as variables: MLFLOW_PORT means something else."""
    for pod in pods(render.documents):
        if pod.spec.get("automountServiceAccountToken") is not False:
            yield f"{pod} has a token: automountServiceAccountToken is not false"
        if pod.spec.get("enableServiceLinks") is not False:
            yield f"{pod} has variables of all Services: enableServiceLinks is not false"
    for account in of_kind(render.documents, "ServiceAccount"):
        if account.get("automountServiceAccountToken") is not False:
            yield f"{title(account)} gives tokens to its pods"


@rule
def roots_are_read_only(render: Render) -> Iterator[str]:
    """The root file system is read-only; /tmp is an emptyDir of a limited size."""
    for pod, container, where in each_container(render):
        if look(container, "securityContext", "readOnlyRootFilesystem") is not True:
            yield f"{where} can write to its image"
        mount, volume = pod.mounted(container, "/tmp")
        if mount.get("mountPath") != "/tmp" or mount.get("readOnly") or "emptyDir" not in volume:
            yield f"{where} cannot write to /tmp"
        elif not look(volume, "emptyDir", "sizeLimit"):
            yield f"{where} may fill its node's disk: /tmp has no sizeLimit"


# Images and commands ------------------------------------------------------------------------------------------------


@rule
def images_are_pinned(render: Render) -> Iterator[str]:
    """Images have a tag that says a version; that of ours is lmdist's own."""
    for _, container, where in each_container(render):
        tag = re.search(r":([\w.-]+)(@sha256:\w+)?$", container.get("image", ""))
        if tag is None or tag[1] == "latest":
            yield f"{where}: the image {container.get('image')} has no version"
        ours = OUR_IMAGES.fullmatch(container.get("image", ""))
        if ours and ours[2] != __version__:
            yield f"{where}: the image is of {ours[2]}, and lmdist of {__version__}"


@rule
def mlflow_is_as_new_as_its_clients(render: Render) -> Iterator[str]:
    """The server's MLflow is of the clients' major version, and not older than they are."""
    pinned = re.search(r"^mlflow==([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned, "constraints.txt has no mlflow"
    client = [int(part) for part in pinned[1].split(".")]
    for _, container, where in each_container(render):
        if found := re.search(r"/mlflow:v?([\d.]+)", container.get("image", "")):
            server = [int(part) for part in found[1].split(".")]
            if server[0] != client[0] or server < client:
                yield f"{where}: MLflow is {found[1]}, and its clients are {pinned[1]}"


@rule
def commands_exist(render: Render) -> Iterator[str]:
    """What containers and their hooks start is a command of lmdist, or one of few others."""
    ours = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"])
    for _, container, where in each_container(render):
        started = [command(container)]
        hooks = [look(container, "lifecycle", name, "exec") for name in ("preStop", "postStart")]
        probes = [look(container, name, "exec") for name in ("livenessProbe", "readinessProbe", "startupProbe")]
        started += [command(hook) for hook in [*hooks, *probes] if hook is not None]
        yield from (f"{where}: there is no command {name!r}" for name in started if name not in ours | FOREIGN_COMMANDS)


# Variables ----------------------------------------------------------------------------------------------------------


@rule
def variables_have_values(render: Render) -> Iterator[str]:
    """A variable has one value or one source, that the pod has; $(NAME) comes after NAME, and none is left in the arguments."""
    for pod, container, where in each_container(render):
        known: dict[str, str] = {}
        for entry in container.get("env") or []:
            name, source = entry["name"], entry.get("valueFrom")
            if ("value" in entry) == bool(source) or len(source or {"": ""}) != 1:
                yield f"{where}: {name} has no value, or several"
            path = look(source, "fieldRef", "fieldPath")
            if path is not None and not pod.field(path):
                yield f"{where}: {name} is taken from {path}, which the pod has not"
            if unknown := unexpanded(str(entry.get("value", "")), known):
                yield f"{where}: {name} is made of {unknown}, which nothing before it sets"
            known[name] = ""
        for text in [*(container.get("command") or []), *(container.get("args") or [])]:
            if unknown := unexpanded(str(text), known):
                yield f"{where}: nothing sets {unknown} of {text}"


def unexpanded(text: str, known: dict[str, str]) -> str:
    """The first $(NAME) that the kubelet would leave as it is."""
    left = re.search(r"(?<!\$)\$\([A-Za-z_][\w.-]*\)", expanded(text, known))
    return left[0] if left else ""


# Volumes ------------------------------------------------------------------------------------------------------------


@rule
def mounts_have_volumes(render: Render) -> Iterator[str]:
    """Every mount has a volume, every volume one source and a mount."""
    for pod in pods(render.documents):
        volumes = {volume["name"]: set(volume) - {"name"} for volume in pod.spec.get("volumes") or []}
        mounted = {mount["name"] for container in pod.containers for mount in container.get("volumeMounts") or []}
        yield from (f"{pod} mounts {name}, and has no such volume" for name in sorted(mounted - set(volumes)))
        yield from (f"{pod} has a volume {name}, and mounts it nowhere" for name in sorted(set(volumes) - mounted))
        yield from (f"{pod}: the volume {name} has {len(kinds)} sources" for name, kinds in volumes.items() if len(kinds) != 1)


@rule
def claims_can_be_shared(render: Render) -> Iterator[str]:
    """Pods that write to one claim, and may be on several nodes, have it ReadWriteMany; else they are kept on one node."""
    for pod in pods(render.documents):
        if pod.count < 2 or kept_on_one_node(pod):
            continue
        for claim in claims(pod):
            modes = look(find(render.everything, "PersistentVolumeClaim", claim) or {}, "spec", "accessModes") or []
            if "ReadWriteMany" not in modes:
                yield f"{pod}: {pod.count} pods on several nodes mount {claim}, which is {', '.join(modes)}"


@rule
def claims_can_be_written(render: Render) -> Iterator[str]:
    """A pod that is not root and mounts a claim has the claim's files in a group of its own."""
    for pod in pods(render.documents):
        if claims(pod) and not look(pod.spec, "securityContext", "fsGroup"):
            yield f"{pod} may not write to {', '.join(claims(pod))}: it has no fsGroup"


@rule
def databases_have_one_writer(render: Render) -> Iterator[str]:
    """A Deployment with a claim is one pod, and the old one goes before the new one comes."""
    for pod in pods(render.documents):
        if pod.owner["kind"] == "Deployment" and claims(pod):
            if pod.count != 1:
                yield f"{pod} has a claim and {pod.count} pods"
            if look(pod.owner, "spec", "strategy", "type") != "Recreate":
                yield f"{pod} has a claim, and its strategy is not Recreate"


def claims(pod: Pod) -> list[str]:
    """The claims that a pod mounts."""
    volumes = pod.spec.get("volumes") or []
    return [volume["persistentVolumeClaim"]["claimName"] for volume in volumes if "persistentVolumeClaim" in volume]


def kept_on_one_node(pod: Pod) -> bool:
    """Whether pods of this template must be where others of it are."""
    terms = look(pod.spec, "affinity", "podAffinity", "requiredDuringSchedulingIgnoredDuringExecution") or []
    return any(term.get("topologyKey") == HOST and selects(term.get("labelSelector"), pod.labels) for term in terms)


@rule
def spreading_selects_pods(render: Render) -> Iterator[str]:
    """Spreading is over the pods of the template itself, and nearness is to pods of lmdist."""
    for pod in pods(render.documents):
        for spread in pod.spec.get("topologySpreadConstraints") or []:
            if not selects(spread.get("labelSelector"), pod.labels):
                yield f"{pod} is spread over other pods than its own"
        near = look(pod.spec, "affinity", "podAffinity") or {}
        terms = list(near.get("requiredDuringSchedulingIgnoredDuringExecution") or [])
        terms += [entry["podAffinityTerm"] for entry in near.get("preferredDuringSchedulingIgnoredDuringExecution") or []]
        others = [other.labels for other in pods(render.everything)]
        for term in terms:
            if not any(selects(term.get("labelSelector"), labels) for labels in others):
                yield f"{pod} is to be near to pods that are not there"


# Sizes --------------------------------------------------------------------------------------------------------------


@rule
def requests_are_limits(render: Render) -> Iterator[str]:
    """Every container asks for cpu and memory, and is limited to what it asks for."""
    for _, container, where in each_container(render):
        requests, limits = look(container, "resources", "requests") or {}, look(container, "resources", "limits") or {}
        for name in sorted({"cpu", "memory", *requests, *limits}):
            if name not in requests or name not in limits:
                yield f"{where} has no request and limit of {name}"
            elif amount(requests[name]) != amount(limits[name]):
                yield f"{where} asks for {requests[name]} of {name} and is limited to {limits[name]}"


@rule
def gpus_can_be_had(render: Render) -> Iterator[str]:
    """GPUs are whole, and pods that ask for them tolerate the taint of their nodes."""
    for pod, container, where in each_container(render):
        asked = look(container, "resources", "limits", GPU)
        if asked is None:
            continue
        if not re.fullmatch(r"[1-9]\d*", str(asked)):
            yield f"{where} asks for {asked} GPUs"
        fitting = [entry for entry in pod.spec.get("tolerations") or [] if entry.get("key") in (GPU, None)]
        if not any(entry.get("operator") == "Exists" and entry.get("effect") in ("NoSchedule", None) for entry in fitting):
            yield f"{where} asks for GPUs, and the pod does not tolerate the taint of their nodes"


@rule
def memory_volumes_fit(render: Render) -> Iterator[str]:
    """What may lie in memory has a limit, and leaves at least half of the container's memory."""
    for pod, container, where in each_container(render):
        taken = 0.0
        for mount in container.get("volumeMounts") or []:
            empty = pod.volume(mount["name"]).get("emptyDir") or {}
            if empty.get("medium") == "Memory":
                if "sizeLimit" not in empty:
                    yield f"{where}: {mount['name']} in memory has no sizeLimit"
                taken += amount(empty.get("sizeLimit", 0))
        memory = amount(look(container, "resources", "limits", "memory") or 0)
        if taken > memory / 2:
            yield f"{where}: its volumes may take {taken / 2**30:g} of its {memory / 2**30:g} GiB of memory"


@rule
def work_folders_are_mounted(render: Render) -> Iterator[str]:
    """A container's working directory is one that it can write to."""
    for pod, container, where in each_container(render):
        folder = container.get("workingDir")
        mount, volume = pod.mounted(container, folder or "")
        if folder and (
            mount.get("readOnly") or "persistentVolumeClaim" not in volume or not inside(folder, mount["mountPath"])
        ):
            yield f"{where} works in {folder}, to which it cannot write"


# Probes -------------------------------------------------------------------------------------------------------------


@rule
def probes_reach_a_port(render: Render) -> Iterator[str]:
    """Probes name a port of their container, and a path from the root; what serves has all three."""
    for pod, container, where in each_container(render):
        names = {port.get("name") for port in container.get("ports") or []}
        there = {name: container[name] for name in ("startupProbe", "readinessProbe", "livenessProbe") if name in container}
        if pod.owner["kind"] == "Deployment" and len(there) < 3:
            yield f"{where} has {len(there)} probes of 3"
        for name, probe in there.items():
            for kind in ("httpGet", "tcpSocket", "grpc"):
                if kind in probe and probe[kind].get("port") not in names:
                    yield f"{where}: its {name} asks port {probe[kind].get('port')}, which it has not"
            if "httpGet" in probe and not probe["httpGet"].get("path", "").startswith("/"):
                yield f"{where}: its {name} asks for no path from the root"
            if name != "readinessProbe" and probe.get("successThreshold", 1) != 1:
                yield f"{where}: its {name} may succeed once only"


@rule
def probes_are_patient(render: Render) -> Iterator[str]:
    """A start may take a minute, and a pod is taken out of the Service before it is killed."""
    for _, container, where in each_container(render):
        start, ready, live = (container.get(name) for name in ("startupProbe", "readinessProbe", "livenessProbe"))
        if start is not None and time_to_fail(start) < 60:
            yield f"{where} has {time_to_fail(start)} s to start"
        if ready is not None and live is not None and time_to_fail(live) <= time_to_fail(ready):
            yield f"{where} is killed after {time_to_fail(live)} s without an answer, and unready after {time_to_fail(ready)} s"


def time_to_fail(probe: Document) -> int:
    """Seconds until a probe that always fails counts."""
    return probe.get("initialDelaySeconds", 0) + probe.get("periodSeconds", 10) * probe.get("failureThreshold", 3)


@rule
def hooks_end_in_time(render: Render) -> Iterator[str]:
    """What a pod waits before it is asked to end leaves at least as long for the end itself."""
    for pod, container, where in each_container(render):
        words = look(container, "lifecycle", "preStop", "exec", "command") or []
        seconds = look(container, "lifecycle", "preStop", "sleep", "seconds")
        seconds = seconds if seconds is not None else float(words[1]) if words[:1] == ["sleep"] else 0
        grace = pod.spec.get("terminationGracePeriodSeconds", 30)
        if grace < 2 * seconds:
            yield f"{where} waits {seconds:g} s of {grace} before it ends"

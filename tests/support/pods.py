"""A pod of a rendered manifest as the kubelet reads it: command, environment, volumes, user and names. cluster.py starts it.

Every field of a pod is read, stands in IGNORED with a reason, or is an error: a manifest says nothing that the tests overlook.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.manifest_fields import missing
from support.manifests import Document, amount, environment, expanded, find, look

IGNORED: Mapping[str, Mapping[str, str]] = {
    "pod": {
        **dict.fromkeys(("affinity", "tolerations", "topologySpreadConstraints"), "all pods run on this machine"),
        "serviceAccountName": "there is no API server, and no token is mounted",
        "imagePullSecrets": "no image is pulled",
    },
    "container": {
        "image": "Python, lmdist and mlflow of the tests replace it, in a read-only root",
        "resources": "nothing here assigns GPUs, or limits a process to its share of memory",
    },
    "probe": dict.fromkeys(
        ("periodSeconds", "timeoutSeconds", "failureThreshold", "successThreshold", "initialDelaySeconds"),
        "a test waits for the answer of a probe as long as it likes",
    ),
    "pod's securityContext": {
        "seccompProfile": "it forbids calls that a container without privileges does not make",
        "fsGroupChangePolicy": "a claim gets its group each time",
    },
}
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")


def read(where: str, given: Document, names: str = "", **fixed: Sequence[Any]) -> Document:
    """Return an object of a manifest once it is known that nothing in it is overlooked.

    `names` are the fields that are read; each of `fixed` has one of its values, None where it may be absent.
    """
    unknown = set(given) - {*names.split(), *fixed, *IGNORED.get(where, {})}
    wrong = {name: given.get(name) for name, allowed in fixed.items() if given.get(name) not in allowed}
    if unknown or wrong:
        raise NotImplementedError(f"{where}: nothing here implements { ({name: given[name] for name in unknown} | wrong) }")
    return given


@dataclass(frozen=True)
class Container:
    """What is needed to run a pod of one container."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    """What the manifest adds to the image's."""
    folder: str
    user: int
    group: int
    grace_seconds: float
    hostname: str
    subdomain: str
    mounts: Mapping[str, Path]
    """Folders of this machine by their place in the pod."""
    read_only: Mapping[str, Path]
    empty: Mapping[str, int]
    """The bytes of each empty folder in memory."""
    ports: Mapping[str, int] = field(default_factory=dict)
    health: Mapping[str, str] = field(default_factory=dict)
    """The path that each probe requests."""
    port: int = 0
    """The port of the probes."""
    before_stop: Sequence[str] = ()
    """A command that runs in the pod before it gets SIGTERM."""


def read_pod(
    spec: Document, metadata: Document, hostname: str, objects: list[Document], claims: Path, scratch: Path
) -> Container:
    """Return the one container of a pod; `claims` is the folder of the claims, `scratch` one for files of other volumes."""
    if faults := list(missing(spec, objects)):
        raise LookupError(f"the pod would wait: {faults}")
    read("pod", spec, "containers volumes securityContext terminationGracePeriodSeconds subdomain", **FIXED_OF_PODS)
    rights = read("pod's securityContext", spec["securityContext"], "runAsUser runAsGroup fsGroup", runAsNonRoot=[True])
    assert rights["runAsUser"] != 0, "the kubelet does not run this as root"
    (container,) = spec["containers"]
    read(
        "container",
        container,
        f"name command args env workingDir volumeMounts securityContext ports lifecycle {' '.join(PROBES)}",
    )
    read("container's securityContext", container["securityContext"], **FIXED_OF_CONTAINERS)
    volumes = {
        volume["name"]: read_volume(volume, rights.get("fsGroup", -1), objects, claims, scratch)
        for volume in spec.get("volumes", [])
    }
    mounts = [read("volumeMount", mount, "name mountPath readOnly") for mount in container.get("volumeMounts", [])]
    sources = {mount["mountPath"]: volumes[mount["name"]] for mount in mounts}
    protected = {mount["mountPath"] for mount in mounts if mount.get("readOnly")}
    folders = {place: source for place, source in sources.items() if isinstance(source, Path)}
    variables = environment(container, metadata, objects)
    ports = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
    requests = {
        name: read("httpGet", read("probe", container[name], "httpGet")["httpGet"], "path port")
        for name in PROBES
        if name in container
    }
    (port,) = {ports[request["port"]] for request in requests.values()} or {0}
    lifecycle = read("preStop", read("lifecycle", container.get("lifecycle", {}), "preStop").get("preStop", {}), "exec")
    return Container(
        name=container["name"],
        command=[expanded(word, variables) for word in [*container["command"], *container.get("args", [])]],
        environment=variables,
        folder=container.get("workingDir", "/"),
        user=rights["runAsUser"],
        group=rights["runAsGroup"],
        grace_seconds=spec.get("terminationGracePeriodSeconds", 30),
        hostname=hostname,
        subdomain=spec.get("subdomain", ""),
        mounts={place: source for place, source in folders.items() if place not in protected},
        read_only={place: source for place, source in folders.items() if place in protected},
        empty={place: source for place, source in sources.items() if isinstance(source, int)},
        ports=ports,
        health={name: request["path"] for name, request in requests.items()},
        port=port,
        before_stop=look(lifecycle, "exec", "command") or (),
    )


FIXED_OF_PODS = {
    "automountServiceAccountToken": [False],
    "enableServiceLinks": [False],  # otherwise the environment would name each Service of the namespace
    "restartPolicy": ["Never", "Always", None],
}
FIXED_OF_CONTAINERS = {
    "allowPrivilegeEscalation": [False],
    "readOnlyRootFilesystem": [True],
    "capabilities": [{"drop": ["ALL"]}],
}


def read_volume(volume: Document, group: int, objects: list[Document], claims: Path, scratch: Path) -> Path | int:
    """Return the folder of a volume, or the size of an empty one."""
    ((kind, source),) = ((key, value) for key, value in volume.items() if key != "name")
    folder = scratch / volume["name"]
    if kind == "emptyDir":  # in memory whatever its medium: it is as empty, and as full at its limit
        return round(amount(read(kind, source, "sizeLimit", medium=["Memory", None])["sizeLimit"]))
    if kind == "persistentVolumeClaim":
        folder = claims / read(kind, source, "claimName")["claimName"]
        folder.mkdir(parents=True, exist_ok=True)
        give_to_group(folder, group)
        return folder
    names = {"configMap": ("ConfigMap", "name"), "secret": ("Secret", "secretName")}
    if kind not in names:
        raise NotImplementedError(f"a volume of the kind {kind}")
    read(kind, source, f"{names[kind][1]} optional")
    entries = look(find(objects, names[kind][0], source[names[kind][1]]), "data") or {}
    folder.mkdir(parents=True)
    for key, text in entries.items():
        (folder / key).write_bytes(base64.b64decode(text) if kind == "secret" else text.encode())
        (folder / key).chmod(0o644)
    return folder


def give_to_group(folder: Path, group: int) -> None:
    """Do what fsGroup does: all files of a volume belong to the group, which may write to them and to later ones."""
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            os.chown(path, -1, group)
            path.chmod(path.stat().st_mode | (0o2770 if path.is_dir() else 0o660))

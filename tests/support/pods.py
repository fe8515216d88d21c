"""What a pod of a rendered manifest is: its command, environment, volumes, rights and names, as the kubelet reads a template.

Every field of a pod is read, stands in IGNORED with a reason, or is an error: a manifest cannot say anything that the tests
do not hear. This module starts nothing; cluster.py does.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from support.manifests import Document, amount, expanded

REQUIRED = object()
IGNORED: Mapping[str, Mapping[str, str]] = {
    "pod": {
        "affinity": "all pods run on this machine",
        "tolerations": "all pods run on this machine",
        "topologySpreadConstraints": "all pods run on this machine",
        "serviceAccountName": "there is no API server to ask anything of, and no token is mounted",
    },
    "container": {
        "image": "Python, lmdist and mlflow of the tests stand for it, in a read-only root",
        "resources": "nothing here hands out GPUs, or holds a process to its share of memory",
    },
    "probe": dict.fromkeys(
        ("periodSeconds", "timeoutSeconds", "failureThreshold", "successThreshold", "initialDelaySeconds"),
        "a test waits for a probe's answer as long as it likes",
    ),
    "pod's securityContext": {
        "seccompProfile": "it forbids calls that no container makes which has no privilege",
        "fsGroupChangePolicy": "a claim is given to its group each time",
    },
}


class Fields:
    """An object of a manifest, of which every field must be taken before its context ends."""

    def __init__(self, where: str, given: Mapping[str, Any]) -> None:
        self.where = where
        self.left = {name: value for name, value in given.items() if name not in IGNORED.get(where, {})}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None and self.left:
            raise NotImplementedError(f"{self.where}: nobody here knows what {self.left} means")

    def take(self, name: str, otherwise: Any = REQUIRED) -> Any:
        """A field's value, or `otherwise` where it is not given."""
        if otherwise is REQUIRED and name not in self.left:
            raise LookupError(f"{self.where}: {name} is missing; there are {sorted(self.left)}")
        return self.left.pop(name, otherwise)

    def expect(self, name: str, *values: Any) -> None:
        """Take a field that must have one of these values; None among them: or be absent."""
        value = self.take(name, None)
        if value not in values:
            raise NotImplementedError(f"{self.where}: {name} is {value}, and only {values} can be had here")


@dataclass(frozen=True)
class Probe:
    """Where a container says that it is well."""

    path: str
    port: int


@dataclass(frozen=True)
class Volume:
    """What is mounted somewhere in a pod: a folder of this machine, or an empty one in memory of so many bytes."""

    source: Path | int
    read_only: bool


@dataclass(frozen=True)
class Container:
    """All that is needed to run a pod of one container."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    """What the manifest adds to the image's."""
    folder: str
    user: int
    group: int
    mounts: Mapping[str, Volume]
    grace_seconds: float
    hostname: str
    subdomain: str
    ports: Mapping[str, int] = field(default_factory=dict)
    probes: Mapping[str, Probe] = field(default_factory=dict)
    before_stop: Sequence[str] = ()
    """A command that runs in the pod before it gets SIGTERM."""


@dataclass(frozen=True)
class Namespace:
    """Where a pod finds what its template only names: ConfigMaps, Secrets and the folders that stand for claims."""

    objects: Mapping[tuple[str, str], Document]
    """By kind and name."""
    claims: Path

    def data(self, kind: str, name: str, *, optional: bool) -> dict[str, bytes] | None:
        """The entries of a ConfigMap or a Secret; None for an optional one that is not there."""
        if (kind, name) not in self.objects:
            if optional:
                return None
            raise LookupError(f"there is no {kind} {name}: the pod would wait for it")
        read = base64.b64decode if kind == "Secret" else str.encode
        return {key: read(value) for key, value in self.objects[kind, name]["data"].items()}


def read_pod(template: Document, metadata: Document, hostname: str, namespace: Namespace, scratch: Path) -> Container:
    """The one container of a pod that has this metadata; files that its volumes need are written into `scratch`."""
    with Fields("pod", template) as pod:
        pod.expect("automountServiceAccountToken", False)
        pod.expect("enableServiceLinks", False)  # else each Service of the namespace would be in the environment
        pod.expect("restartPolicy", "Never", "Always", None)
        (container,) = pod.take("containers")
        with Fields("pod's securityContext", pod.take("securityContext")) as rights:
            user, group = rights.take("runAsUser"), rights.take("runAsGroup")
            owner = rights.take("fsGroup")
            assert user != 0 or not rights.take("runAsNonRoot"), "the kubelet refuses to run this as root"
            rights.expect("runAsNonRoot", True, None)
        volumes = {volume["name"]: read_volume(volume, owner, namespace, scratch) for volume in pod.take("volumes", [])}
        grace, subdomain = pod.take("terminationGracePeriodSeconds", 30), pod.take("subdomain", "")
    with Fields("container", container) as given:
        with Fields("container's securityContext", given.take("securityContext")) as rights:
            rights.expect("allowPrivilegeEscalation", False)
            rights.expect("readOnlyRootFilesystem", True)
            rights.expect("capabilities", {"drop": ["ALL"]})
        ports = {port["name"]: port["containerPort"] for port in given.take("ports", [])}
        probes = [name for name in given.left if name.endswith("Probe")]
        environment = read_environment(given.take("env", []), metadata, namespace)
        command = [*given.take("command"), *given.take("args", [])]
        return Container(
            name=given.take("name"),
            command=[expanded(word, environment) for word in command],
            environment=environment,
            folder=given.take("workingDir", "/"),
            user=user,
            group=group,
            mounts={mount["mountPath"]: read_mount(mount, volumes) for mount in given.take("volumeMounts", [])},
            grace_seconds=grace,
            hostname=hostname,
            subdomain=subdomain,
            ports=ports,
            probes={name: read_probe(given.take(name), ports) for name in probes},
            before_stop=read_lifecycle(given.take("lifecycle", {})),
        )


def read_environment(given: Sequence[Document], metadata: Document, namespace: Namespace) -> dict[str, str]:
    """The variables of a container, each of which may mention those before it."""
    made: dict[str, str] = {}
    for entry in given:
        with Fields("env", entry) as variable:
            name, value = variable.take("name"), variable.take("value", None)
            source = variable.take("valueFrom", None)
        if source is None:
            made[name] = expanded(value or "", made)
            continue
        with Fields("valueFrom", source) as origin:
            if "fieldRef" in origin.left:
                made[name] = read_field(origin.take("fieldRef"), metadata)
            else:
                kind = "ConfigMap" if "configMapKeyRef" in origin.left else "Secret"
                with Fields("keyRef", origin.take("configMapKeyRef" if kind == "ConfigMap" else "secretKeyRef")) as key:
                    optional, entry_name = key.take("optional", False), key.take("key")
                    entries = namespace.data(kind, key.take("name"), optional=optional)
                if entries is not None and (entry_name in entries or not optional):
                    made[name] = entries[entry_name].decode()
    return made


def read_field(given: Document, metadata: Document) -> str:
    """A field of the pod itself: its name, its namespace, a label or an annotation."""
    with Fields("fieldRef", given) as field_reference:
        path = field_reference.take("fieldPath")
        field_reference.expect("apiVersion", "v1", None)
    found = re.fullmatch(r"metadata\.(name|namespace)|metadata\.(labels|annotations)\['([^']+)'\]", path)
    if not found:
        raise NotImplementedError(f"fieldRef {path}")
    return metadata[found[1]] if found[1] else metadata[found[2]].get(found[3], "")


def read_volume(given: Document, owner: int, namespace: Namespace, scratch: Path) -> Path | int:
    """A folder that stands for a volume, or the size of one in memory."""
    with Fields("volume", given) as volume:
        folder = scratch / volume.take("name")
        ((kind, source),) = volume.left.items()
        volume.take(kind)
    with Fields(kind, source or {}) as of:
        if kind == "emptyDir":  # in memory whatever its medium: it is as empty, and as full at its limit
            of.expect("medium", "Memory", None)
            return round(amount(of.take("sizeLimit")))
        if kind == "persistentVolumeClaim":
            claim = of.take("claimName")
            assert ("PersistentVolumeClaim", claim) in namespace.objects, (
                f"there is no claim {claim}: the pod would wait for it"
            )
            folder = namespace.claims / claim
            folder.mkdir(parents=True, exist_ok=True)
            give_to_group(folder, owner)
            return folder
        if kind in ("configMap", "secret"):
            name = of.take("name" if kind == "configMap" else "secretName")
            entries = namespace.data(
                "ConfigMap" if kind == "configMap" else "Secret", name, optional=of.take("optional", False)
            )
            folder.mkdir(parents=True)
            for key, content in (entries or {}).items():
                (folder / key).write_bytes(content)
                (folder / key).chmod(0o644)
            return folder
    raise NotImplementedError(f"a volume of the kind {kind}")


def give_to_group(folder: Path, group: int) -> None:
    """What fsGroup does: all that is in a volume belongs to the group, which may write it and whatever comes later."""
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            os.chown(path, -1, group)
            path.chmod(path.stat().st_mode | (0o2770 if path.is_dir() else 0o660))


def read_mount(given: Document, volumes: Mapping[str, Path | int]) -> Volume:
    """What is mounted at a container's mount path."""
    with Fields("volumeMount", given) as mount:
        mount.take("mountPath")
        return Volume(volumes[mount.take("name")], mount.take("readOnly", False))


def read_probe(given: Document, ports: Mapping[str, int]) -> Probe:
    """Where a probe asks."""
    with Fields("probe", given) as probe, Fields("httpGet", probe.take("httpGet")) as request:
        port = request.take("port")
        return Probe(request.take("path"), ports[port] if isinstance(port, str) else port)


def read_lifecycle(given: Document) -> Sequence[str]:
    """The command to run before a pod is asked to stop."""
    with Fields("lifecycle", given) as lifecycle, Fields("preStop", lifecycle.take("preStop", {})) as hook:
        return hook.take("exec", {"command": []})["command"]

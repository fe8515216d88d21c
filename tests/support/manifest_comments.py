"""The comments that the files of k8s/ open with: commands that apply, check, log and clean, and what they name exists."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from support.manifests import K8S, OVERLAYS, ROOT, Document, namespace, pods, rendered

LINES = ("Apply", "Check", "Logs", "Clean")
KINDS = {"pvc": "PersistentVolumeClaim", "hpa": "HorizontalPodAutoscaler"} | {
    kind.lower(): kind
    for kind in (
        *("Job", "Pod", "ConfigMap", "Service", "ServiceAccount", "NetworkPolicy", "Deployment", "Namespace"),
        *("PodDisruptionBudget", "JobSet", "TrainJob", "TrainingRuntime", "ClusterQueue", "LocalQueue", "ResourceFlavor"),
    )
}
"""Kinds as kubectl names them."""
VALUED = {"-n", "-l", "-o", "--for", "--timeout", "--sort-by", "--field-selector"}
"""Options of kubectl whose value is the next word, or follows an equals sign."""


def yaml_files() -> list[Path]:
    """Return every YAML file of k8s/."""
    return sorted([*K8S.rglob("*.yaml"), *K8S.rglob("*.yml")])


def comment_faults(path: Path, text: str) -> Iterator[str]:
    """Yield the lines that a file's comment lacks, and the files and objects in its commands that do not exist."""
    comment = re.findall(r"^#[ ]?(.*)$", re.match(r"(#.*\n)*", text)[0], re.MULTILINE)  # pyright: ignore[reportOptionalSubscript]
    yield from (f"no line {name}" for name in LINES if not any(re.match(rf"{name}: *\S", line) for line in comment))
    overlay = path.parent.name
    everything = [*namespace(), *(rendered(overlay).everything if overlay in OVERLAYS else [])]
    for line in comment:
        for call in re.findall(r"\bkubectl ([^;)]*)", re.sub(r" {2,}\(.*|, then .*", "", line)):
            yield from (f"{line!r}: {fault}" for fault in command_faults(shlex.split(call.replace('"', "")), everything))


def command_faults(words: list[str], everything: list[Document]) -> Iterator[str]:
    """Yield the namespaces, files, objects and labels in a kubectl command that do not exist, and logs of several pods."""
    templates = list(pods(everything))
    found = {(document["kind"], document["metadata"]["name"]) for document in everything}
    found |= {(kind, name) for pod in templates for kind, name in (("Job", pod.job_name), ("JobSet", pod.set_name))}
    found |= {("Pod", f"{pod.hostname(index)}-XXXXX") for pod in templates for index in range(pod.count)}
    words = words[: words.index("--")] if "--" in words else words
    options = {word: words[at + 1] for at, word in enumerate(words[:-1]) if word in VALUED}
    values = {at + 1 for at, word in enumerate(words) if word in VALUED}
    plain = [word for at, word in enumerate(words) if at not in values and not word.startswith("-")]

    if "-n" in options and ("Namespace", options["-n"]) not in found:
        yield f"there is no namespace {options['-n']}"
    yield from (f"there is no {word}" for word in plain if word.startswith("k8s/") and not (ROOT / word).exists())
    named = [tuple(word.split("/", 1)) for word in plain if word.partition("/")[0] in KINDS and "/" in word]
    if plain[0] in ("get", "describe", "delete") and len(plain) > 2 and "/" not in plain[1]:
        named += [(kind, name) for kind in plain[1].split(",") for name in plain[2:]]
    elif plain[0] == "exec" and "/" not in plain[1]:
        named.append(("pod", plain[1]))
    for kind, name in named:
        if (KINDS.get(kind), name) not in found:
            yield f"there is no {kind} {name}" if kind in KINDS else f"{kind} is not a kind"

    wanted = dict(pair.split("=", 1) for pair in options.get("-l", "").split(",") if pair)
    labels = [pod.metadata_of(index)["labels"] for pod in templates for index in range(pod.count)]
    matching = sum(wanted.items() <= held.items() for held in labels)
    if wanted and not matching and {"logs", "pods"} & {*words}:
        yield f"no pod has the labels {wanted}"
    if "logs" in words:
        job_pods = [pod.count for pod in templates if ("job", pod.job_name) in named]
        if (wanted and matching > 1) or (not wanted and max(job_pods, default=1) > 1):
            yield "kubectl prints the log of any of several pods"

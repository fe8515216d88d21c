"""Rules: the shape of each document, by the schemas of Kubernetes and the models of Kubeflow's Trainer.

The schemas know the kinds of Kubernetes itself; a kind that they do not know is a fault, unless another rule checks it. The
models of JobSet and TrainJob drop what they do not know in silence: a document must come out of them as it went in. Kueue has
neither: the fields that we use are written down here.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator

import kubernetes_validate
import kubernetes_validate.utils
from kubeflow_trainer_api import models
from pydantic import ValidationError

from support.manifests import Document, Render, job_sets, look, of_kind, rule, title

VERSIONS = ["1.29", "1.31", "1.34", kubernetes_validate.latest_version()]
"""Of Kubernetes: the oldest that we support, two on the way, the newest that has schemas."""
MODELS = {
    "JobSet": ("jobset.x-k8s.io/v1alpha2", models.JobsetV1alpha2JobSet),
    "TrainJob": ("trainer.kubeflow.org/v1alpha1", models.TrainerV1alpha1TrainJob),
    "TrainingRuntime": ("trainer.kubeflow.org/v1alpha1", models.TrainerV1alpha1TrainingRuntime),
}
KUEUE = {
    "ResourceFlavor": {"nodeLabels", "nodeTaints", "tolerations", "topologyName"},
    "LocalQueue": {"clusterQueue", "stopPolicy", "fairSharing"},
    "ClusterQueue": {"resourceGroups", "cohortName", "namespaceSelector", "preemption", "queueingStrategy", "stopPolicy"},
}
"""The fields of a specification in kueue.x-k8s.io/v1beta2, as far as they concern us."""
PREEMPTION = {"Never", "LowerPriority", "LowerOrNewerEqualPriority"}

# It reads a megabyte of definitions for each document.
kubernetes_validate.utils.schema_contents = functools.cache(kubernetes_validate.utils.schema_contents)

RULE_NAME = re.compile(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?")  # JobSet's webhook has it so
ACTIONS = {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"}
FINAL_REASONS = {"PodFailurePolicy", "DeadlineExceeded"}
REASONS = FINAL_REASONS | {"BackoffLimitExceeded", "FailedIndexes", "MaxFailedIndexesExceeded"}


@rule
def kubernetes_schemas(render: Render) -> Iterator[str]:
    """Each document, and the Job in a JobSet or TrainingRuntime, fits the strict schemas of all versions."""
    for document in render.documents:
        if document["kind"] not in MODELS and document["kind"] not in KUEUE:
            yield from schema_faults(document)
    for owner, specification in job_sets(render.documents):
        for replicated in specification.get("replicatedJobs") or []:
            template = replicated.get("template") or {}
            metadata = {**(template.get("metadata") or {}), "name": f"{owner['metadata']['name']}-in-{owner['kind'].lower()}"}
            yield from schema_faults({"apiVersion": "batch/v1", "kind": "Job", **template, "metadata": metadata})


def schema_faults(document: Document) -> Iterator[str]:
    """What the schemas say of a document."""
    text = json.dumps(document, sort_keys=True)
    for version in VERSIONS:
        if fault := schema_fault(text, version):
            yield f"{title(document)}, Kubernetes {version}: {fault}"


@functools.cache
def schema_fault(text: str, version: str) -> str:
    """What the schemas of one version say of a document in JSON; nothing where it fits."""
    try:
        kubernetes_validate.validate(json.loads(text), version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"{'.'.join(map(str, error.path))}: {error.message}"
    except kubernetes_validate.SchemaNotFoundError as error:  # the command line warns of it, and goes on
        return error.message
    return ""


@rule
def trainer_models(render: Render) -> Iterator[str]:
    """JobSet, TrainJob and TrainingRuntime go through Kubeflow's models and come out as they went in."""
    for document in of_kind(render.documents, *MODELS):
        version, model = MODELS[document["kind"]]
        if document["apiVersion"] != version:
            yield f"{title(document)} is of {document['apiVersion']}, not {version}"
            continue
        try:
            again = model.from_dict(document)
        except ValidationError as error:
            yield f"{title(document)}: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}"
            continue
        assert again is not None
        yield from (f"{title(document)}: {place}" for place in differences(document, again.to_dict()))


def differences(before: object, after: object, place: str = "") -> Iterator[str]:
    """Where two values differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted({*before, *after}):
            if key not in after:
                yield f"the model knows no {place}{key}"
            elif key not in before:
                yield f"{place}{key} has to be there"
            else:
                yield from differences(before[key], after[key], f"{place}{key}.")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, pair in enumerate(zip(before, after, strict=True)):
            yield from differences(*pair, f"{place}{index}.")
    elif before != after:
        yield f"{place.rstrip('.')} is {before!r}, and {after!r} to the model"


@rule
def job_set_failures(render: Render) -> Iterator[str]:
    """A JobSet's failure rules are ones that it admits, and it does not start again what has failed for good."""
    for owner, specification in job_sets(render.documents):
        policy = specification.get("failurePolicy") or {}
        if "maxRestarts" not in policy:
            yield f"{title(owner)} has no failurePolicy.maxRestarts: no failure would be tried again"
        final: set[str] = set()
        for entry in policy.get("rules") or []:
            if not RULE_NAME.fullmatch(entry.get("name", "")):
                yield f"{title(owner)}: the failure rule {entry.get('name')!r} is not named as {RULE_NAME.pattern} asks"
            if entry.get("action") not in ACTIONS:
                yield f"{title(owner)}: a failure rule's action is {entry.get('action')}"
            if unknown := set(entry.get("onJobFailureReasons") or []) - REASONS:
                yield f"{title(owner)}: no job fails for {', '.join(sorted(unknown))}"
            final |= set(entry.get("onJobFailureReasons") or []) if entry.get("action") == "FailJobSet" else set()
        if FINAL_REASONS - final:
            yield f"{title(owner)} starts anew after {', '.join(sorted(FINAL_REASONS - final))}"


@rule
def kueue_fields(render: Render) -> Iterator[str]:
    """Kueue's kinds are of v1beta2 and say nothing that it does not know."""
    for document in of_kind(render.documents, *KUEUE):
        if document["apiVersion"] != "kueue.x-k8s.io/v1beta2":
            yield f"{title(document)} is of {document['apiVersion']}"
        if unknown := set(document.get("spec") or {}) - KUEUE[document["kind"]]:
            yield f"{title(document)}: Kueue knows no {', '.join(sorted(unknown))}"
        preemption = look(document, "spec", "preemption", "withinClusterQueue")
        if preemption is not None and preemption not in PREEMPTION:
            yield f"{title(document)}: withinClusterQueue is {preemption}, not one of {', '.join(sorted(PREEMPTION))}"

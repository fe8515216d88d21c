"""Rules: what the validators of others find: the schemas of Kubernetes, Kubeflow's models of JobSet and TrainJob, yamllint.

Kubeflow's models drop unknown fields without an error: a document must leave them as it entered. Kueue publishes neither
schemas nor models: its kinds have rows in manifest_fields.py.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator

import kubernetes_validate
import kubernetes_validate.utils
from kubeflow_trainer_api import models
from pydantic import ValidationError
from yamllint import linter
from yamllint.config import YamlLintConfig

from support.manifests import ROOT, Render, job_sets, of_kind, rule, title

VERSIONS = ["1.29", "1.31", "1.34", kubernetes_validate.latest_version()]
"""Of Kubernetes: the oldest supported one, two between, the newest that has schemas."""
MODELS = {
    "JobSet": ("jobset.x-k8s.io/v1alpha2", models.JobsetV1alpha2JobSet),
    "TrainJob": ("trainer.kubeflow.org/v1alpha1", models.TrainerV1alpha1TrainJob),
    "TrainingRuntime": ("trainer.kubeflow.org/v1alpha1", models.TrainerV1alpha1TrainingRuntime),
}
KUEUE = ("ResourceFlavor", "LocalQueue", "ClusterQueue")

# It reads a megabyte of definitions for each document.
kubernetes_validate.utils.schema_contents = functools.cache(kubernetes_validate.utils.schema_contents)


@rule
def kubernetes_schemas(render: Render) -> Iterator[str]:
    """Each document, and the Job in a JobSet or TrainingRuntime, fits the strict schemas of all versions."""
    checked = [document for document in render.documents if document["kind"] not in (*MODELS, *KUEUE)]
    for owner, specification in job_sets(render.documents):
        for replicated in specification.get("replicatedJobs") or []:
            template = replicated.get("template") or {}
            metadata = {**(template.get("metadata") or {}), "name": f"{owner['metadata']['name']}-in-{owner['kind'].lower()}"}
            checked.append({"apiVersion": "batch/v1", "kind": "Job", **template, "metadata": metadata})
    for document in checked:
        text = json.dumps(document, sort_keys=True)
        found = {version: schema_fault(text, version) for version in VERSIONS}
        yield from (f"{title(document)}, Kubernetes {version}: {fault}" for version, fault in found.items() if fault)


@functools.cache
def schema_fault(text: str, version: str) -> str:
    """Return the error of one version's schema for a document in JSON; empty where it fits."""
    try:
        kubernetes_validate.validate(json.loads(text), version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"{'.'.join(map(str, error.path))}: {error.message}"
    except kubernetes_validate.SchemaNotFoundError as error:  # its command line warns, and continues
        return error.message
    return ""


@rule
def trainer_models(render: Render) -> Iterator[str]:
    """JobSet, TrainJob and TrainingRuntime leave Kubeflow's models as they entered."""
    for document in of_kind(render.documents, *MODELS):
        version, model = MODELS[document["kind"]]
        if document["apiVersion"] != version:
            yield f"{title(document)} is of {document['apiVersion']}, expected {version}"
            continue
        try:
            parsed = model.from_dict(document)
        except ValidationError as error:
            yield f"{title(document)}: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}"
            continue
        assert parsed is not None
        before, after = leaves(document), leaves(parsed.to_dict())
        yield from (f"{title(document)}: the model changes {' '.join(place)}" for place, _ in sorted(before ^ after))


def leaves(value: object, place: tuple[str, ...] = ()) -> set[tuple[tuple[str, ...], str]]:
    """Return every scalar and empty container below a value, with the keys that lead to it."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = {leaf for key, below in inner for leaf in leaves(below, (*place, str(key)))}
    return found or {(place, repr(value))}


def lint_faults(text: str) -> list[str]:
    """Return what yamllint finds in a file."""
    settings = YamlLintConfig(file=str(ROOT / ".yamllint"))
    return [f"line {problem.line}: {problem.desc}" for problem in linter.run(text, settings)]

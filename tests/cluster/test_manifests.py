"""The manifests of k8s/ without a cluster: rendered, checked by schemas and by rules, which are checked by wrong changes."""

from __future__ import annotations

import shutil
import tomllib
from collections import Counter
from pathlib import Path

import pytest
import yaml

from support import manifest_fields, manifest_jobs, manifest_network, manifest_schemas
from support.manifest_comments import comment_faults, yaml_files
from support.manifest_mutations import Change, read
from support.manifest_schemas import lint_faults
from support.manifests import K8S, KUBECTL, OVERLAYS, ROOT, RULES, Render, documents, faults, namespace, rendered, required

RULE_MODULES = [manifest_schemas, manifest_fields, manifest_jobs, manifest_network]
"""Importing a module of rules registers them."""
CHANGES = read()
FILE_CHANGES = [change for change in CHANGES if change.rule in ("comments", "yamllint")]
MANIFEST_CHANGES = [change for change in CHANGES if change not in FILE_CHANGES]

needs_kubectl = pytest.mark.skipif(KUBECTL is None, reason="kubectl, whose kustomize renders the manifests, is missing")


@needs_kubectl
@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_breaks_no_rule(name: str) -> None:
    assert faults(rendered(name)) == []


@needs_kubectl
@pytest.mark.parametrize("change", MANIFEST_CHANGES, ids=str)
def test_a_rule_finds_its_wrong_changes(change: Change) -> None:
    assert faults(change.render(), [change.rule])


@needs_kubectl
def test_the_namespace_has_to_enforce_the_standard() -> None:
    render = rendered("base")
    render.required[0]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] = "baseline"
    (fault,) = faults(render)
    assert fault.startswith("namespaces_agree: the namespace lmdist")
    assert fault.endswith("does not enforce the Pod Security Standard restricted")


def test_every_rule_has_a_wrong_change() -> None:
    assert set(RULES) == {change.rule for change in MANIFEST_CHANGES}
    assert [change for change, times in Counter(map(str, CHANGES)).items() if times > 1] == []


# What users build on the overlays -----------------------------------------------------------------------------------


def derived(folder: Path, overlay: str, lines: dict[str, object]) -> list[dict[str, object]]:
    """Return the documents of a new overlay on top of one, in a copy of k8s/."""
    k8s = folder / "k8s"
    if not k8s.exists():
        shutil.copytree(K8S, k8s)
    (k8s / "overlays" / f"own-{overlay}").mkdir()
    below = "../../base" if overlay == "base" else f"../{overlay}"
    kustomization = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "resources": [below], **lines}
    (k8s / "overlays" / f"own-{overlay}" / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return documents(f"own-{overlay}", k8s)


@needs_kubectl
@pytest.mark.parametrize(
    ("overlay", "kind"),
    [("base", "Job"), ("multi-node", "Job"), ("kueue", "Job"), ("jobset", "JobSet"), ("trainjob", "TrainJob")],
)
def test_a_second_job_needs_only_a_name(tmp_path: Path, overlay: str, kind: str) -> None:
    patch = [{"op": "replace", "path": "/metadata/name", "value": "news"}]
    lines: dict[str, object] = {"patches": [{"target": {"kind": kind}, "patch": yaml.safe_dump(patch)}]}
    if overlay == "trainjob":
        lines["sortOptions"] = {"order": "fifo"}  # kustomize reads it from the outermost kustomization only
    render = Render(derived(tmp_path, overlay, lines), rendered(overlay).required)
    assert (kind, "news") in {(document["kind"], document["metadata"]["name"]) for document in render.documents}
    assert faults(render) == []


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_another_namespace_needs_one_line(tmp_path: Path, overlay: str) -> None:
    space = namespace()
    space[0]["metadata"]["name"] = "news"
    for name in required(overlay):
        space += derived(tmp_path, name, {"namespace": "news"})
    render = Render(derived(tmp_path, overlay, {"namespace": "news", "sortOptions": {"order": "fifo"}}), space)
    # kustomize does not know that these two belong to the cluster; the API server drops their namespace.
    known = [f"namespaces_agree: {name}" for name in ("ClusterQueue/lmdist", "ResourceFlavor/lmdist-gpu")]
    found = sorted(fault.partition(" belongs to the cluster")[0] for fault in faults(render))
    assert found == (known if overlay == "kueue" else [])


@pytest.mark.parametrize("path", sorted(K8S.rglob("recipe.toml")), ids=lambda path: path.parent.name)
def test_a_recipe_takes_any_table(path: Path) -> None:
    """A user replaces `inputs` and `folder`, as step 4 of the page says: a column that is named would fail the Job at once."""
    assert tomllib.loads(path.read_text())["prepare"].keys() <= {"inputs", "lowercase", "min_count"}


# The files ----------------------------------------------------------------------------------------------------------


@needs_kubectl
@pytest.mark.parametrize("path", yaml_files(), ids=lambda path: str(path.relative_to(K8S)))
def test_a_file_opens_with_commands_that_work(path: Path) -> None:
    assert list(comment_faults(path, path.read_text())) == []


@pytest.mark.parametrize("path", [*yaml_files(), ROOT / ".yamllint"], ids=lambda path: str(path.relative_to(ROOT)))
def test_yamllint_finds_nothing(path: Path) -> None:
    assert lint_faults(path.read_text()) == []


@needs_kubectl
@pytest.mark.parametrize("change", FILE_CHANGES, ids=str)
def test_a_wrong_comment_or_style_is_found(change: Change) -> None:
    path, text, expected = change.file()
    found = lint_faults(text) if change.rule == "yamllint" else list(comment_faults(path, text))
    assert expected in "; ".join(found)

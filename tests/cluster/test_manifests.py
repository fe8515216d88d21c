"""The manifests of k8s/ without a cluster: rendered, held against schemas and rules of our own, which are tested in turn."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest
import yaml

from support import manifest_jobs, manifest_objects, manifest_pods, manifest_schemas, manifest_services
from support.manifest_mutations import FILES, LINT, MUTATIONS, Mutation
from support.manifest_objects import comment_faults, lint_faults, yaml_files
from support.manifests import K8S, KUBECTL, OVERLAYS, ROOT, RULES, Render, before, documents, faults, namespace, rendered

# To import a module of rules is to have them in RULES.
RULE_MODULES = [manifest_schemas, manifest_objects, manifest_pods, manifest_jobs, manifest_services]

needs_kubectl = pytest.mark.skipif(KUBECTL is None, reason="kubectl, whose kustomize renders the manifests, is not here")


@needs_kubectl
@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_breaks_no_rule(name: str) -> None:
    assert faults(rendered(name)) == []


@needs_kubectl
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: f"{mutation.rule}: {mutation.what}")
def test_a_wrong_change_is_found_by_its_rule(mutation: Mutation) -> None:
    assert faults(mutation.apply(), [mutation.rule])


@needs_kubectl
def test_a_namespace_has_to_hold_pods_to_the_standard() -> None:
    render = rendered("base")
    render.others[0]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] = "baseline"
    (fault,) = faults(render)
    assert fault == "namespaces_agree: the namespace lmdist does not enforce the Pod Security Standard restricted"


def test_every_rule_has_something_to_find() -> None:
    assert set(RULES) == {mutation.rule for mutation in MUTATIONS}
    assert [what for what, times in Counter(mutation.what for mutation in MUTATIONS).items() if times > 1] == []


# What a user makes of the overlays ----------------------------------------------------------------------------------


def on_top(folder: Path, overlay: str, lines: dict[str, object]) -> Path:
    """A copy of k8s/ in a folder, with an overlay `own` that stands on another one; gives the copy."""
    k8s = folder / "k8s"
    shutil.copytree(K8S, k8s, dirs_exist_ok=True)
    own = k8s / "overlays" / f"own-{overlay}"
    own.mkdir()
    below = "../../base" if overlay == "base" else f"../{overlay}"
    kustomization = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "resources": [below], **lines}
    (own / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return k8s


@needs_kubectl
@pytest.mark.parametrize(
    ("overlay", "kind"),
    [("base", "Job"), ("multi-node", "Job"), ("kueue", "Job"), ("jobset", "JobSet"), ("trainjob", "TrainJob")],
)
def test_another_job_beside_the_first_needs_a_name_only(tmp_path: Path, overlay: str, kind: str) -> None:
    patch = [{"op": "replace", "path": "/metadata/name", "value": "news"}]
    lines: dict[str, object] = {"patches": [{"target": {"kind": kind}, "patch": yaml.safe_dump(patch)}]}
    if overlay == "trainjob":
        lines["sortOptions"] = {"order": "fifo"}  # kustomize takes it from the outermost kustomization only
    k8s = on_top(tmp_path, overlay, lines)
    render = Render(overlay, documents(f"own-{overlay}", k8s), rendered(overlay).others)
    assert (kind, "news") in {(document["kind"], document["metadata"]["name"]) for document in render.documents}
    assert faults(render) == []


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_another_namespace_needs_one_line(tmp_path: Path, overlay: str) -> None:
    space = namespace()[0]
    space["metadata"]["name"] = "news"
    others = [space]
    for name in before(overlay):
        others += documents(f"own-{name}", on_top(tmp_path, name, {"namespace": "news"}))
    k8s = on_top(tmp_path, overlay, {"namespace": "news", "sortOptions": {"order": "fifo"}})
    render = Render(overlay, documents(f"own-{overlay}", k8s), others)
    # kustomize does not know that these two belong to the cluster; the API server takes the namespace off them.
    known = [f"namespaces_agree: {name} belongs to the cluster and says namespace news" for name in CLUSTERS_OWN]
    assert sorted(faults(render)) == (known if overlay == "kueue" else [])


CLUSTERS_OWN = ["ClusterQueue/lmdist", "ResourceFlavor/lmdist-gpu"]


# The files ----------------------------------------------------------------------------------------------------------


@needs_kubectl
@pytest.mark.parametrize("path", yaml_files(), ids=lambda path: str(path.relative_to(K8S)))
def test_a_file_opens_with_commands_that_work(path: Path) -> None:
    assert list(comment_faults(path, path.read_text())) == []


@pytest.mark.parametrize("path", [*yaml_files(), ROOT / ".yamllint"], ids=lambda path: str(path.relative_to(ROOT)))
def test_yamllint_has_nothing_to_say(path: Path) -> None:
    assert lint_faults(path.read_text()) == []


@needs_kubectl
@pytest.mark.parametrize(("what", "file", "old", "new", "said"), FILES, ids=[entry[0] for entry in FILES])
def test_a_wrong_comment_is_found(what: str, file: str, old: str, new: str, said: str) -> None:
    text = (ROOT / file).read_text()
    assert old in text
    assert said in "; ".join(comment_faults(ROOT / file, text.replace(old, new))), what


@pytest.mark.parametrize(("what", "file", "old", "new"), LINT, ids=[entry[0] for entry in LINT])
def test_yaml_that_means_something_else_is_found(what: str, file: str, old: str, new: str) -> None:
    text = (ROOT / file).read_text()
    assert old in text
    assert lint_faults(text.replace(old, new)), what

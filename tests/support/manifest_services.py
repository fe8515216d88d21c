"""Rules: who talks to whom. Services, network policies, MLflow, the served model, scaling, and Kueue's queues."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from support.manifests import Document, Labels, Pod, Render, amount, command, find, look, of_kind, pods, rule, selects, title

URI = "MLFLOW_TRACKING_URI"
QUEUE = "kueue.x-k8s.io/queue-name"
SPACE = "kubernetes.io/metadata.name"
"""The label that every namespace has of itself."""
DNS = 53


def selected(selector: Document | None, found: list[Document]) -> list[Pod]:
    """The pods that a selector takes."""
    return [pod for pod in pods(found) if selects(selector, pod.labels)]


def ports(pod: Pod) -> list[dict[str, Any]]:
    """The ports of a pod's containers."""
    return [port for container in pod.containers for port in container.get("ports") or []]


def called(pod: Pod, port: object) -> set[object]:
    """Name and number of a port of a pod that is given by either; empty where it has none such."""
    for entry in ports(pod):
        if port in (entry.get("name"), entry["containerPort"]):
            return {entry.get("name"), entry["containerPort"]}
    return set()


def selector_of(document: Document) -> Document | None:
    """What a document that is about pods selects them by; None for other kinds."""
    match document["kind"]:
        case "Service":
            return {"matchLabels": look(document, "spec", "selector") or {}}
        case "NetworkPolicy":
            return look(document, "spec", "podSelector") or {}
        case "PodDisruptionBudget":
            return look(document, "spec", "selector") or {}
    return None


@rule
def selectors_hit_one_workload(render: Render) -> Iterator[str]:
    """Services, policies and budgets are about one workload of the render, Deployments about their own pods."""
    for document in render.documents:
        selector = selector_of(document)
        if selector is not None and len(found := selected(selector, render.documents)) != 1:
            yield f"{title(document)} selects the pods of {len(found)} workloads"
    for pod in pods(of_kind(render.documents, "Deployment")):
        if not selects(look(pod.owner, "spec", "selector"), pod.labels):
            yield f"{pod} does not select its own pods"


@rule
def services_lead_to_ports(render: Render) -> Iterator[str]:
    """The port that a Service sends to is one of its pods', and their policy lets somebody in there."""
    for service in of_kind(render.documents, "Service"):
        for pod in selected(selector_of(service), render.documents):
            for port in service["spec"].get("ports") or []:
                target = port.get("targetPort", port["port"])
                if not (there := called(pod, target)):
                    yield f"{title(service)} sends to port {target}, which {pod} has not"
                for policy in policies(pod, render.documents):
                    entries = policy["spec"].get("ingress") or []
                    if there and not any(port_fits(entry, there) for entry in entries):
                        yield f"{title(policy)} lets nobody in where {title(service)} sends to"


# Scaling ------------------------------------------------------------------------------------------------------------


@rule
def scaling_works(render: Render) -> Iterator[str]:
    """An autoscaler's Deployment is there, asks for what is measured, and leaves the number of pods to it."""
    for scaler in of_kind(render.documents, "HorizontalPodAutoscaler"):
        reference = scaler["spec"]["scaleTargetRef"]
        target = find(render.documents, reference["kind"], reference["name"])
        if target is None or target["apiVersion"] != reference.get("apiVersion"):
            yield f"{title(scaler)}: there is no {reference['kind']} {reference['name']} to scale"
            continue
        if "replicas" in target["spec"]:
            yield f"{title(target)} says how many pods, and so does {title(scaler)}"
        if not 1 <= scaler["spec"].get("minReplicas", 1) <= scaler["spec"]["maxReplicas"]:
            yield f"{title(scaler)} wants more pods at least than at most"
        for metric in scaler["spec"].get("metrics") or []:
            name = look(metric, "resource", "name")
            for pod in pods([target]):
                if any(name not in (look(container, "resources", "requests") or {}) for container in pod.containers):
                    yield f"{title(scaler)} measures {name} against requests that are not there"


@rule
def nodes_can_be_drained(render: Render) -> Iterator[str]:
    """A disruption budget lets a pod go, and an update has a pod that may come or go."""
    for budget in of_kind(render.documents, "PodDisruptionBudget"):
        for pod in selected(selector_of(budget), render.documents):
            scalers = [
                scaler
                for scaler in of_kind(render.documents, "HorizontalPodAutoscaler")
                if scaler["spec"]["scaleTargetRef"]["name"] == pod.owner["metadata"]["name"]
            ]
            least = min([scaler["spec"].get("minReplicas", 1) for scaler in scalers], default=pod.count)
            keep = budget["spec"].get("minAvailable", least - int(budget["spec"].get("maxUnavailable", 0)))
            if least - int(keep) < 1:
                yield f"{title(budget)} lets none of {least} pods go"
    for deployment in of_kind(render.documents, "Deployment"):
        update = look(deployment, "spec", "strategy", "rollingUpdate")
        if update and [str(update.get(name, "25%")).strip("%") for name in ("maxUnavailable", "maxSurge")] == ["0", "0"]:
            yield f"{title(deployment)} may have no pod more and none less while it is updated"


# Network policies ---------------------------------------------------------------------------------------------------


def policies(pod: Pod, found: list[Document]) -> list[Document]:
    """The network policies that a pod is under."""
    return [policy for policy in of_kind(found, "NetworkPolicy") if selects(selector_of(policy), pod.labels)]


def port_fits(entry: Document, names: set[object], protocol: str = "TCP") -> bool:
    """Whether an entry of a policy is for a port that has some names."""
    asked = entry.get("ports")
    return not asked or any(port.get("port") in {*names, None} and port.get("protocol", "TCP") == protocol for port in asked)


def peer_fits(entry: Document, key: str, labels: Labels, space: str) -> bool:
    """Whether an entry of a policy is for pods with some labels in a namespace; `key` is from or to."""
    if not entry.get(key):
        return True
    for peer in entry[key]:
        named = "namespaceSelector" not in peer or selects(peer["namespaceSelector"], {SPACE: space})
        if "ipBlock" not in peer and named and ("podSelector" not in peer or selects(peer["podSelector"], labels)):
            return True
    return False


@rule
def every_pod_has_a_policy(render: Render) -> Iterator[str]:
    """Every pod is under one network policy, for both directions."""
    for pod in pods(render.documents):
        found = policies(pod, render.documents)
        if len(found) != 1:
            yield f"{pod} is under {len(found)} network policies"
        for policy in found:
            if sorted(policy["spec"].get("policyTypes") or []) != ["Egress", "Ingress"]:
                yield f"{title(policy)} is for {policy['spec'].get('policyTypes')}, not for both directions"


@rule
def policy_ports_are_there(render: Render) -> Iterator[str]:
    """The ports of a policy are ports of the pods that it is about, or that it leads to."""
    for policy in of_kind(render.documents, "NetworkPolicy"):
        for entry in policy["spec"].get("ingress") or []:
            for pod in selected(selector_of(policy), render.documents):
                for port in (port["port"] for port in entry.get("ports") or [] if "port" in port):
                    if not called(pod, port):
                        yield f"{title(policy)} lets in to port {port}, which {pod} has not"
        for entry in policy["spec"].get("egress") or []:
            for peer in (peer for peer in entry.get("to") or [] if "podSelector" in peer and "namespaceSelector" not in peer):
                for port in (port["port"] for port in entry.get("ports") or [] if "port" in port):
                    found = selected(peer["podSelector"], render.everything)
                    if found and not any(called(pod, port) for pod in found):
                        yield f"{title(policy)} lets out to port {port}, which {found[0]} has not"


@rule
def names_can_be_looked_up(render: Render) -> Iterator[str]:
    """Pods that call others by name may ask the name service, wherever it is: a cache on the node is no pod."""
    for pod in pods(render.documents):
        if not pod.trains and not tracking_uris(pod, render):
            continue
        for policy in policies(pod, render.documents):
            entries = [entry for entry in policy["spec"].get("egress") or [] if not entry.get("to")]
            for protocol in ("UDP", "TCP"):
                if not any(port_fits(entry, {DNS}, protocol) for entry in entries):
                    yield f"{title(policy)} does not let {pod} ask for names by {protocol}"


@rule
def nodes_can_talk(render: Render) -> Iterator[str]:
    """The nodes of a training may talk to each other on any port: gloo and NCCL choose theirs."""
    for pod in (pod for pod in pods(render.documents) if pod.trains):
        space = pod.owner["metadata"].get("namespace", "")
        for policy in policies(pod, render.documents):
            for direction, key in (("ingress", "from"), ("egress", "to")):
                entries = [entry for entry in policy["spec"].get(direction) or [] if not entry.get("ports")]
                if not any(peer_fits(entry, key, pod.labels, space) for entry in entries):
                    yield f"{title(policy)} keeps the pods of {pod} from each other: {direction}"


# MLflow -------------------------------------------------------------------------------------------------------------


def tracking_uris(pod: Pod, render: Render) -> list[str]:
    """Where the containers of a pod look for MLflow."""
    found = [pod.environment(container, render.everything) for container in pod.containers]
    return [variables[URI] for variables in found if URI in variables]


def servers(uri: str, render: Render) -> tuple[Document | None, list[Pod], set[object]]:
    """The Service that a URI leads to, its pods, and the port of these."""
    place = urlsplit(uri)
    service = find(render.everything, "Service", (place.hostname or "").split(".")[0])
    if service is None:
        return None, [], set()
    targets = [
        port.get("targetPort", port["port"]) for port in service["spec"].get("ports") or [] if port["port"] == place.port
    ]
    found = selected(selector_of(service), render.everything)
    return service, found, set().union(*(called(pod, target) for pod in found for target in targets))


@rule
def mlflow_is_where_it_is_said_to_be(render: Render) -> Iterator[str]:
    """Trainings, exports and servers of models have a tracking URI, which is a Service with pods behind its port."""
    for pod in pods(render.documents):
        uris = tracking_uris(pod, render)
        if pod.component in ("train", "export", "serve") and not uris:
            yield f"{pod} is not told where MLflow is: {URI} is not set"
        for uri in uris:
            service, found, names = servers(uri, render)
            if service is None:
                yield f"{pod}: {uri} is no Service"
            elif not found or not names or urlsplit(uri).scheme != "http":
                yield f"{pod}: {uri} leads to no port behind {title(service)}"


@rule
def mlflow_can_be_reached(render: Render) -> Iterator[str]:
    """Whoever has a tracking URI is let out to MLflow, and MLflow lets it in."""
    for pod in pods(render.documents):
        space = pod.owner["metadata"].get("namespace", "")
        for _, found, names in (servers(uri, render) for uri in tracking_uris(pod, render)):
            for server in found:
                for policy in policies(pod, render.documents):
                    entries = policy["spec"].get("egress") or []
                    if not any(port_fits(e, names) and peer_fits(e, "to", server.labels, space) for e in entries):
                        yield f"{title(policy)} does not let {pod} out to {server}"
                yield from admission_faults(pod, server, names, render)
    for pod in pods(render.documents):
        if any(command(container) == "mlflow" and "server" in container["command"] for container in pod.containers):
            labels = {"app.kubernetes.io/name": "lmdist"}
            for part in ("train", "export", "serve"):
                client = Pod(pod.owner, {"labels": {**labels, "app.kubernetes.io/component": part}}, {})
                yield from admission_faults(
                    client, pod, {port["containerPort"] for port in ports(pod)} | {"http"}, render, part
                )


def admission_faults(client: Pod, server: Pod, names: set[object], render: Render, part: str = "") -> Iterator[str]:
    """Which policies of a server do not let a client in."""
    space = client.owner["metadata"].get("namespace", "")
    for policy in policies(server, render.everything):
        entries = policy["spec"].get("ingress") or []
        if not any(port_fits(entry, names) and peer_fits(entry, "from", client.labels, space) for entry in entries):
            yield f"{title(policy)} does not let {part or client} in to {server}"


@rule
def servers_listen_where_they_say(render: Render) -> Iterator[str]:
    """A server listens to all on a port of its container, and what MLflow keeps lies on a claim."""
    for pod in pods(of_kind(render.documents, "Deployment")):
        for container in pod.containers:
            words = [word for word in pod.arguments(container, render.everything) if word.startswith("--") and "=" in word]
            flags = dict(word.split("=", 1) for word in words)
            if "--port" in flags and not called(pod, int(flags["--port"])):
                yield f"{pod} listens on {flags['--port']}, which is no port of its container"
            if flags.get("--host", "0.0.0.0") not in ("0.0.0.0", "::"):
                yield f"{pod} listens to {flags['--host']} only"
            for path in (
                flags.get("--backend-store-uri", "").removeprefix("sqlite:///"),
                flags.get("--artifacts-destination", ""),
            ):
                if path.startswith("/") and "persistentVolumeClaim" not in pod.mounted(container, path)[1]:
                    yield f"{pod} keeps {path} on no claim"


@rule
def mlflow_answers_to_its_names(render: Render) -> Iterator[str]:
    """MLflow's --allowed-hosts has all names of its Service in DNS, with and without the port; others get 403."""
    for pod in pods(render.documents):
        for container in (container for container in pod.containers if command(container) == "mlflow"):
            if "server" not in container["command"]:
                continue
            arguments = pod.arguments(container, render.everything)
            given = next((word.partition("=")[2] for word in arguments if word.startswith("--allowed-hosts=")), "")
            space = pod.owner["metadata"].get("namespace", "")
            for service in of_kind(render.documents, "Service"):
                if not selects(selector_of(service), pod.labels):
                    continue
                for suffix in ("", f".{space}", f".{space}.svc"):
                    host = service["metadata"]["name"] + suffix
                    for called_by in (host, *(f"{host}:{port['port']}" for port in service["spec"]["ports"])):
                        if not any(fnmatch.fnmatch(called_by, pattern.strip()) for pattern in given.split(",")):
                            yield f"{pod} answers 403 to {called_by}: --allowed-hosts has it not"


@rule
def what_is_exported_is_served(render: Render) -> Iterator[str]:
    """The model that is served is the one that the export registers, by the alias that it is given."""
    exported = {model for model in (registered(pod, render) for pod in pods(render.everything)) if model}
    for pod in pods(render.documents):
        if pod.component == "serve":
            asked = set(re.findall(r"models:/([\w.@/-]+)", str(pod.spec)))
            if not asked or asked - exported:
                names = ", ".join(sorted(asked)) or "no model"
                yield f"{pod} serves {names}, and the export registers {', '.join(sorted(exported))}"


def registered(pod: Pod, render: Render) -> str:
    """NAME@ALIAS of the model that a pod registers; empty where it registers none."""
    for container in (container for container in pod.containers if command(container) == "lmdist-export"):
        given = dict(
            word.removeprefix("--").split("=", 1) for word in pod.arguments(container, render.everything) if "=" in word
        )
        return f"{given.get('register')}@{given.get('alias')}"
    return ""


# Kueue --------------------------------------------------------------------------------------------------------------


def queued(render: Render) -> Iterator[tuple[Pod, Document, Document]]:
    """Each job that waits in a queue, with its LocalQueue and ClusterQueue, where both are there."""
    for pod in pods(render.documents):
        local = find(render.documents, "LocalQueue", look(pod.owner, "metadata", "labels", QUEUE))
        cluster = find(render.documents, "ClusterQueue", look(local or {}, "spec", "clusterQueue"))
        if local is not None and cluster is not None:
            yield pod, local, cluster


def groups(cluster: Document) -> list[Document]:
    """The groups of resources of a ClusterQueue."""
    return look(cluster, "spec", "resourceGroups") or []


@rule
def queues_lead_somewhere(render: Render) -> Iterator[str]:
    """A LocalQueue leads to a ClusterQueue that takes its namespace, and this one to flavors."""
    for local in of_kind(render.documents, "LocalQueue"):
        cluster = find(render.documents, "ClusterQueue", look(local, "spec", "clusterQueue"))
        if cluster is None:
            yield f"{title(local)}: there is no ClusterQueue {look(local, 'spec', 'clusterQueue')}"
        elif not selects(look(cluster, "spec", "namespaceSelector"), {SPACE: local["metadata"].get("namespace", "")}):
            yield f"{title(cluster)} takes nothing from the namespace {local['metadata'].get('namespace')}"
    for cluster in of_kind(render.documents, "ClusterQueue"):
        for flavor in (flavor for group in groups(cluster) for flavor in group.get("flavors") or []):
            if find(render.documents, "ResourceFlavor", flavor.get("name")) is None:
                yield f"{title(cluster)}: there is no ResourceFlavor {flavor.get('name')}"


@rule
def queued_jobs_wait(render: Render) -> Iterator[str]:
    """Where there are queues, every job is in one, and is suspended until its turn comes."""
    if not of_kind(render.documents, "LocalQueue"):
        return
    for pod in (pod for pod in pods(render.documents) if pod.job is not None):
        queue = look(pod.owner, "metadata", "labels", QUEUE)
        if find(render.documents, "LocalQueue", queue) is None:
            yield f"{pod}: there is no LocalQueue {queue} to wait in"
        if (pod.job or {}).get("suspend") is not True:
            yield f"{pod} starts at once: suspend is not true"


@rule
def queues_have_what_jobs_ask(render: Render) -> Iterator[str]:
    """A ClusterQueue covers what its jobs ask for, each flavor in the same order, and has room for one job at least."""
    for cluster in of_kind(render.documents, "ClusterQueue"):
        for group in groups(cluster):
            for flavor in group.get("flavors") or []:
                if [entry.get("name") for entry in flavor.get("resources") or []] != group.get("coveredResources"):
                    yield f"{title(cluster)}: the flavor {flavor.get('name')} has other resources than coveredResources"
    for pod, _, cluster in queued(render):
        flavors = [flavor for group in groups(cluster) for flavor in group.get("flavors") or []]
        quotas = {entry["name"]: amount(entry["nominalQuota"]) for flavor in flavors for entry in flavor.get("resources") or []}
        asked: dict[str, float] = {}
        for container in pod.containers:
            for name, quantity in (look(container, "resources", "requests") or {}).items():
                asked[name] = asked.get(name, 0) + pod.count * amount(quantity)
        for name, total in asked.items():
            if name not in quotas:
                yield f"{title(cluster)} has no {name}, which {pod} asks for"
            elif total > quotas[name]:
                yield f"{title(cluster)} has {quotas[name]:g} of {name}, and {pod} asks for {total:g}"

"""Rules: connections between pods: Services, network policies, MLflow, the served model, scaling, and Kueue's queues."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from urllib.parse import urlsplit

from support.manifests import (
    COMPONENT,
    NAME,
    Document,
    Pod,
    Render,
    amount,
    command,
    find,
    look,
    of_kind,
    pods,
    rule,
    selects,
    title,
)

QUEUE, SPACE = "kueue.x-k8s.io/queue-name", "kubernetes.io/metadata.name"
CLIENTS = ("train", "export", "serve")
"""The components that talk to MLflow."""


def selector_of(document: Document) -> Document | None:
    """Return the label selector of a document about pods; None for other kinds."""
    spec = document.get("spec") or {}
    return {
        "Service": {"matchLabels": spec.get("selector") or {}},
        "NetworkPolicy": spec.get("podSelector") or {},
        "PodDisruptionBudget": spec.get("selector") or {},
    }.get(document["kind"])


def selected(selector: Document | None, found: list[Document]) -> list[Pod]:
    """Return the pods that a selector selects."""
    return [pod for pod in pods(found) if selects(selector, pod.labels)]


def port_names(pod: Pod, port: object) -> set[object]:
    """Return name and number of a pod's port of a name or number; empty where it has none."""
    both = [{entry.get("name"), entry["containerPort"]} for entry in pod.ports]
    return next((names for names in both if port in names), set())


@rule
def selectors_select_one_workload(render: Render) -> Iterator[str]:
    """Services, policies and budgets select one workload of the render, Deployments their own pods."""
    for document in render.documents:
        selector = selector_of(document)
        if selector is not None and len(found := selected(selector, render.documents)) != 1:
            yield f"{title(document)} selects the pods of {len(found)} workloads"
    for pod in pods(of_kind(render.documents, "Deployment")):
        if not selects(look(pod.owner, "spec", "selector"), pod.labels):
            yield f"{pod} does not select its own pods"


@rule
def services_lead_to_ports(render: Render) -> Iterator[str]:
    """A Service's target port is one of its pods', and their policy admits somebody there."""
    for service in of_kind(render.documents, "Service"):
        for pod in selected(selector_of(service), render.documents):
            for port in service["spec"].get("ports") or []:
                names = port_names(pod, target := port.get("targetPort", port["port"]))
                if not names or not all(admits(policy, "ingress", names) for policy in policies(pod, render.documents)):
                    yield f"{title(service)} leads to port {target} of {pod}, which does not exist or admits nobody"


# Scaling ------------------------------------------------------------------------------------------------------------


@rule
def scaling_works(render: Render) -> Iterator[str]:
    """An autoscaler's Deployment exists, requests what is measured, and leaves the number of pods to it."""
    for scaler in of_kind(render.documents, "HorizontalPodAutoscaler"):
        reference, least = scaler["spec"]["scaleTargetRef"], scaler["spec"].get("minReplicas", 1)
        target = find(render.documents, reference["kind"], reference["name"]) or {}
        if target.get("apiVersion") != reference.get("apiVersion") or "replicas" in target.get("spec", {}):
            yield f"{title(scaler)}: {reference} does not exist, or has a number of replicas of its own"
        if not 1 <= least <= scaler["spec"]["maxReplicas"]:
            yield f"{title(scaler)} has a minimum of {least} above its maximum"
        measured = {look(metric, "resource", "name") for metric in scaler["spec"].get("metrics") or []}
        for container in (container for pod in pods([target] if target else []) for container in pod.containers):
            if unknown := measured - {*(look(container, "resources", "requests") or {})}:
                yield f"{title(scaler)} measures {unknown} relative to requests that do not exist"


@rule
def nodes_can_be_drained(render: Render) -> Iterator[str]:
    """A disruption budget lets a pod go, and an update may add or remove a pod."""
    for budget in of_kind(render.documents, "PodDisruptionBudget"):
        for pod in selected(selector_of(budget), render.documents):
            scalers = [look(scaler, "spec") for scaler in of_kind(render.documents, "HorizontalPodAutoscaler")]
            scalers = [spec for spec in scalers if spec["scaleTargetRef"]["name"] == pod.owner["metadata"]["name"]]
            least = min([spec.get("minReplicas", 1) for spec in scalers], default=pod.count)
            if least <= int(budget["spec"].get("minAvailable", least - int(budget["spec"].get("maxUnavailable", 0)))):
                yield f"{title(budget)} lets none of {least} pods go"
    for deployment in of_kind(render.documents, "Deployment"):
        update = look(deployment, "spec", "strategy", "rollingUpdate")
        if update and {str(update.get(name, "25%")).strip("%") for name in ("maxUnavailable", "maxSurge")} == {"0"}:
            yield f"{title(deployment)} can neither add nor remove a pod during an update"


# Network policies ---------------------------------------------------------------------------------------------------


def policies(pod: Pod, found: list[Document]) -> list[Document]:
    """Return the network policies of a pod."""
    return [policy for policy in of_kind(found, "NetworkPolicy") if selects(selector_of(policy), pod.labels)]


def admits(policy: Document, direction: str, ports: set[object], peer: Pod | None = None, protocol: str = "TCP") -> bool:
    """Return whether a policy admits traffic: `ports` are names of one port, empty for all; without `peer` from or to any."""
    for entry in look(policy, "spec", direction) or []:
        listed = entry.get("ports") or []
        fits = any(port.get("port") in ports and port.get("protocol", "TCP") == protocol for port in listed)
        peers = entry.get({"ingress": "from", "egress": "to"}[direction]) or [{}]
        if peer is None and direction == "egress" and peers != [{}]:
            continue
        if (fits or not listed) and any(peer is None or is_peer(given, peer) for given in peers):
            return True
    return False


def is_peer(given: Document, pod: Pod) -> bool:
    """Return whether a peer of a policy is a pod; without a selector it is any."""
    space = "namespaceSelector" not in given or selects(given["namespaceSelector"], {SPACE: pod.namespace})
    return "ipBlock" not in given and space and ("podSelector" not in given or selects(given["podSelector"], pod.labels))


@rule
def every_pod_has_a_policy(render: Render) -> Iterator[str]:
    """Every pod has one network policy, for both directions."""
    for pod in pods(render.documents):
        types = [sorted(policy["spec"].get("policyTypes") or []) for policy in policies(pod, render.documents)]
        if types != [["Egress", "Ingress"]]:
            yield f"{pod} has the policies {types}"


@rule
def policies_admit_what_is_needed(render: Render) -> Iterator[str]:
    """Nodes reach each other on any port (gloo and NCCL choose theirs), clients MLflow, and both the name service anywhere."""
    for pod in pods(render.documents):
        needed: list[tuple[Pod, str, Pod | None, set[object], str]] = []
        if pod.trains:
            needed += [(pod, direction, pod, set(), "TCP") for direction in ("ingress", "egress")]
        uris = tracking_uris(pod, render)
        if pod.trains or uris:
            needed.extend((pod, "egress", None, {53}, protocol) for protocol in ("UDP", "TCP"))
        for _, found, names in (servers(uri, render) for uri in uris):
            needed += [(pod, "egress", server, names, "TCP") for server in found]
            needed += [(server, "ingress", pod, names, "TCP") for server in found]
        if any(command(container) == "mlflow" for container in pod.containers):
            clients = [Pod(pod.owner, {"labels": {NAME: "lmdist", COMPONENT: part}}, {}) for part in CLIENTS]
            needed += [(pod, "ingress", client, port_names(pod, "http"), "TCP") for client in clients]
        for of, direction, peer, ports, protocol in needed:
            for policy in policies(of, render.everything):
                if not admits(policy, direction, ports, peer, protocol):
                    yield f"{title(policy)} does not admit {peer or 'anybody'} at {ports or 'all'} by {protocol}: {direction}"


# MLflow -------------------------------------------------------------------------------------------------------------


def tracking_uris(pod: Pod, render: Render) -> list[str]:
    """Return the tracking URIs of a pod's containers."""
    found = [pod.environment(container, render.everything).get("MLFLOW_TRACKING_URI") for container in pod.containers]
    return [uri for uri in found if uri]


def servers(uri: str, render: Render) -> tuple[Document | None, list[Pod], set[object]]:
    """Return the Service of a URI, its pods, and the names of their port."""
    place = urlsplit(uri)
    service = find(render.everything, "Service", (place.hostname or "").split(".")[0])
    found = selected(selector_of(service), render.everything) if service else []
    ports = [port for port in look(service, "spec", "ports") or [] if port["port"] == place.port]
    names = [port_names(pod, port.get("targetPort", port["port"])) for pod in found for port in ports]
    return service, found, set().union(*names)


@rule
def mlflow_is_where_the_uri_says(render: Render) -> Iterator[str]:
    """Trainings, exports and model servers have a tracking URI, which is a Service with pods behind its port."""
    for pod in pods(render.documents):
        uris = tracking_uris(pod, render)
        if pod.component in CLIENTS and not uris:
            yield f"{pod}: MLFLOW_TRACKING_URI is not set"
        for uri in uris:
            if not servers(uri, render)[2] or urlsplit(uri).scheme != "http":
                yield f"{pod}: {uri} leads to no port of a pod behind a Service"


@rule
def servers_listen_to_all(render: Render) -> Iterator[str]:
    """A server listens on all interfaces, on a port of its container; MLflow answers to all DNS names of its Service.

    MLflow answers 403 to a host that --allowed-hosts does not list, with or without the port.
    """
    for pod in pods(of_kind(render.documents, "Deployment")):
        for container in pod.containers:
            flags = pod.flags(container, render.everything)
            if flags.get("host") != "0.0.0.0" or not port_names(pod, int(flags.get("port", 0))):
                yield f"{pod} listens on {flags.get('host')}:{flags.get('port')}"
            services = of_kind(render.documents, "Service") if command(container) == "mlflow" else []
            for service in (one for one in services if selects(selector_of(one), pod.labels)):
                hosts = [service["metadata"]["name"] + end for end in ("", f".{pod.namespace}", f".{pod.namespace}.svc")]
                hosts += [f"{host}:{port['port']}" for host in hosts for port in service["spec"]["ports"]]
                allowed = flags.get("allowed-hosts", "").split(",")
                refused = [host for host in hosts if not any(fnmatch.fnmatch(host, pattern) for pattern in allowed)]
                yield from (f"{pod} answers 403 to {host}" for host in refused)


@rule
def what_is_exported_is_served(render: Render) -> Iterator[str]:
    """The served model is the one that the export registers, under the alias that the export sets."""
    exports = [(pod, container) for pod in pods(render.everything) for container in pod.containers]
    flags = [pod.flags(container, render.everything) for pod, container in exports if command(container) == "lmdist-export"]
    registered = {f"{given.get('register')}@{given.get('alias')}" for given in flags}
    for pod in (pod for pod in pods(render.documents) if pod.component == "serve"):
        asked = set(re.findall(r"models:/([\w.@/-]+)", str(pod.spec)))
        if not asked or asked - registered:
            yield f"{pod} serves {asked}, and the export registers {registered}"


# Kueue --------------------------------------------------------------------------------------------------------------


@rule
def queues_lead_to_flavors(render: Render) -> Iterator[str]:
    """A LocalQueue leads to a ClusterQueue that takes its namespace, and this one to flavors with all covered resources."""
    for local in of_kind(render.documents, "LocalQueue"):
        cluster = find(render.documents, "ClusterQueue", look(local, "spec", "clusterQueue"))
        if not selects(look(cluster, "spec", "namespaceSelector"), {SPACE: local["metadata"].get("namespace", "")}):
            yield f"{title(local)}: no ClusterQueue {look(local, 'spec', 'clusterQueue')} takes its namespace"
    for cluster in of_kind(render.documents, "ClusterQueue"):
        for group in look(cluster, "spec", "resourceGroups") or []:
            for flavor in group.get("flavors") or []:
                resources = [entry.get("name") for entry in flavor.get("resources") or []]
                if not find(render.documents, "ResourceFlavor", flavor["name"]) or resources != group["coveredResources"]:
                    yield f"{title(cluster)}: the flavor {flavor['name']} is missing, or has {resources}"


@rule
def queues_have_room_for_jobs(render: Render) -> Iterator[str]:
    """Where there are queues, every job is suspended in one, whose quotas have room for it."""
    for pod in pods(render.documents):
        if pod.job is None or not of_kind(render.documents, "LocalQueue"):
            continue
        local = find(render.documents, "LocalQueue", look(pod.owner, "metadata", "labels", QUEUE))
        if local is None or pod.job.get("suspend") is not True:
            yield f"{pod} is in no LocalQueue, or is not suspended until its turn"
        cluster = find(render.documents, "ClusterQueue", look(local, "spec", "clusterQueue"))
        flavors = [flavor for group in look(cluster, "spec", "resourceGroups") or [] for flavor in group.get("flavors") or []]
        quotas = {entry["name"]: amount(entry["nominalQuota"]) for flavor in flavors for entry in flavor["resources"]}
        requests = [look(container, "resources", "requests") or {} for container in pod.containers]
        for name in {name for request in requests for name in request} if cluster else ():
            total = pod.count * sum(amount(request.get(name, 0)) for request in requests)
            if total > quotas.get(name, 0):
                yield f"{pod} requests {total:g} of {name}, and the quota is {quotas.get(name, 0):g}"

"""Kubernetes without a cluster: pods on this machine, and a controller of their Job.

    with Cluster(tmp_path) as cluster:
        cluster.apply(documents("multi-node"))
        job = Job(cluster, "lmdist-train")
        job.run(until=lambda: ...)
        job.drain(0)
        assert job.run() == "Complete"

A pod is what its template says (pods.py) in a sandbox of bubblewrap on a host of its own (hosts.py): a new pod has a new
address. Its names are those that the Services of the manifest publish, and the other pods see them a little later, as by DNS.
What a cluster does and this does not stands in IGNORED, here and in pods.py.
"""

from __future__ import annotations

import itertools
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import psutil

from support.hosts import ROOT, Host, Sandbox, first_process, hosts
from support.manifests import JOB_INDEX, JOB_NAME, Document, selects
from support.pods import Container, read, read_pod

NODES = 8
"""Addresses that the pods of a cluster have in turn."""
NAME_SECONDS = 2.0
"""After which the name of a new pod resolves to it; until then it resolves to the pod before."""
SHARED_MEMORY = 64 * 2**20
"""Bytes of a container's /dev/shm where the manifest mounts nothing there."""
IGNORED: Mapping[str, str] = {
    "Deployment": "a test starts as many of its pods as it likes",
    "HorizontalPodAutoscaler": "a test starts as many pods as it likes",
    "NetworkPolicy": "the switch of the hosts forwards everything",
    "PodDisruptionBudget": "a test drains as it likes",
    "ServiceAccount": "there is no API server",
}
"""Kinds of objects that have no effect here."""
IMAGE = {
    "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
    "PYTHONPATH": f"{ROOT}:{ROOT / 'export'}",
    "LANG": "C.UTF-8",
    "HOME": "/home/lmdist",
    "USER": "lmdist",
    "XDG_CACHE_HOME": "/tmp/cache",
    "MPLCONFIGDIR": "/tmp/matplotlib",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "ORT_DISABLE_TELEMETRY": "1",
    "PYTHONUNBUFFERED": "1",
    "OMP_NUM_THREADS": "1",
}
"""The environment of k8s/Dockerfile, with the Python of the tests; a rank has one thread, as in all tests."""


@dataclass
class RunningPod:
    """A pod from its start on."""

    name: str
    labels: Mapping[str, str]
    container: Container
    host: Host
    """Where it runs; its `names` are the pod's own /etc/hosts."""
    box: Sandbox
    log: Path
    process: subprocess.Popen[bytes]
    started: float
    index: int = 0
    disrupted: bool = False
    """Whether it has the condition DisruptionTarget."""
    kill_at: float | None = None
    """When it is killed, once it has been asked to stop."""
    hook: subprocess.Popen[bytes] | None = None
    exit_code: int | None = None

    def stop(self) -> None:
        """Stop it as the kubelet does: its hook, SIGTERM, and SIGKILL after the grace."""
        if self.kill_at is not None:
            return
        self.kill_at = time.monotonic() + self.container.grace_seconds
        if self.container.before_stop:
            self.hook = subprocess.Popen(self.inside(*self.container.before_stop), stdout=subprocess.DEVNULL)
        else:
            self.send(signal.SIGTERM)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to its process 1, if it still has one."""
        for process in self.processes()[:1]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def look(self) -> None:
        """Do what is due."""
        if self.hook and self.hook.poll() is not None:
            self.hook = None
            self.send(signal.SIGTERM)
        if self.kill_at and time.monotonic() > self.kill_at and self.process.poll() is None:
            self.host.kill_all()
        if (code := self.process.poll()) is not None:
            self.exit_code = code if code >= 0 else 128 - code

    def inside(self, *command: str) -> list[str]:
        """Return a command line that runs a command in the pod, as kubectl exec does."""
        container = self.container
        enter = ["nsenter", f"--target={first_process(self.process).pid}", "--mount", "--pid", "--net", "--uts", "--ipc"]
        rights = ["setpriv", f"--reuid={container.user}", f"--regid={container.group}", "--clear-groups", "--no-new-privs"]
        variables = [f"{name}={value}" for name, value in self.box.environment.items()]
        return [*enter, *rights, "env", "--ignore-environment", *variables, *command]

    def processes(self) -> list[psutil.Process]:
        """Return all of its processes, process 1 first; none once it has finished."""
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            first = first_process(self.process)
            return [first, *first.children(recursive=True)]
        return []

    def writable(self) -> set[str]:
        """Return the writable places of its file systems, except for a container's own /proc and /dev."""
        lines = Path(f"/proc/{first_process(self.process).pid}/mountinfo").read_text().splitlines()
        places = {line.split()[4] for line in lines if "rw" in line.split()[5].split(",")}
        return {place for place in places if place == "/dev/shm" or not place.startswith(("/proc", "/dev"))}

    def printed(self) -> str:
        """Return its log."""
        return self.log.read_text(errors="replace")


@dataclass
class Cluster:
    """A namespace with its objects and its running pods, which are terminated when its context ends."""

    folder: Path
    objects: dict[tuple[str, str], Document] = field(default_factory=dict)
    pods: list[RunningPod] = field(default_factory=list)
    published: dict[str, str] = field(default_factory=dict)
    """Addresses by name, as all pods resolve them."""

    def __enter__(self) -> Self:
        self.stack = ExitStack()
        self.nodes = itertools.cycle(self.stack.enter_context(hosts(*(f"node-{number}" for number in range(NODES)))))
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()  # kills all processes on the hosts
        for process in (process for pod in self.pods for process in (pod.process, pod.hook) if process):
            process.wait(timeout=60)

    def apply(self, documents: Sequence[Document]) -> None:
        """Add rendered objects."""
        known = {"Job", "Service", "ConfigMap", "Secret", "PersistentVolumeClaim", *IGNORED}
        for document in documents:
            if document["kind"] not in known:
                raise NotImplementedError(f"an object of the kind {document['kind']}")
            self.objects[document["kind"], document["metadata"]["name"]] = document

    @property
    def claims(self) -> Path:
        """The folder of the claims' folders."""
        return self.folder / "claims"

    def start(self, template: Document, name: str, hostname: str = "", **more: Mapping[str, str]) -> RunningPod:
        """Start a pod of a template; `more` are labels and annotations that a controller adds."""
        read("template", template, "metadata spec")
        own = template.get("metadata", {})
        metadata = {key: {**own.get(key, {}), **more.get(key, {})} for key in ("labels", "annotations")}
        scratch = self.folder / "pods" / name
        scratch.mkdir(parents=True)
        facts = {**metadata, "name": name, "namespace": "lmdist"}
        objects = list(self.objects.values())
        container = read_pod(template["spec"], facts, hostname or name, objects, self.claims, scratch)
        assert len(self.running()) < NODES, "no address is free"
        node = next(node for node in self.nodes if node.address not in {pod.host.address for pod in self.running()})
        host = replace(node, name=container.hostname, names=scratch / "hosts")
        host.names.touch()
        variables = {**IMAGE, "HOSTNAME": container.hostname, **container.environment}
        empty = {"/dev/shm": SHARED_MEMORY, **container.empty}
        folders = (container.mounts, container.read_only, empty)
        box = Sandbox(host, variables, *folders, container.user, container.group, container.folder)
        log = scratch / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(box.command(*container.command), stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        pod = RunningPod(name, metadata["labels"], container, host, box, log, process, time.monotonic())
        self.pods.append(pod)
        self.publish()
        return pod

    def running(self) -> list[RunningPod]:
        """Return the pods that have not finished."""
        return [pod for pod in self.pods if pod.exit_code is None]

    def look(self) -> None:
        """Look at all pods once."""
        for pod in self.running():
            pod.look()
        self.publish()

    def publish(self) -> None:
        """Write each pod's /etc/hosts: its own names at once, those of the others a little after they have changed."""
        now = time.monotonic()
        ready = [pod for pod in self.running() if now - pod.started >= NAME_SECONDS]
        # The names of a finished pod resolve until another pod has them.
        self.published |= {name: pod.host.address for pod in ready for name in self.names(pod)}
        shared = [f"{address} {name}" for name, address in self.published.items()]
        for pod in self.running():
            subdomain = pod.container.subdomain
            own = [pod.host.name, *([f"{pod.host.name}.{subdomain}.lmdist.svc.cluster.local"] if subdomain else [])]
            text = "\n".join(["127.0.0.1 localhost", f"{pod.host.address} {' '.join(own)}", *shared, ""])
            if pod.host.names.read_text() != text:
                pod.host.names.write_text(text)  # not renamed into its place: it is mounted in the pod

    def names(self, pod: RunningPod) -> list[str]:
        """Return the names that the Services give a pod: HOST.SUBDOMAIN, and that of a Service with the same ports."""
        found = []
        for (kind, name), document in self.objects.items():
            if kind != "Service" or not selects({"matchLabels": document["spec"]["selector"]}, dict(pod.labels)):
                continue
            targets = {port.get("targetPort", port["port"]): port["port"] for port in document["spec"]["ports"]}
            if document["spec"].get("clusterIP") == "None":
                found += [f"{pod.container.hostname}.{name}"] if name == pod.container.subdomain else []
            elif all(pod.container.ports.get(target, target) == port for target, port in targets.items()):
                found.append(name)  # nothing here translates ports
        return [f"{name}{domain}" for name in found for domain in ("", ".lmdist", ".lmdist.svc")]

    def wait(self, until: Callable[[], bool], seconds: float) -> None:
        """Look at the pods until a condition holds; TimeoutError after `seconds`."""
        limit = time.monotonic() + seconds
        while True:
            self.look()
            if until():
                return
            if time.monotonic() > limit:
                logs = [f"{pod.name} ({pod.exit_code}): {pod.printed()[-3000:]}" for pod in self.pods]
                raise TimeoutError(f"waited {seconds:.0f} s; the logs of the pods are\n" + "\n".join(logs))
            time.sleep(0.1)


class Job:
    """The controller of one Job."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        """Start the pods of a Job of the cluster."""
        self.cluster, self.name = cluster, name
        self.ended: list[RunningPod] = []
        self.active: dict[int, RunningPod] = {}
        self.completed: set[int] = set()
        self.failures = 0
        """Of the pods whose failure counts."""
        self.condition = ""
        """Complete, or Failed with its reason; empty until then."""
        names = "completionMode completions parallelism backoffLimit activeDeadlineSeconds podFailurePolicy template"
        fixed = {"podReplacementPolicy": ["Failed"], "suspend": [False, None]}
        spec = cluster.objects["Job", name]["spec"]
        read("Job", spec, f"{names} ttlSecondsAfterFinished", **fixed)  # a test ends long before a Job is deleted
        self.indexed = spec.get("completionMode") == "Indexed"
        self.completions, self.parallelism = spec.get("completions", 1), spec.get("parallelism", 1)
        self.backoff_limit = spec.get("backoffLimit", 6)
        self.deadline = time.monotonic() + spec.get("activeDeadlineSeconds", float("inf"))
        self.rules = spec.get("podFailurePolicy", {"rules": []})["rules"]
        self.template = spec["template"]
        assert self.template["spec"]["restartPolicy"] == "Never", "the controller restarts pods, not the kubelet"
        assert self.indexed or self.completions == 1, "only Indexed Jobs have several pods here"
        self.look()

    def look(self) -> None:
        """Judge the pods that have finished, and start those that are missing."""
        for index, pod in list(self.active.items()):
            if pod.exit_code is not None:
                del self.active[index]
                self.ended.append(pod)
                self.judge(pod)
        if time.monotonic() > self.deadline:
            self.end("Failed: DeadlineExceeded")
        if len(self.completed) == self.completions:
            self.end("Complete")
        for index in range(0 if self.condition else self.completions):
            if index not in self.completed | set(self.active) and len(self.active) < self.parallelism:
                self.active[index] = self.start(index)

    def start(self, index: int) -> RunningPod:
        """Start a pod of an index, with what the controller adds to its template."""
        letters = "".join(random.Random().choices("bcdfghjklmnpqrstvwxz2456789", k=5))
        number = {JOB_INDEX: str(index)} if self.indexed else {}
        hostname = f"{self.name}-{index}" if self.indexed else ""
        labels = {JOB_NAME: self.name, "job-name": self.name, **number}
        name = f"{hostname or self.name}-{letters}"
        pod = self.cluster.start(self.template, name, hostname, labels=labels, annotations=number)
        pod.index = index
        return pod

    def judge(self, pod: RunningPod) -> None:
        """Apply the first rule of the podFailurePolicy that fits a finished pod."""
        if pod.exit_code == 0:
            self.completed.add(pod.index)
        if pod.exit_code == 0 or self.condition:
            return
        action = next((rule["action"] for rule in self.rules if self.fits(rule, pod)), "Count")
        if action == "FailJob":
            self.end("Failed: PodFailurePolicy")
        elif action == "Count":
            self.failures += 1
            if self.failures > self.backoff_limit:
                self.end("Failed: BackoffLimitExceeded")
        elif action != "Ignore":
            raise NotImplementedError(f"podFailurePolicy: {action}")

    def fits(self, rule: Document, pod: RunningPod) -> bool:
        """Return whether a rule of the podFailurePolicy fits a finished pod."""
        read("rule", rule, "action onExitCodes", onPodConditions=[None, [{"type": "DisruptionTarget", "status": "True"}]])
        if "onPodConditions" in rule:
            return pod.disrupted
        codes = read("onExitCodes", rule["onExitCodes"], "containerName values", operator=["In"])
        return codes.get("containerName", pod.container.name) == pod.container.name and pod.exit_code in codes["values"]

    def end(self, condition: str) -> None:
        """Set the condition of the Job, and stop its pods."""
        self.condition = self.condition or condition
        for pod in self.active.values():
            pod.stop()

    def drain(self, index: int) -> None:
        """Evict a pod: its node is drained, or a pod of higher priority preempts it."""
        self.active[index].disrupted = True
        self.active[index].stop()

    def lose(self, index: int) -> None:
        """Lose the node of a pod with all of its processes."""
        self.active[index].disrupted = True
        self.active[index].host.kill_all()

    def kill(self, index: int) -> None:
        """Kill the container of a pod, as the kernel does when it exceeds its memory."""
        self.active[index].send(signal.SIGKILL)

    def run(self, until: Callable[[], bool] = lambda: False, seconds: float = 300.0) -> str:
        """Continue until a condition holds or the Job has finished with all its pods; return the condition of the Job."""

        def reached() -> bool:
            self.look()
            return until() or bool(self.condition and not self.active)

        self.cluster.wait(reached, seconds)
        return self.condition

    def exit_codes(self) -> Counter[int | None]:
        """Return the exit codes of the pods that have finished."""
        return Counter(pod.exit_code for pod in self.ended)

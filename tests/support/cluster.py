"""Kubernetes without a cluster: pods on this machine, and a Job controller for them.

    with Cluster(tmp_path) as cluster:
        cluster.apply(documents("multi-node"))
        job = Job(cluster, "lmdist-train")
        job.run(until=lambda: ...)
        job.drain(0)
        assert job.run() == "Complete"

A pod is what its template says (pods.py) in a box of bubblewrap's on a host of its own (hosts.py): a new pod has a new
address. Its names are those that the Services of the manifest give it, and the others hear of them a little later, as by DNS.
What a cluster does and this does not: IGNORED, here and in pods.py.
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
from types import TracebackType
from typing import Any, Self

import psutil

from support.hosts import ROOT, Host, Pod, first_process, hosts
from support.manifests import Document, selects
from support.pods import Container, Fields, Namespace, read_pod

NODES = 8
"""Addresses that the pods of a cluster have in turn."""
NAME_SECONDS = 2.0
"""After which the other pods find a new pod by its name; until then they find the one before."""
SHARED_MEMORY = 64 * 2**20
"""Bytes of a container's /dev/shm where the manifest mounts nothing there."""
IGNORED: Mapping[str, str] = {
    "Deployment": "a test starts as many of its pods as it likes",
    "HorizontalPodAutoscaler": "a test starts as many pods as it likes",
    "NetworkPolicy": "the hosts' switch forbids nothing",
    "PodDisruptionBudget": "a test drains as it likes",
    "ServiceAccount": "there is no API server to ask anything of",
}
"""Kinds of objects that are read by nobody, or by a test alone."""
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
"""The image's environment, as k8s/Dockerfile has it, except where Python is; a rank has one thread, as in all tests."""


@dataclass
class RunningPod:
    """A pod from its start on."""

    name: str
    labels: Mapping[str, str]
    container: Container
    host: Host
    """Where it runs; its `names` are the pod's own /etc/hosts."""
    box: Pod
    log: Path
    process: subprocess.Popen[bytes]
    started: float
    index: int = 0
    disrupted: bool = False
    """Whether it has the condition DisruptionTarget: the cluster took it away."""
    kill_at: float | None = None
    """When it is killed, where it has been asked to stop."""
    hook: subprocess.Popen[bytes] | None = None
    exit_code: int | None = None

    def stop(self) -> None:
        """Ask it to end as the kubelet does: its hook, SIGTERM, and SIGKILL after the grace."""
        if self.kill_at is not None:
            return
        self.kill_at = time.monotonic() + self.container.grace_seconds
        if self.container.before_stop:
            self.hook = subprocess.Popen(self.inside(*self.container.before_stop), stdout=subprocess.DEVNULL)
        else:
            self.send(signal.SIGTERM)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to its process 1, if it still has one."""
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            first_process(self.process).send_signal(number)

    def look(self) -> bool:
        """Do what is due; gives whether it runs."""
        if self.hook and self.hook.poll() is not None:
            self.hook = None
            self.send(signal.SIGTERM)
        if self.kill_at and time.monotonic() > self.kill_at and self.process.poll() is None:
            self.host.kill_all()
        code = self.process.poll()
        if code is not None:
            self.exit_code = code if code >= 0 else 128 - code
        return code is None

    def inside(self, *command: str) -> list[str]:
        """A command line that runs a command in the running pod, as kubectl exec does."""
        container = self.container
        enter = ["nsenter", f"--target={first_process(self.process).pid}", "--mount", "--pid", "--net", "--uts", "--ipc"]
        rights = ["setpriv", f"--reuid={container.user}", f"--regid={container.group}", "--clear-groups", "--no-new-privs"]
        variables = [f"{name}={value}" for name, value in self.box.environment.items()]
        return [*enter, *rights, "env", "--ignore-environment", *variables, *command]

    def processes(self) -> list[psutil.Process]:
        """All that runs in it; nothing where it has ended."""
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            first = first_process(self.process)
            return [first, *first.children(recursive=True)]
        return []

    def writable(self) -> set[str]:
        """Where its file systems can be written to, beside /proc and /dev, which are a container's own."""
        lines = Path(f"/proc/{first_process(self.process).pid}/mountinfo").read_text().splitlines()
        places = {line.split()[4] for line in lines if "rw" in line.split()[5].split(",")}
        return {place for place in places if place == "/dev/shm" or not place.startswith(("/proc", "/dev"))}

    def said(self) -> str:
        """Its log."""
        return self.log.read_text(errors="replace")


@dataclass
class Cluster:
    """A namespace with its objects and its running pods; all of them are gone when its context ends."""

    folder: Path
    """For the claims, and what the pods need besides."""
    objects: dict[tuple[str, str], Document] = field(default_factory=dict)
    pods: list[RunningPod] = field(default_factory=list)
    published: dict[str, str] = field(default_factory=dict)
    """Addresses by name, as all pods know them."""

    def __enter__(self) -> Self:
        self.stack = ExitStack()
        self.nodes = itertools.cycle(self.stack.enter_context(hosts(*(f"node-{number}" for number in range(NODES)))))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stack.close()  # kills all that runs on the hosts
        for pod in self.pods:
            for process in filter(None, (pod.process, pod.hook)):
                process.wait(timeout=60)

    def apply(self, documents: Sequence[Document]) -> None:
        """Take in rendered objects."""
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
        given = template.get("metadata", {})
        with Fields("template", template) as fields:
            fields.take("metadata", {})
            spec = fields.take("spec")
        metadata: dict[str, Any] = {key: {**given.get(key, {}), **more.get(key, {})} for key in ("labels", "annotations")}
        metadata |= {"name": name, "namespace": "lmdist"}
        scratch = self.folder / "pods" / name
        scratch.mkdir(parents=True)
        container = read_pod(spec, metadata, hostname or name, Namespace(self.objects, self.claims), scratch)
        assert len(self.running()) < NODES, "no address is free"
        node = next(node for node in self.nodes if node.address not in {pod.host.address for pod in self.running()})
        host = replace(node, name=container.hostname, names=scratch / "hosts")
        host.names.touch()
        box = put_into_box(container, host)
        log = scratch / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(box.command(*container.command), stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        pod = RunningPod(name, metadata["labels"], container, host, box, log, process, time.monotonic())
        self.pods.append(pod)
        self.publish()
        return pod

    def running(self) -> list[RunningPod]:
        """The pods that have not ended."""
        return [pod for pod in self.pods if pod.exit_code is None]

    def look(self) -> None:
        """Look after all pods, once."""
        for pod in self.running():
            pod.look()
        self.publish()

    def publish(self) -> None:
        """Tell the pods each other's names, each a little after it has changed; its own a pod knows at once."""
        now = time.monotonic()
        ready = [pod for pod in self.running() if now - pod.started >= NAME_SECONDS]
        names = {name: pod.host.address for pod in ready for name in self.names(pod)}
        # Who has just ended is still found, until another has the name.
        self.published |= names
        shared = [f"{address} {name}" for name, address in self.published.items()]
        for pod in self.running():
            own = [
                pod.host.name,
                *([f"{pod.host.name}.{pod.container.subdomain}.lmdist.svc.cluster.local"] * bool(pod.container.subdomain)),
            ]
            lines = ["127.0.0.1 localhost", f"{pod.host.address} {' '.join(own)}", *shared]
            text = "\n".join(lines) + "\n"
            if pod.host.names.read_text() != text:
                pod.host.names.write_text(text)  # not renamed into its place: it is mounted in the pod

    def names(self, pod: RunningPod) -> list[str]:
        """The names that the Services give a pod: HOST.SUBDOMAIN, and that of a Service which passes nothing on."""
        made = []
        for (kind, name), document in self.objects.items():
            if kind != "Service" or not selects({"matchLabels": document["spec"]["selector"]}, dict(pod.labels)):
                continue
            if document["spec"].get("clusterIP") != "None":
                # A Service whose ports are others than its pods' is called by nobody here.
                ports = [(port["port"], port.get("targetPort", port["port"])) for port in document["spec"]["ports"]]
                if all(pod.container.ports.get(target, target) == port for port, target in ports):
                    made.append(name)
            elif name == pod.container.subdomain:
                made.append(f"{pod.container.hostname}.{name}")
        return [f"{name}{domain}" for name in made for domain in ("", ".lmdist", ".lmdist.svc")]

    def wait(self, until: Callable[[], bool], seconds: float) -> None:
        """Look after the pods until something holds; it is an error if that takes longer than `seconds`."""
        limit = time.monotonic() + seconds
        while True:
            self.look()
            if until():
                return
            if time.monotonic() > limit:
                logs = [f"{pod.name} ({pod.exit_code}): {pod.said()[-3000:]}" for pod in self.pods]
                raise TimeoutError(f"waited {seconds:.0f} s in vain; the pods say\n" + "\n".join(logs))
            time.sleep(0.1)


class Job:
    """The controller of one Job."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        """Start the pods of a Job of the cluster."""
        self.cluster, self.name = cluster, name
        self.letters = random.Random()
        self.ended: list[RunningPod] = []
        self.active: dict[int, RunningPod] = {}
        self.completed: set[int] = set()
        self.failures = 0
        """Of pods that count."""
        self.condition = ""
        """Complete, Failed because of something, or nothing yet."""
        document = cluster.objects["Job", name]
        with Fields("Job", document["spec"]) as spec:
            self.indexed = spec.take("completionMode", "NonIndexed") == "Indexed"
            self.completions, self.parallelism = spec.take("completions", 1), spec.take("parallelism", 1)
            self.backoff_limit = spec.take("backoffLimit", 6)
            self.deadline = time.monotonic() + spec.take("activeDeadlineSeconds", float("inf"))
            self.rules = spec.take("podFailurePolicy", {"rules": []})["rules"]
            self.template = spec.take("template")
            spec.expect("podReplacementPolicy", "Failed")
            spec.expect("suspend", False, None)
            spec.take("ttlSecondsAfterFinished", None)  # the test is over long before
        assert self.template["spec"]["restartPolicy"] == "Never", "the controller restarts pods, not the kubelet"
        assert self.indexed or self.completions == 1, "only Indexed Jobs have several pods here"
        self.look()

    def look(self) -> None:
        """Judge the pods that have ended, and start those that are missing."""
        for index, pod in list(self.active.items()):
            if pod.exit_code is not None:
                del self.active[index]
                self.ended.append(pod)
                self.judge(pod)
        if time.monotonic() > self.deadline:
            self.end("Failed: DeadlineExceeded")
        if self.condition:
            return
        if len(self.completed) == self.completions:
            self.end("Complete")
        for index in range(0 if self.condition else self.completions):
            if index not in self.completed | set(self.active) and len(self.active) < self.parallelism:
                self.active[index] = self.start(index)

    def start(self, index: int) -> RunningPod:
        """Start a pod of an index, with what the controller adds to its template."""
        letters = "".join(self.letters.choices("bcdfghjklmnpqrstvwxz2456789", k=5))
        labels = {"batch.kubernetes.io/job-name": self.name, "job-name": self.name}
        if not self.indexed:
            return self.cluster.start(self.template, f"{self.name}-{letters}", labels=labels)
        number = {"batch.kubernetes.io/job-completion-index": str(index)}
        name = f"{self.name}-{index}"
        pod = self.cluster.start(self.template, f"{name}-{letters}", name, labels=labels | number, annotations=number)
        pod.index = index
        return pod

    def judge(self, pod: RunningPod) -> None:
        """Say what becomes of the Job because of a pod that has ended, by the first rule that fits."""
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

    def fits(self, given: Document, pod: RunningPod) -> bool:
        """Whether a rule of the podFailurePolicy is about such an end."""
        with Fields("rule", given) as rule:
            rule.take("action")
            conditions, codes = rule.take("onPodConditions", None), rule.take("onExitCodes", None)
        if conditions is not None:
            assert conditions == [{"type": "DisruptionTarget", "status": "True"}], conditions
            return pod.disrupted
        with Fields("onExitCodes", codes) as of:
            named, operator, values = of.take("containerName", None), of.take("operator"), of.take("values")
        return named in (None, pod.container.name) and (pod.exit_code in values) == {"In": True, "NotIn": False}[operator]

    def end(self, condition: str) -> None:
        """Say what has become of the Job, and end what still runs of it."""
        self.condition = self.condition or condition
        for pod in self.active.values():
            pod.stop()

    def drain(self, index: int) -> None:
        """Evict a pod: its node is drained, or somebody more important wants it."""
        self.active[index].disrupted = True
        self.active[index].stop()

    def lose(self, index: int) -> None:
        """Lose the node of a pod with all that runs there."""
        self.active[index].disrupted = True
        self.active[index].host.kill_all()

    def kill(self, index: int) -> None:
        """Kill the container of a pod, as the kernel does where it takes more memory than it may."""
        self.active[index].send(signal.SIGKILL)

    def run(self, until: Callable[[], bool] = lambda: False, seconds: float = 300.0) -> str:
        """Go on until something holds or the Job has ended with all its pods; gives its condition."""

        def reached() -> bool:
            self.look()
            return until() or bool(self.condition and not self.active)

        self.cluster.wait(reached, seconds)
        return self.condition

    def exit_codes(self) -> Counter[int | None]:
        """How the pods ended, as yet."""
        return Counter(pod.exit_code for pod in self.ended)


def put_into_box(container: Container, host: Host) -> Pod:
    """The container as a box of bubblewrap's on a host."""
    mounts: dict[str, Path] = {}
    read_only: dict[str, Path] = {}
    empty = {"/dev/shm": SHARED_MEMORY}
    for place, volume in container.mounts.items():
        if isinstance(volume.source, int):
            empty[place] = volume.source
        else:
            (read_only if volume.read_only else mounts)[place] = volume.source
    environment = {**IMAGE, "HOSTNAME": container.hostname, **container.environment}
    return Pod(host, environment, mounts, read_only, empty, container.user, container.group, container.folder)

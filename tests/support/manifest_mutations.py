"""Small changes to the rendered manifests, each wrong, under the rule that has to find it.

A place is written as OVERLAY KIND PATH. A path is made of keys, of the `name` of an entry of a list, or of its number; it may
begin with `job`, `pod` or `main`, which lead to the Job's specification, the pod's, or its first container, wherever that kind
has them. What lies there is replaced, removed (GONE), or made anew by a function of it. A place that is an overlay only is all
of its documents. At the end the same is done to the text of files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from support.manifests import COMPONENT, GPU, Document, Render, rendered

GONE = object()
"""In place of a value: remove it."""

JOBS = {
    "Job": "spec",
    "JobSet": "spec replicatedJobs node template spec",
    "TrainingRuntime": "spec template spec replicatedJobs node template spec",
}
PODS = {"Pod": "spec", "Deployment": "spec template spec"} | {kind: f"{path} template spec" for kind, path in JOBS.items()}


@dataclass(frozen=True)
class Mutation:
    """One wrong change, and the rule that has to find it."""

    rule: str
    what: str
    place: str
    value: Any

    def apply(self) -> Render:
        """The overlay with the change."""
        overlay, *path = self.place.split()
        render = rendered(overlay)
        if path:
            (document,) = (document for document in render.documents if document["kind"] == path[0])
            change(document, keys(*path), self.value)
        else:
            render.documents = self.value(render.documents)
        return render


def keys(kind: str, first: str, *rest: str) -> list[str]:
    """The keys of a path in a kind."""
    starts = {"job": JOBS.get(kind), "pod": PODS.get(kind), "main": f"{PODS.get(kind)} containers 0"}
    return [*(starts.get(first) or first).split(), *rest]


def change(document: Document, path: list[str], value: Any) -> None:
    """Replace, remove or make anew what lies under some keys."""
    holder: Any = document
    for key in path[:-1]:
        holder = holder[number(holder, key)]
    last = number(holder, path[-1])
    if value is GONE:
        del holder[last]
    else:
        before = holder.get(last) if isinstance(holder, dict) else holder[last]
        holder[last] = value(before) if callable(value) else value


def number(holder: dict[str, Any] | list[Any], key: str) -> str | int:
    """What a key is to a list: the number of the entry that is called so, or the number itself."""
    if isinstance(holder, dict):
        return key
    names = [entry.get("name") if isinstance(entry, dict) else None for entry in holder]
    return names.index(key) if key in names else int(key)


def also(entry: Any) -> Callable[[list[Any] | None], list[Any]]:
    """A change that adds to a list."""
    return lambda before: [*(before or []), entry]


def replaced(old: str, new: str) -> Callable[[str], str]:
    """A change of a text."""

    def made(text: str) -> str:
        assert old in text, f"there is no {old!r} any more"
        return text.replace(old, new)

    return made


def in_kind(kind: str, change_it: Callable[[Document], None]) -> Callable[[list[Document]], list[Document]]:
    """A change of the documents of a kind."""

    def made(documents: list[Document]) -> list[Document]:
        for document in documents:
            if document["kind"] == kind:
                change_it(document)
        return documents

    return made


def recipe(old: str, new: str) -> Callable[[list[Document]], list[Document]]:
    """A change of the recipe, whose ConfigMap has a hash in its name."""
    return in_kind("ConfigMap", lambda document: change(document, ["data", "recipe.toml"], replaced(old, new)))


def claims(*modes: str) -> Callable[[list[Document]], list[Document]]:
    """Claims of other access modes."""
    return in_kind("PersistentVolumeClaim", lambda document: change(document, ["spec", "accessModes"], list(modes)))


CORPUS: dict[str, list[tuple[str, str, Any]]] = {
    # manifest_schemas.py
    "kubernetes_schemas": [
        ("a number in quotes", "base Job spec completions", "1"),
        ("a field that Kubernetes does not know", "base Job pod restartpolicy", "Never"),
        ("a kind without a schema", "base Service kind", "Servise"),
        ("an API version that is gone", "serve PodDisruptionBudget apiVersion", "policy/v1beta1"),
        ("a field that came after 1.29", "multi-node Job spec managedBy", "example.com/controller"),
        ("a wrong field in a JobSet's Job", "jobset JobSet job nodes", 2),
        ("a wrong field in a runtime's pod", "trainjob TrainingRuntime pod gpus", 4),
    ],
    "trainer_models": [
        ("a list for a name", "trainjob TrainJob spec runtimeRef name", ["lmdist"]),
        ("a field that JobSet does not know", "jobset JobSet spec network dnsHostnames", True),
        ("processes a node as a word", "trainjob TrainJob spec trainer numProcPerNode", "gpu"),
        ("processes a node in the runtime", "trainjob TrainingRuntime spec mlPolicy torch numProcPerNode", 4),
        ("a replicated job without a name", "jobset JobSet spec replicatedJobs 0 name", GONE),
        ("an old version of JobSet", "jobset JobSet apiVersion", "jobset.x-k8s.io/v1alpha1"),
    ],
    "job_set_failures": [
        ("an action that is none", "jobset JobSet spec failurePolicy rules 0 action", "Fail"),
        ("hyphens in a failure rule's name", "jobset JobSet spec failurePolicy rules 0 name", "no-more"),
        ("an unknown reason", "jobset JobSet spec failurePolicy rules 0 onJobFailureReasons", also("Bored")),
        (
            "a deadline that starts anew",
            "trainjob TrainingRuntime spec template spec failurePolicy rules 0 onJobFailureReasons",
            ["PodFailurePolicy"],
        ),
        ("no restarts", "jobset JobSet spec failurePolicy maxRestarts", GONE),
    ],
    "kueue_fields": [
        ("a field that Kueue renamed", "kueue ClusterQueue spec cohort", "all"),
        ("an old version of Kueue", "kueue LocalQueue apiVersion", "kueue.x-k8s.io/v1alpha1"),
        ("a preemption that is none", "kueue ClusterQueue spec preemption withinClusterQueue", "Always"),
    ],
    # manifest_objects.py
    "names_are_dns_names": [
        ("an underscore in a name", "mlflow PersistentVolumeClaim metadata name", "ml_flow"),
        ("a Service that begins with a digit", "base Service metadata name", "1lmdist"),
        ("a volume with a capital", "base Job pod volumes tmp name", "Tmp"),
        ("names of pods that are too long", "base Job metadata name", "lmdist-train-" + "x" * 50),
    ],
    "objects_are_there_once": [
        ("a document twice", "base", lambda documents: [*documents, documents[0]]),
    ],
    "entries_are_there_once": [
        ("a variable twice", "base Job main env", also({"name": "PET_NNODES", "value": "2"})),
        ("two mounts at one place", "base Job main volumeMounts", also({"name": "tmp", "mountPath": "/runs"})),
    ],
    "namespaces_agree": [
        ("another namespace for one", "base Service metadata namespace", "default"),
        ("no namespace", "kueue LocalQueue metadata namespace", GONE),
        ("a namespace for a kind of the cluster", "kueue ClusterQueue metadata namespace", "lmdist"),
    ],
    "what_is_needed_comes_first": [
        ("a TrainJob before its runtime", "trainjob", lambda documents: documents[::-1]),
    ],
    "labels_agree": [
        ("pods of no part", "export Job spec template metadata labels app.kubernetes.io/component", GONE),
        ("another component on the Job", "base Job metadata labels app.kubernetes.io/component", "training"),
        ("pods that are not lmdist's", "mlflow Deployment spec template metadata labels app.kubernetes.io/name", "mlflow"),
    ],
    "what_is_named_is_there": [
        ("a recipe without its hash", "jobset JobSet pod volumes recipe configMap name", "lmdist-recipe"),
        ("a claim that is not there", "export Job pod volumes runs persistentVolumeClaim claimName", "runs"),
        ("a secret that must be there", "base Job pod volumes mlflow-credentials secret optional", False),
        ("a key that is not there", "serve Deployment main env MLFLOW_TRACKING_URI valueFrom configMapKeyRef key", "url"),
        ("an account that is not there", "shell Pod spec serviceAccountName", "admin"),
    ],
    # manifest_pods.py
    "pods_are_restricted": [
        ("settings of the kernel", "base Job pod securityContext sysctls", [{"name": "net.core.somaxconn", "value": "1024"}]),
        ("a pod that may be root", "mlflow Deployment pod securityContext runAsNonRoot", GONE),
        ("a user that is root", "base Job main securityContext runAsUser", 0),
        ("privileges that can be gained", "serve Deployment main securityContext allowPrivilegeEscalation", GONE),
        ("a capability", "base Job main securityContext capabilities add", ["SYS_PTRACE"]),
        ("no seccomp profile", "trainjob TrainingRuntime pod securityContext seccompProfile", GONE),
        ("the host's network", "jobset JobSet pod hostNetwork", True),
        ("a folder of the host", "base Job pod volumes data", {"name": "data", "hostPath": {"path": "/data"}}),
        (
            "an init container that is privileged",
            "base Job pod initContainers",
            [{"name": "tune", "securityContext": {"privileged": True}}],
        ),
    ],
    "pods_need_no_cluster": [
        ("an account with tokens", "base ServiceAccount automountServiceAccountToken", True),
        ("a token", "export Job pod automountServiceAccountToken", GONE),
        ("variables of all Services", "base Job pod enableServiceLinks", GONE),
    ],
    "roots_are_read_only": [
        ("a root that can be written", "shell Pod spec containers shell securityContext readOnlyRootFilesystem", False),
        ("a /tmp that cannot", "serve Deployment main volumeMounts tmp mountPath", "/temp"),
        ("a /tmp without a limit", "base Job pod volumes tmp emptyDir", {}),
    ],
    "images_are_pinned": [
        ("the latest image", "mlflow Deployment main image", "ghcr.io/mlflow/mlflow:latest"),
        ("a registry's port for a tag", "base Job main image", "registry.example.com:5000/lmdist-train"),
        ("our image of another version", "serve Deployment main image", "registry.example.com/team/lmdist-sample:0.0.9"),
    ],
    "mlflow_is_as_new_as_its_clients": [
        ("an old MLflow", "mlflow Deployment main image", "ghcr.io/mlflow/mlflow:v3.9.0"),
        ("an MLflow of the next major version", "mlflow Deployment main image", "ghcr.io/mlflow/mlflow:v4.0.0"),
    ],
    "commands_exist": [
        ("a command that is not ours", "base Job main command", ["lmdist-run"]),
        ("a hook that is not there", "serve Deployment main lifecycle preStop exec command", ["drain", "5"]),
    ],
    "variables_have_values": [
        ("a variable after its use", "base Job main env", lambda entries: [*entries[1:], entries[0]]),
        ("a variable that is not there", "base Job main args 1", "--run_folder=/runs/$(NAME)"),
        (
            "a label that only a JobSet's pods have",
            "base Job main env JOB_NAME valueFrom fieldRef fieldPath",
            "metadata.labels['jobset.sigs.k8s.io/jobset-name']",
        ),
        ("a variable with value and source", "jobset JobSet main env JOB_NAME value", "lmdist-train"),
    ],
    "mounts_have_volumes": [
        ("a mount without a volume", "base Job pod volumes", lambda volumes: volumes[1:]),
        ("a volume without a mount", "export Job main volumeMounts", lambda mounts: mounts[1:]),
    ],
    "claims_can_be_shared": [
        ("a claim on one node for many", "multi-node", claims("ReadWriteOnce")),
        (
            "pods that may be on several nodes",
            "cpu-smoke Job pod affinity podAffinity requiredDuringSchedulingIgnoredDuringExecution 0 topologyKey",
            "topology.kubernetes.io/zone",
        ),
    ],
    "claims_can_be_written": [
        ("volumes of root's", "export Job pod securityContext fsGroup", GONE),
    ],
    "databases_have_one_writer": [
        ("two servers of one database", "mlflow Deployment spec replicas", 2),
        ("an update with two writers", "mlflow Deployment spec strategy", GONE),
    ],
    "spreading_selects_pods": [
        (
            "spread over others",
            "serve Deployment pod topologySpreadConstraints 0 labelSelector matchLabels app.kubernetes.io/component",
            "server",
        ),
        (
            "near to nobody",
            "shell Pod spec affinity podAffinity preferredDuringSchedulingIgnoredDuringExecution 0 podAffinityTerm",
            {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": {COMPONENT: "node"}}},
        ),
    ],
    "requests_are_limits": [
        ("a request below the limit", "base Job main resources requests memory", "16Gi"),
        ("no limit of cpu", "serve Deployment main resources limits cpu", GONE),
    ],
    "gpus_can_be_had": [
        ("half a GPU", "base Job main resources limits nvidia.com/gpu", "500m"),
        ("no toleration", "multi-node Job pod tolerations", GONE),
    ],
    "memory_volumes_fit": [
        ("more shared memory than memory", "cpu-smoke Job pod volumes shared-memory emptyDir sizeLimit", "4Gi"),
        ("shared memory without a limit", "base Job pod volumes shared-memory emptyDir", {"medium": "Memory"}),
    ],
    "work_folders_are_mounted": [
        ("a working directory in the image", "base Job main workingDir", "/home/lmdist"),
    ],
    "probes_reach_a_port": [
        ("a probe of no path", "serve Deployment main readinessProbe httpGet path", "health"),
        ("a liveness that has to be shown twice", "mlflow Deployment main livenessProbe successThreshold", 2),
        ("a probe of no port", "serve Deployment main ports http name", "web"),
        ("no readiness probe", "mlflow Deployment main readinessProbe", GONE),
    ],
    "probes_are_patient": [
        ("ten seconds to start", "serve Deployment main startupProbe failureThreshold", 5),
        (
            "killed before it is unready",
            "mlflow Deployment main livenessProbe",
            {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": 5},
        ),
    ],
    "hooks_end_in_time": [
        ("a hook as long as the grace", "serve Deployment main lifecycle preStop exec command", ["sleep", "60"]),
    ],
    # manifest_jobs.py
    "nodes_agree": [
        ("fewer pods at a time than in all", "multi-node Job spec parallelism", 1),
        ("more nodes than torchrun is told", "cpu-smoke Job main env PET_NNODES value", "3"),
        ("pods without numbers", "jobset JobSet job completionMode", "NonIndexed"),
    ],
    "torchrun_is_told": [
        ("a variable that torchrun lacks", "base Job main env PET_NPROC_PER_NODE", GONE),
        ("a variable that is the Trainer's", "trainjob TrainingRuntime main env", also({"name": "PET_NNODES", "value": "2"})),
        ("the same rank for all", "multi-node Job main env PET_NODE_RANK", {"name": "PET_NODE_RANK", "value": "0"}),
        ("a flag that wins over a variable", "base Job main args", also("--nproc-per-node=2")),
    ],
    "all_find_the_first_node": [
        ("a subdomain that is not the JobSet's", "jobset JobSet pod subdomain", "lmdist"),
        ("the address of another job", "cpu-smoke Job main env PET_MASTER_ADDR value", "lmdist-train-0.lmdist-train"),
        ("the address of another Service", "base Job main env PET_MASTER_ADDR value", "$(JOB_NAME)-0.lmdist"),
        ("no subdomain", "base Job pod subdomain", GONE),
        ("a Service with an address of its own", "base Service spec clusterIP", GONE),
        ("names for ready pods only", "kueue Service spec publishNotReadyAddresses", False),
        ("a Service for other pods", "base Service spec selector app.kubernetes.io/component", "node"),
        ("the name that a plain Job's pod has", "jobset JobSet main env PET_MASTER_ADDR value", "$(JOB_NAME)-0.$(JOB_NAME)"),
        ("a subdomain that JobSets share", "jobset JobSet spec network subdomain", "lmdist-train"),
        ("JobSet's pods without names", "jobset JobSet spec network enableDNSHostnames", False),
    ],
    "ports_agree": [
        ("another port for torchrun", "base Job main env PET_MASTER_PORT value", "29400"),
        ("another port of the Service", "base Service spec ports rendezvous port", 29400),
        ("a port beside the Trainer's", "trainjob TrainingRuntime main ports", [{"containerPort": 29500}]),
    ],
    "ranks_match_gpus": [
        ("a rank on four GPUs", "multi-node Job main env PET_NPROC_PER_NODE value", "1"),
        ("a rank for each of no GPUs", "cpu-smoke Job main env PET_NPROC_PER_NODE value", "gpu"),
    ],
    "train_jobs_fit_their_runtimes": [
        ("a TrainJob without a trainer", "trainjob TrainJob spec trainer", GONE),
        ("a runtime for another framework", "trainjob TrainingRuntime spec mlPolicy", {"numNodes": 2, "jax": {}}),
        ("a runtime that is not there", "trainjob TrainJob spec runtimeRef name", "torch"),
        ("a runtime of the cluster", "trainjob TrainJob spec runtimeRef kind", GONE),
        ("other nodes in the runtime", "trainjob TrainingRuntime spec mlPolicy numNodes", 1),
        ("fewer processes than GPUs", "trainjob TrainJob spec trainer numProcPerNode", 1),
        ("a container that the Trainer does not find", "trainjob TrainingRuntime main name", "train"),
    ],
    "sets_hold_one_job": [
        (
            "a Job that the Trainer does not find",
            "trainjob TrainingRuntime spec template spec replicatedJobs node template metadata labels",
            GONE,
        ),
        ("two Jobs in a JobSet", "jobset JobSet spec replicatedJobs node replicas", 2),
    ],
    "jobs_end": [
        ("a Job that stays for ever", "export Job spec ttlSecondsAfterFinished", GONE),
        ("pods that start anew by themselves", "base Job pod restartPolicy", "OnFailure"),
        ("a successor too early", "base Job spec podReplacementPolicy", "TerminatingOrFailed"),
        ("no end of trying", "export Job spec activeDeadlineSeconds", GONE),
        ("a JobSet that stays for ever", "jobset JobSet spec ttlSecondsAfterFinished", GONE),
        ("a Job that goes before its TrainJob", "trainjob TrainingRuntime job ttlSecondsAfterFinished", 60),
    ],
    "exit_codes_are_the_launchers": [
        ("all exit codes but these", "base Job spec podFailurePolicy rules 1 onExitCodes operator", "NotIn"),
        ("wrong usage, again and again", "base Job spec podFailurePolicy rules 1 onExitCodes values", [65, 66]),
        ("a stop that counts as failure", "trainjob TrainingRuntime job podFailurePolicy rules 2", GONE),
        ("exit codes out of order", "base Job spec podFailurePolicy rules 1 onExitCodes values", [66, 65, 64]),
        (
            "an export that is wrong, again and again",
            "export Job spec podFailurePolicy rules 1 onExitCodes values",
            [64, 65, 66],
        ),
    ],
    "failures_are_of_the_container": [
        ("exit codes of nobody", "multi-node Job spec podFailurePolicy rules 1 onExitCodes containerName", "train"),
    ],
    "disruptions_do_not_count": [
        ("a drained node that counts", "base Job spec podFailurePolicy rules 0", GONE),
        ("a drained node that comes second", "export Job spec podFailurePolicy rules", lambda rules: rules[::-1]),
    ],
    "there_is_time_to_save": [
        ("a timeout that cannot be read", "base", recipe("timeout_seconds = 120", "timeout_seconds = 'long'")),
        ("no time to save", "base Job pod terminationGracePeriodSeconds", 30),
        ("a timeout longer than the grace", "jobset", recipe("timeout_seconds = 120", "timeout_seconds = 300")),
    ],
    "recipes_are_read": [
        ("a recipe of another name", "base Job main args 0", "--config=/etc/lmdist/training.toml"),
        ("a setting that is none", "base", recipe("hidden_size", "hidden_sizes")),
        ("a flag that is none", "multi-node Job main args", also("--epochs=2")),
        ("a recipe elsewhere", "base Job main args 0", "--config=/etc/recipe.toml"),
        ("a run that is refused the second time", "base Job main args 2", "--resume=never"),
    ],
    "batches_are_shared_out": [
        ("a batch that cannot be shared out", "multi-node", recipe("global_batch = 64", "global_batch = 60")),
    ],
    "devices_match": [
        ("CUDA without GPUs", "cpu-smoke", recipe('device = "cpu"', 'device = "cuda"')),
        ("GPUs that nobody uses", "trainjob", recipe('device = "cuda"', 'device = "cpu"')),
    ],
    "folders_outlive_the_pod": [
        ("a run that goes with its pod", "base Job main args 1", "--run_folder=/tmp/$(JOB_NAME)"),
        ("data that cannot be made", "base Job main volumeMounts data readOnly", True),
        ("one folder for all runs", "kueue Job main args 1", "--run_folder=/runs/training"),
    ],
    "one_folder_has_one_text": [
        ("another text in the same folder", "cpu-smoke", recipe("lowercase = true", "lowercase = false")),
    ],
    "ranks_have_shared_memory": [
        ("shared memory on a disk", "multi-node Job pod volumes shared-memory emptyDir medium", GONE),
    ],
    "exports_take_a_run": [
        ("an export to nowhere", "export Job main args", ["/runs/lmdist-train"]),
        ("the run of another job", "export Job main args 0", "/runs/demo"),
        ("a flag that the export does not know", "export Job main args", also("--quantize=int8")),
        ("a bundle that goes with its pod", "export Job main args 1", "--output=/tmp/lmdist"),
    ],
    # manifest_services.py
    "selectors_hit_one_workload": [
        ("a Service without pods", "serve Service spec selector app.kubernetes.io/component", "server"),
        ("a Deployment of other pods", "mlflow Deployment spec selector matchLabels app.kubernetes.io/component", "tracking"),
        ("a budget for nobody", "serve PodDisruptionBudget spec selector matchLabels", {"app": "lmdist"}),
    ],
    "services_lead_to_ports": [
        ("a Service to another port", "serve Service spec ports http targetPort", 80),
        ("a port that nobody is let in to", "mlflow NetworkPolicy spec ingress 0 ports 0 port", 8080),
    ],
    "scaling_works": [
        ("nothing to scale", "serve HorizontalPodAutoscaler spec scaleTargetRef name", "serve"),
        ("two who say how many", "serve Deployment spec replicas", 2),
        ("a measure without a request", "serve HorizontalPodAutoscaler spec metrics 0 resource name", GPU),
        ("more pods at least than at most", "serve HorizontalPodAutoscaler spec minReplicas", 9),
    ],
    "nodes_can_be_drained": [
        ("a budget that lets nobody go", "serve PodDisruptionBudget spec maxUnavailable", 0),
        ("an update that cannot begin", "serve Deployment spec strategy rollingUpdate maxSurge", 0),
    ],
    "every_pod_has_a_policy": [
        ("pods without a policy", "base", lambda found: [d for d in found if d["kind"] != "NetworkPolicy"]),
        ("a policy for one direction", "shell NetworkPolicy spec policyTypes", ["Ingress"]),
    ],
    "policy_ports_are_there": [
        ("let out to another port", "export NetworkPolicy spec egress 1 ports 0 port", 80),
        ("let in to another port", "serve NetworkPolicy spec ingress 0 ports 0 port", "web"),
    ],
    "names_can_be_looked_up": [
        ("no names", "serve NetworkPolicy spec egress 0", GONE),
        ("names of pods only, by UDP only", "base NetworkPolicy spec egress 1 ports", lambda ports: ports[:1]),
    ],
    "nodes_can_talk": [
        ("nodes that do not hear each other", "trainjob NetworkPolicy spec ingress", GONE),
        ("nodes with one port", "multi-node NetworkPolicy spec egress 0 ports", [{"port": 29500}]),
    ],
    "mlflow_is_where_it_is_said_to_be": [
        (
            "an address without a Service",
            "export Job main env",
            lambda env: [{**env[0], "valueFrom": None, "value": "http://tracking:5000"}],
        ),
        ("MLflow not said", "base Job main env MLFLOW_TRACKING_URI", GONE),
        (
            "another port of MLflow",
            "base Job main env MLFLOW_TRACKING_URI",
            {"name": "MLFLOW_TRACKING_URI", "value": "http://mlflow:80"},
        ),
    ],
    "mlflow_can_be_reached": [
        ("a training that is not let out to MLflow", "base NetworkPolicy spec egress 2", GONE),
        (
            "an MLflow that lets in the served only",
            "mlflow NetworkPolicy spec ingress 0 from 0 podSelector matchLabels",
            {COMPONENT: "serve"},
        ),
    ],
    "servers_listen_where_they_say": [
        ("another port than the container's", "mlflow Deployment main args 1", "--port=8080"),
        ("nobody but itself", "serve Deployment main args 1", "--host=127.0.0.1"),
        ("a database that goes with its pod", "mlflow Deployment main args 3", "--backend-store-uri=sqlite:////tmp/mlflow.db"),
    ],
    "mlflow_answers_to_its_names": [
        ("a name that MLflow does not know", "mlflow Deployment main args 5", replaced("mlflow.$(NAMESPACE):5000,", "")),
    ],
    "what_is_exported_is_served": [
        ("a model that nobody exports", "serve Deployment main env 0 value", "models:/news@champion"),
        ("an alias that nobody gives", "serve Deployment main env 0 value", "models:/lmdist@best"),
    ],
    "queues_lead_somewhere": [
        ("a queue that leads nowhere", "kueue LocalQueue spec clusterQueue", "team"),
        ("a flavor that is not there", "kueue ClusterQueue spec resourceGroups 0 flavors 0 name", "gpu"),
        ("a queue for no namespace", "kueue ClusterQueue spec namespaceSelector", GONE),
        (
            "a queue for another namespace",
            "kueue ClusterQueue spec namespaceSelector",
            {"matchLabels": {"kubernetes.io/metadata.name": "team"}},
        ),
    ],
    "queued_jobs_wait": [
        ("a job in no queue", "kueue Job metadata labels kueue.x-k8s.io/queue-name", "team"),
        ("a job that does not wait", "kueue Job spec suspend", GONE),
    ],
    "queues_have_what_jobs_ask": [
        ("a resource without a quota", "kueue ClusterQueue spec resourceGroups 0 flavors 0 resources 1", GONE),
        (
            "too few GPUs for one job",
            "kueue ClusterQueue spec resourceGroups 0 flavors 0 resources nvidia.com/gpu nominalQuota",
            4,
        ),
        ("resources in another order", "kueue ClusterQueue spec resourceGroups 0 coveredResources", [GPU, "cpu", "memory"]),
    ],
}

MUTATIONS = [Mutation(rule, *entry) for rule, entries in CORPUS.items() for entry in entries]

FILES = [
    (
        "lines of any node",
        "k8s/overlays/kueue/kustomization.yaml",
        "-l batch.kubernetes.io/job-completion-index=0,batch.kubernetes.io/job-name=lmdist-train",
        "job/lmdist-train",
        "any",
    ),
    ("a Job that is not there", "k8s/base/job.yaml", "logs -f job/lmdist-train", "logs -f job/train", "job/train"),
    ("a pod that is not there", "k8s/base/service.yaml", "exec lmdist-train-0-XXXXX", "exec lmdist-0-XXXXX", "no pod lmdist-0"),
    ("no line for logs", "k8s/base/job.yaml", "# Logs: ", "# Log:  ", "no line Logs"),
    ("a comment further down", "k8s/namespace.yaml", "# The namespace", "\n# The namespace", "no line Apply"),
    (
        "a folder that is not there",
        "k8s/overlays/serve/service.yaml",
        "-k k8s/overlays/serve",
        "-k k8s/overlays/server",
        "k8s/overlays/server",
    ),
    (
        "a JobSet that is not there",
        "k8s/overlays/jobset/jobset.yaml",
        "delete jobset lmdist-train",
        "delete jobset lmdist",
        "no jobset lmdist",
    ),
    ("a claim that is not there", "k8s/base/volumes.yaml", "delete pvc lmdist-data", "delete pvc data", "no pvc data"),
    (
        "a kind that is none",
        "k8s/overlays/mlflow/server.yaml",
        "delete deployment,service",
        "delete deployments,server",
        "is no kind",
    ),
    (
        "any node's lines",
        "k8s/overlays/kueue/kustomization.yaml",
        "-l batch.kubernetes.io/job-completion-index=0,",
        "-l ",
        "2 pods",
    ),
    (
        "labels of nothing",
        "k8s/base/job.yaml",
        "get pods -l app.kubernetes.io/component=train",
        "get pods -l app=train",
        "no pod",
    ),
    ("another namespace", "k8s/base/service.yaml", "-n lmdist get", "-n default get", "no namespace default"),
]
"""What is changed, in which file, from what, to what, and what the check has to say."""

LINT = [
    ("a key twice", "k8s/base/job.yaml", "  completions: 1 ", "  parallelism: 1 "),
    ("a truth in another word", "k8s/base/service.yaml", "publishNotReadyAddresses: true", "publishNotReadyAddresses: yes"),
    ("a number of base 8", "k8s/base/volumes.yaml", "storage: 20Gi", "storage: 0644"),
    ("an indentation of its own", "k8s/base/networkpolicy.yaml", "  ingress:\n    - from", "  ingress:\n   - from"),
]
"""What is changed, in which file, from what, to what; yamllint has to say something."""

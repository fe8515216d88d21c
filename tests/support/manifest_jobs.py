"""Rules: trainings and exports. How the nodes find each other, what is tried again, and what the recipe says of all that."""

from __future__ import annotations

import functools
import shlex
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from lmdist import config
from lmdist.errors import EXIT_AGAIN, EXIT_DATA, EXIT_MISSING_INPUT, EXIT_USAGE, DataError, MissingInputError, UsageError
from lmdist.job.launcher import AGENT_GRACE_SECONDS
from lmdist.job.launcher import parser as launcher_parser
from lmdist.settings import Recipe
from lmdist_export.export import DEFECT
from lmdist_export.export import parser as export_parser
from support.manifests import (
    GPU,
    JOB_INDEX,
    Document,
    Pod,
    Render,
    command,
    find,
    job_sets,
    look,
    of_kind,
    pods,
    rendered,
    rule,
    selects,
    title,
)

TORCHRUN = {f"PET_{name}" for name in ("NNODES", "NPROC_PER_NODE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")}
NODE = "node"
"""The container and the replicated job that the Trainer takes for the training."""
ANCESTOR = "trainer.kubeflow.org/trainjob-ancestor-step"
FINAL = {EXIT_USAGE, EXIT_DATA, EXIT_MISSING_INPUT}
"""Codes that another try would only give again."""


def trainings(render: Render) -> Iterator[tuple[Pod, Document]]:
    """Every pod that trains, with the container that does."""
    for pod in pods(render.documents):
        yield from ((pod, container) for container in pod.containers if command(container) == "lmdist-train")


def variable(container: Document, name: str) -> Document:
    """A variable of a container as it is written; empty where it has none."""
    return next((entry for entry in container.get("env") or [] if entry["name"] == name), {})


# The nodes find each other ------------------------------------------------------------------------------------------


@rule
def nodes_agree(render: Render) -> Iterator[str]:
    """A job's nodes are all there at once, numbered, and as many as torchrun is told."""
    for pod, container in trainings(render):
        job = pod.job or {}
        if job.get("completionMode") != "Indexed":
            yield f"{pod}: its pods have no numbers; completionMode is not Indexed"
        if job.get("parallelism") != job.get("completions"):
            yield f"{pod}: {job.get('parallelism')} pods at a time, and {job.get('completions')} in all"
        told = variable(container, "PET_NNODES").get("value")
        if pod.trainer is None and told != str(job.get("parallelism")):
            yield f"{pod}: torchrun waits for {told} nodes, and there are {job.get('parallelism')}"


@rule
def torchrun_is_told(render: Render) -> Iterator[str]:
    """All five PET_ variables are set, or none where the Trainer sets them; the node's number is its index in the Job."""
    for pod, container in trainings(render):
        found = {entry["name"] for entry in container.get("env") or [] if entry["name"].startswith("PET_")}
        expected = TORCHRUN if pod.trainer is None else set()
        if found != expected:
            yield f"{pod}: {', '.join(sorted(found ^ expected))} is missing, or not ours to set"
        if pod.trainer is None:
            path = look(variable(container, "PET_NODE_RANK"), "valueFrom", "fieldRef", "fieldPath")
            if path != f"metadata.annotations['{JOB_INDEX}']":
                yield f"{pod}: PET_NODE_RANK is taken from {path}"
        flags = launcher_parser().parse_known_args(pod.arguments(container, render.everything))[0]
        for name in ("nnodes", "node_rank", "master_addr", "master_port", "nproc_per_node"):
            if getattr(flags, name) is not None:
                yield f"{pod}: the flag {name} wins over the variable"


@rule
def all_find_the_first_node(render: Render) -> Iterator[str]:
    """PET_MASTER_ADDR is the name of pod 0 in a headless Service that gives names before pods are ready."""
    for pod, container in trainings(render):
        if pod.trainer is None:
            address = pod.environment(container, render.everything).get("PET_MASTER_ADDR")
            if address != f"{pod.hostname(0)}.{pod.subdomain}":
                yield f"{pod}: PET_MASTER_ADDR is {address}, and pod 0 is called {pod.hostname(0)}.{pod.subdomain}"
        if not pod.set_name:
            yield from service_faults(pod, find(render.documents, "Service", pod.subdomain))
        elif pod.spec.get("subdomain", pod.subdomain) != pod.subdomain:
            yield f"{pod}: its subdomain is {pod.spec['subdomain']}, and that of its JobSet {pod.subdomain}"
    for owner, specification in job_sets(render.documents):
        network = specification.get("network") or {}
        if network.get("enableDNSHostnames", True) is not True or network.get("publishNotReadyAddresses", True) is not True:
            yield f"{title(owner)} gives its pods no names before they are ready"
        if network.get("subdomain"):
            yield f"{title(owner)} names a subdomain: another JobSet would have the same, and a Service that knows one of them"


def service_faults(pod: Pod, service: Document | None) -> Iterator[str]:
    """What keeps a Service from giving names to pods."""
    if service is None:
        yield f"{pod}: there is no Service {pod.subdomain}, its subdomain"
        return
    specification = service["spec"]
    if specification.get("clusterIP") != "None":
        yield f"{title(service)} is not headless: its pods have no names"
    if specification.get("publishNotReadyAddresses") is not True:
        yield f"{title(service)} gives no names before the pods are ready, which they are when they have found each other"
    if not selects({"matchLabels": specification.get("selector")}, pod.labels):
        yield f"{title(service)} does not select the pods of {pod}"


@rule
def ports_agree(render: Render) -> Iterator[str]:
    """PET_MASTER_PORT is the container's port and the Service's; with the Trainer, which has its own, there is none."""
    for pod, container in trainings(render):
        ports = {str(port["containerPort"]) for port in container.get("ports") or []}
        if pod.trainer is not None:
            yield from (f"{pod} has a port {port}, and the Trainer another" for port in sorted(ports))
            continue
        told = str(variable(container, "PET_MASTER_PORT").get("value"))
        if told not in ports:
            yield f"{pod}: PET_MASTER_PORT is {told}, and its ports are {', '.join(sorted(ports))}"
        service = find(render.documents, "Service", pod.subdomain)
        if service and told not in {str(port["port"]) for port in service["spec"].get("ports") or []}:
            yield f"{pod}: PET_MASTER_PORT is {told}, which {title(service)} has not"


@rule
def ranks_match_gpus(render: Render) -> Iterator[str]:
    """A node with GPUs has a rank for each, one without has a number of ranks and none of them."""
    for pod, container in trainings(render):
        if pod.trainer is not None:
            continue
        told = variable(container, "PET_NPROC_PER_NODE").get("value", "")
        if pod.gpus and told not in ("gpu", str(pod.gpus)):
            yield f"{pod}: {told} ranks a node, which has {pod.gpus} GPUs"
        if not pod.gpus and not told.isdigit():
            yield f"{pod}: {told} ranks a node, which has no GPUs"


@rule
def train_jobs_fit_their_runtimes(render: Render) -> Iterator[str]:
    """A TrainJob's runtime is there, with the same nodes, processes and names as the Trainer looks for."""
    for train_job in of_kind(render.documents, "TrainJob"):
        reference = train_job["spec"]["runtimeRef"]
        runtime = find(render.documents, reference.get("kind", "ClusterTrainingRuntime"), reference["name"])
        if runtime is None or reference.get("apiGroup") != "trainer.kubeflow.org":
            yield f"{title(train_job)}: there is no runtime {reference['name']}"
            continue
        if "trainer" not in train_job["spec"]:
            yield f"{title(train_job)} says nothing of the trainer, and the Trainer sets no variables"
        if "torch" not in (look(runtime, "spec", "mlPolicy") or {}):
            yield f"{title(runtime)} is not for torch"
        trainer = train_job["spec"].get("trainer") or {}
        for pod in (pod for pod in pods(render.documents) if pod.owner is runtime):
            nodes = {trainer.get("numNodes"), look(runtime, "spec", "mlPolicy", "numNodes"), (pod.job or {}).get("completions")}
            if len(nodes) != 1:
                yield f"{title(train_job)}, its runtime and the Job in it have {', '.join(sorted(map(str, nodes)))} nodes"
            if trainer.get("numProcPerNode") != (pod.gpus or 1):
                yield f"{title(train_job)}: {trainer.get('numProcPerNode')} processes a node, which has {pod.gpus} GPUs"
            if [container["name"] for container in pod.spec["containers"]] != [NODE]:
                yield f"{title(runtime)}: the Trainer looks for a container {NODE}"


@rule
def sets_hold_one_job(render: Render) -> Iterator[str]:
    """A JobSet holds one Job called node, and a runtime marks it as the one that trains."""
    for owner, specification in job_sets(render.documents):
        replicated = specification.get("replicatedJobs") or []
        if [(entry.get("name"), entry.get("replicas", 1)) for entry in replicated] != [(NODE, 1)]:
            yield f"{title(owner)} does not hold one Job called {NODE}"
        step = look(replicated[0], "template", "metadata", "labels", ANCESTOR) if replicated else None
        if owner["kind"] == "TrainingRuntime" and step != "trainer":
            yield f"{title(owner)}: its Job has no label {ANCESTOR}: trainer"


# What is tried again ------------------------------------------------------------------------------------------------


def jobs(render: Render) -> Iterator[tuple[Pod, Document]]:
    """Every Job, with the template of its pods."""
    for pod in pods(render.documents):
        if pod.job is not None:
            yield pod, pod.job


@rule
def jobs_end(render: Render) -> Iterator[str]:
    """A Job's pods are replaced once they have ended, not for ever; what has finished goes with its outermost owner."""
    for pod, job in jobs(render):
        if pod.spec.get("restartPolicy") != "Never":
            yield f"{pod}: restartPolicy is not Never, which podFailurePolicy needs"
        if job.get("podReplacementPolicy") != "Failed":
            yield f"{pod}: a pod's successor would start while it still saves; podReplacementPolicy is not Failed"
        yield from (f"{pod} has no {name}" for name in ("backoffLimit", "activeDeadlineSeconds") if job.get(name) is None)
        if pod.set_name and "ttlSecondsAfterFinished" in job:
            yield f"{pod}: the Job would go before its JobSet; ttlSecondsAfterFinished is not the Job's"
        if not pod.set_name and "ttlSecondsAfterFinished" not in job:
            yield f"{pod} stays for ever; it has no ttlSecondsAfterFinished"
    for document in of_kind(render.documents, "JobSet"):
        if "ttlSecondsAfterFinished" not in document["spec"]:
            yield f"{title(document)} stays for ever; it has no ttlSecondsAfterFinished"


@rule
def exit_codes_are_the_launchers(render: Render) -> Iterator[str]:
    """FailJob takes the codes that another try would repeat, Ignore the one that asks for it."""
    for pod, job in jobs(render):
        codes: dict[str, set[int]] = {"FailJob": set(), "Ignore": set()}
        for entry in look(job, "podFailurePolicy", "rules") or []:
            if asked := entry.get("onExitCodes"):
                values = asked.get("values") or []
                if values != sorted(set(values)) or 0 in values:
                    yield f"{pod}: exit codes {values} are not in order, or have a 0"
                if asked.get("operator") != "In":
                    yield f"{pod}: exit codes are not looked for by In"
                codes.setdefault(entry.get("action", ""), set()).update(values)
        expected = {"FailJob": FINAL, "Ignore": {EXIT_AGAIN}} if pod.trains else {"FailJob": FINAL | {DEFECT}, "Ignore": set()}
        for action in sorted({*codes, *expected}):
            if codes.get(action) != expected.get(action, set()):
                yield f"{pod}: {action} takes {sorted(codes[action])}, and is for {sorted(expected.get(action, set()))}"


@rule
def failures_are_of_the_container(render: Render) -> Iterator[str]:
    """Exit codes are looked for in a container that is there."""
    for pod, job in jobs(render):
        names = {container["name"] for container in pod.containers}
        for entry in look(job, "podFailurePolicy", "rules") or []:
            name = look(entry, "onExitCodes", "containerName")
            if name is not None and name not in names:
                yield f"{pod}: there is no container {name} to have exit codes"


@rule
def disruptions_do_not_count(render: Render) -> Iterator[str]:
    """Before all else, a pod whose node was drained or lost is tried again as often as it takes."""
    for pod, job in jobs(render):
        first = next(iter(look(job, "podFailurePolicy", "rules") or []), {})
        if first.get("action") != "Ignore" or first.get("onPodConditions") != [{"type": "DisruptionTarget", "status": "True"}]:
            yield f"{pod}: DisruptionTarget is not the first thing to be ignored"


@rule
def there_is_time_to_save(render: Render) -> Iterator[str]:
    """A pod may end for longer than ranks wait for each other and the launcher for its agent."""
    for pod, container in trainings(render):
        recipe, fault = recipe_of(pod, container, render)
        if recipe is None:
            yield fault
            continue
        least = recipe.training.timeout_seconds + AGENT_GRACE_SECONDS
        if pod.spec.get("terminationGracePeriodSeconds", 30) <= least:
            yield f"{pod} has {pod.spec.get('terminationGracePeriodSeconds', 30)} s to end, and may need more than {least:g}"


# The recipe ---------------------------------------------------------------------------------------------------------


def recipe_of(pod: Pod, container: Document, render: Render) -> tuple[Recipe | None, str]:
    """The recipe that a training reads, with its flags; or a sentence that says why there is none."""
    arguments = pod.arguments(container, render.everything)
    path = next((argument.partition("=")[2] for argument in arguments if argument.startswith("--config=")), "")
    mount, volume = pod.mounted(container, path)
    source = find(render.everything, "ConfigMap", look(volume, "configMap", "name"))
    if source is None:
        return None, f"{pod}: the recipe {path} lies in no ConfigMap"
    key = path.removeprefix(mount["mountPath"]).lstrip("/")
    if key not in (source.get("data") or {}):
        return None, f"{pod}: {title(source)} has no {key}"
    recipe = loaded(source["data"][key], tuple(arguments), path)
    return (recipe, "") if isinstance(recipe, Recipe) else (None, f"{pod}: {recipe}")


@functools.cache
def loaded(text: str, arguments: tuple[str, ...], path: str) -> Recipe | str:
    """A recipe as lmdist-train reads it; what it says against it otherwise."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.toml"
        file.write_text(text)
        try:
            _, flags = launcher_parser().parse_known_args(arguments)
            return config.load([flag.replace(path, str(file)) for flag in flags], quiet=True)
        except (UsageError, DataError, MissingInputError) as error:
            return str(error)
        except SystemExit as end:
            return f"lmdist-train {shlex.join(arguments)} ends with code {end.code}"


@rule
def recipes_are_read(render: Render) -> Iterator[str]:
    """The recipe lies in a ConfigMap that is mounted, lmdist reads it with the flags, and a pod that comes anew goes on."""
    for pod, container in trainings(render):
        recipe, fault = recipe_of(pod, container, render)
        if recipe is None:
            yield fault
        elif recipe.resume != "auto":
            yield f"{pod} does not go on from its checkpoint: resume is {recipe.resume}"


def recipes(render: Render) -> Iterator[tuple[Pod, Document, Recipe]]:
    """Every training whose recipe can be read."""
    for pod, container in trainings(render):
        recipe, _ = recipe_of(pod, container, render)
        if recipe is not None:
            yield pod, container, recipe


@rule
def batches_are_shared_out(render: Render) -> Iterator[str]:
    """The global batch can be shared out evenly over all ranks."""
    for pod, container, recipe in recipes(render):
        told = variable(container, "PET_NPROC_PER_NODE").get("value", "")
        ranks = pod.count * (int(told) if told.isdigit() else pod.gpus or 1)
        rows = recipe.data.global_batch // recipe.training.accumulation
        if rows % ranks:
            yield f"{pod}: {rows} rows do not go evenly over {ranks} ranks"


@rule
def devices_match(render: Render) -> Iterator[str]:
    """A recipe for CUDA has GPUs, and none that would leave them idle."""
    for pod, _, recipe in recipes(render):
        if recipe.training.device != ("cuda" if pod.gpus else "cpu"):
            yield f"{pod}: the recipe's device is {recipe.training.device}, and a pod has {pod.gpus} of {GPU}"


@rule
def folders_outlive_the_pod(render: Render) -> Iterator[str]:
    """Data and run lie on claims that can be written; a run's folder is named after its job, so that two jobs have two."""
    for pod, container, recipe in recipes(render):
        for folder in (recipe.data.folder, recipe.run_folder):
            mount, volume = pod.mounted(container, folder)
            if "persistentVolumeClaim" not in volume or mount.get("readOnly"):
                yield f"{pod}: {folder} is on no claim that it can write to"
        if Path(recipe.run_folder).name != (pod.set_name or pod.job_name):
            yield f"{pod}: the run's folder {recipe.run_folder} is not named after the job"


@rule
def one_folder_has_one_text(render: Render) -> Iterator[str]:
    """Recipes with the data folder of the base's prepare it as the base does: who comes second takes what is there."""
    base = {recipe.data.folder: asdict(recipe.prepare) for _, _, recipe in recipes(rendered("base"))}
    for pod, _, recipe in recipes(render):
        if base.get(recipe.data.folder, asdict(recipe.prepare)) != asdict(recipe.prepare):
            yield f"{pod}: its texts are not those that the base makes {recipe.data.folder} of"


@rule
def ranks_have_shared_memory(render: Render) -> Iterator[str]:
    """/dev/shm of a training is in memory: NCCL's ranks of one node talk through it."""
    for pod, container in trainings(render):
        mount, volume = pod.mounted(container, "/dev/shm")
        if mount.get("mountPath") != "/dev/shm" or look(volume, "emptyDir", "medium") != "Memory":
            yield f"{pod} has the 64 MiB of /dev/shm that a container has by itself"


# Exports ------------------------------------------------------------------------------------------------------------


@rule
def exports_take_a_run(render: Render) -> Iterator[str]:
    """An export's flags are lmdist-export's, it reads the run of the base's training, and writes to a claim."""
    runs = {inner.run_folder for _, _, inner in recipes(Render(render.name, of_kind(render.others, "Job"), render.others))}
    for pod in pods(render.documents):
        for container in (container for container in pod.containers if command(container) == "lmdist-export"):
            try:
                known, unknown = export_parser().parse_known_args(pod.arguments(container, render.everything))
            except SystemExit as end:
                yield f"{pod}: lmdist-export ends with code {end.code}"
                continue
            if unknown:
                yield f"{pod}: lmdist-export knows no {' '.join(unknown)}"
            if str(known.checkpoint) not in runs:
                yield f"{pod} exports {known.checkpoint}, and the trainings write {', '.join(sorted(runs))}"
            mount, volume = pod.mounted(container, str(known.output))
            if "persistentVolumeClaim" not in volume or mount.get("readOnly"):
                yield f"{pod} writes {known.output}, which is on no claim that it can write to"

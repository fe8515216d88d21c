"""Rules: what trainings and exports agree on: the variables of torchrun, the exit codes, the recipe, the folders."""

from __future__ import annotations

import functools
import shlex
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from lmdist import config
from lmdist.errors import (
    EXIT_AGAIN,
    EXIT_DATA,
    EXIT_DEFECT,
    EXIT_MISSING_INPUT,
    EXIT_USAGE,
    DataError,
    MissingInputError,
    UsageError,
)
from lmdist.job.launcher import AGENT_GRACE_SECONDS
from lmdist.job.launcher import parser as launcher_parser
from lmdist.settings import Recipe
from lmdist_export.export import parser as export_parser
from support.manifests import (
    GPU,
    Document,
    Pod,
    Render,
    command,
    expanded,
    find,
    look,
    of_kind,
    pods,
    rendered,
    rule,
    selects,
    title,
)


def running(render: Render, program: str) -> Iterator[tuple[Pod, Document]]:
    """Yield every pod with its container that runs a program."""
    for pod in pods(render.documents):
        yield from ((pod, container) for container in pod.containers if command(container) == program)


# The nodes find each other ------------------------------------------------------------------------------------------


@rule
def torchrun_gets_its_variables(render: Render) -> Iterator[str]:
    """Each pod has torchrun's five variables as its Job and its Service define them, none where the Trainer sets them.

    The number of pods is that of nodes; the rank is the pod's index; pod 0 is called by its name in the subdomain; the port is
    the container's; the ranks of a node are its GPUs.
    """
    for pod, container in running(render, "lmdist-train"):
        job, index = pod.job or {}, 7
        ranks = ["gpu", str(pod.gpus)] if pod.gpus else [str(number) for number in range(1, 9)]
        ports = [str(port["containerPort"]) for port in container.get("ports") or []]
        expected = {
            "PET_NNODES": [str(job.get("parallelism"))],
            "PET_NPROC_PER_NODE": ranks,
            "PET_NODE_RANK": [str(index)],
            "PET_MASTER_ADDR": [f"{pod.hostname(0)}.{pod.subdomain}"],
            "PET_MASTER_PORT": ports,
        }
        variables = pod.environment(container, render.everything, index)
        for name in {*expected, *(name for name in variables if name.startswith("PET_"))}:
            allowed: list[str | None] = [None] if pod.by_trainer else [*expected.get(name, [])]
            if variables.get(name) not in allowed:
                yield f"{pod}: {name} is {variables.get(name)}, expected one of {allowed}"
        if pod.by_trainer and ports:
            yield f"{pod} has the ports {ports}, and the Trainer another"
        if job.get("parallelism") != job.get("completions"):
            yield f"{pod}: {job.get('parallelism')} pods at a time, and {job.get('completions')} in all"
        flags = launcher_parser().parse_known_args(pod.arguments(container, render.everything))[0]
        for name in ("nnodes", "node_rank", "master_addr", "master_port", "nproc_per_node"):
            if getattr(flags, name) is not None:
                yield f"{pod}: the flag {name} overrides the variable"


@rule
def services_name_the_nodes(render: Render) -> Iterator[str]:
    """A Job's subdomain is a headless Service with the port of its pods, which publishes names before pods are ready."""
    for pod, container in running(render, "lmdist-train"):
        if pod.set_name:
            if pod.spec.get("subdomain", pod.subdomain) != pod.subdomain:
                yield f"{pod}: its subdomain is {pod.spec['subdomain']}, and that of its JobSet {pod.subdomain}"
            continue
        service = find(render.documents, "Service", pod.subdomain)
        spec = look(service, "spec") or {}
        if spec.get("clusterIP") != "None" or spec.get("publishNotReadyAddresses") is not True:
            yield f"{pod}: {pod.subdomain} is not a headless Service that publishes not-ready addresses"
        if not selects({"matchLabels": spec.get("selector")}, pod.labels):
            yield f"{pod}: the Service {pod.subdomain} does not select its pods"
        if {port["port"] for port in spec.get("ports") or []} != {port["containerPort"] for port in container["ports"]}:
            yield f"{pod}: the Service {pod.subdomain} has other ports"


@rule
def train_jobs_fit_their_runtimes(render: Render) -> Iterator[str]:
    """A TrainJob's runtime exists, with the same nodes and processes, and a container called node."""
    for train_job in of_kind(render.documents, "TrainJob"):
        reference, trainer = train_job["spec"]["runtimeRef"], train_job["spec"].get("trainer") or {}
        runtime = find(render.documents, reference.get("kind", "ClusterTrainingRuntime"), reference["name"])
        if runtime is None or reference.get("apiGroup") != "trainer.kubeflow.org":
            yield f"{title(train_job)}: there is no runtime {reference['name']} of Kubeflow's"
        for pod in (pod for pod in pods(render.documents) if runtime is not None and pod.owner is runtime):
            nodes = {trainer.get("numNodes"), look(runtime, "spec", "mlPolicy", "numNodes"), look(pod.job, "completions")}
            names = [container["name"] for container in pod.containers]
            if len(nodes) != 1 or trainer.get("numProcPerNode") != (pod.gpus or 1) or names != ["node"]:
                yield f"{title(train_job)}: {nodes} nodes with {trainer} and {pod.gpus} GPUs in the containers {names}"


# What is tried again ------------------------------------------------------------------------------------------------


@rule
def failures_are_the_launchers(render: Render) -> Iterator[str]:
    """podFailurePolicy ignores disruptions first, then fails at final exit codes, then ignores "run me again"."""
    final = [EXIT_USAGE, EXIT_DATA, EXIT_MISSING_INPUT]
    for pod in (pod for pod in pods(render.documents) if pod.job is not None):
        again = pod.trains or command(pod.containers[0]) == "lmdist-prepare"
        codes = {"FailJob": final, "Ignore": [EXIT_AGAIN]} if again else {"FailJob": [EXIT_DEFECT, *final]}
        name = pod.containers[0]["name"]
        expected: list[Document] = [
            {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            *(
                {"action": action, "onExitCodes": {"containerName": name, "operator": "In", "values": values}}
                for action, values in codes.items()
            ),
        ]
        found = look(pod.job, "podFailurePolicy", "rules")
        if found != expected:
            yield f"{pod}: the rules of podFailurePolicy are {found}, expected {expected}"


# The recipe ---------------------------------------------------------------------------------------------------------
@rule
def shards_are_counted_and_merged(render: Render) -> Iterator[str]:
    """Each pod of a preparation counts the shard of its index, of as many as there are pods, and one merges what they count.

    It replaces a data folder: one that was lost after it had written it is tried again.
    """
    merged, counted = [], []
    for pod, container in running(render, "lmdist-prepare"):
        words = [word for word in pod.arguments(container, render.everything) if not word.startswith("--shard")]
        if "--merge" in words:
            merged.append({word for word in words if word != "--merge"})
            continue
        counted.append({*words})
        number = look(pod.job, "completions")
        for index in (0, 7):
            variables = pod.environment(container, render.everything, index)
            shards = [expanded(word, variables) for word in container["args"] if word.startswith("--shard")]
            if shards != [f"--shard={index}/{number}"]:
                yield f"{pod}: pod {index} of {number} is given {shards}"
    if merged != [{*words, "--overwrite"} for words in counted]:
        yield f"the pods that count are given {counted}, and those that merge {merged}"


def recipe_of(pod: Pod, container: Document, render: Render) -> Recipe | str:
    """Return the recipe that a training reads, with its flags, or a sentence that says why there is none."""
    arguments = pod.arguments(container, render.everything)
    path = pod.flags(container, render.everything).get("config", "")
    mount, volume = pod.mounted(container, path)
    source = find(render.everything, "ConfigMap", look(volume, "configMap", "name"))
    text = look(source, "data", path.removeprefix(mount.get("mountPath", "")).lstrip("/"))
    return f"the recipe {path} lies in no ConfigMap" if text is None else loaded(text, tuple(arguments), path)


@functools.cache
def loaded(text: str, arguments: tuple[str, ...], path: str) -> Recipe | str:
    """Return a recipe as lmdist-train reads it, or its error message."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.toml"
        file.write_text(text)
        try:
            _, flags = launcher_parser().parse_known_args(arguments)
            return config.load([flag.replace(path, str(file)) for flag in flags], quiet=True)
        except (UsageError, DataError, MissingInputError) as error:
            return str(error)
        except SystemExit as end:
            return f"lmdist-train {shlex.join(arguments)} exits with code {end.code}"


def recipes(render: Render) -> Iterator[tuple[Pod, Document, Recipe]]:
    """Yield every training whose recipe can be read."""
    for pod, container in running(render, "lmdist-train"):
        if isinstance(recipe := recipe_of(pod, container, render), Recipe):
            yield pod, container, recipe


@rule
def recipes_are_read(render: Render) -> Iterator[str]:
    """lmdist reads the recipe with the flags of the manifest, and a pod that replaces another one resumes."""
    for pod, container in running(render, "lmdist-train"):
        recipe = recipe_of(pod, container, render)
        if isinstance(recipe, str):
            yield f"{pod}: {recipe}"
        elif recipe.resume != "auto":
            yield f"{pod} does not resume from its checkpoint: resume is {recipe.resume}"


@rule
def recipes_fit_their_pods(render: Render) -> Iterator[str]:
    """The batch divides over the ranks, the device is the pod's, a save fits the grace, and each job has its own folder.

    Ranks of one node share memory by NCCL in /dev/shm. Recipes with the base's data folder prepare it as the base does.
    """
    prepared = {recipe.data.folder: asdict(recipe.prepare) for _, _, recipe in recipes(rendered("base"))}
    for pod, container, recipe in recipes(render):
        per_node = pod.environment(container, render.everything).get("PET_NPROC_PER_NODE", "")
        ranks = pod.count * (int(per_node) if per_node.isdigit() else pod.gpus or 1)
        batch, device = recipe.data.global_batch // recipe.training.accumulation, "cuda" if pod.gpus else "cpu"
        mount, volume = pod.mounted(container, "/dev/shm")
        in_memory = mount.get("mountPath") == "/dev/shm" and look(volume, "emptyDir", "medium") == "Memory"
        needed = recipe.training.timeout_seconds + AGENT_GRACE_SECONDS
        prepares = asdict(recipe.prepare)
        for holds, sentence in (
            (batch % ranks == 0, f"a batch of {batch} does not divide evenly over {ranks} ranks"),
            (recipe.training.device == device, f"the recipe's device is {recipe.training.device}, of {pod.gpus} {GPU}"),
            (Path(recipe.run_folder).name == (pod.set_name or pod.job_name), f"{recipe.run_folder} is not named after the job"),
            (
                prepared.get(recipe.data.folder, prepares) == prepares,
                f"the base has other texts in {recipe.data.folder}",
            ),
            (in_memory, "it has the 64 MiB of /dev/shm of every container"),
            (pod.grace_seconds > needed, f"{pod.grace_seconds} s to terminate, and {needed:g} s may be needed"),
        ):
            if not holds:
                yield f"{pod}: {sentence}"


@rule
def exports_take_a_run(render: Render) -> Iterator[str]:
    """An export's flags are lmdist-export's, and it reads the run of the training that it comes after."""
    runs = {inner.run_folder for _, _, inner in recipes(Render(of_kind(render.required, "Job"), render.required))}
    for pod, container in running(render, "lmdist-export"):
        try:
            known, unknown = export_parser().parse_known_args(pod.arguments(container, render.everything))
        except SystemExit as end:
            yield f"{pod}: lmdist-export exits with code {end.code}"
            continue
        if unknown or str(known.checkpoint) not in runs or known.output is None:
            yield f"{pod}: {known} is not an export of one of {runs}; unknown flags: {unknown}"


@rule
def results_are_kept(render: Render) -> Iterator[str]:
    """Working directories, data, runs, bundles and MLflow's files lie on claims that the container can write to."""
    written = [(pod, container, path) for pod, container, r in recipes(render) for path in (r.data.folder, r.run_folder)]
    for pod in pods(render.documents):
        for container in pod.containers:
            flags = pod.flags(container, render.everything)
            paths = [container.get("workingDir"), flags.get("output"), flags.get("artifacts-destination")]
            paths += [flags.get("backend-store-uri", "").removeprefix("sqlite:///")]
            written += [(pod, container, path) for path in paths if path]
    for pod, container, path in written:
        if not pod.can_keep(container, path):
            yield f"{pod}: {path} is on no claim that it can write to"

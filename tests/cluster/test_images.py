"""The images of k8s/Dockerfile: linted, checked by rules of our own, and the target `sample` built and run without docker."""

from __future__ import annotations

import json
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import lmdist
from support import dockerfiles, small_bundles

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "k8s" / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TARGETS = {"train": "SIGTERM", "sample": "SIGINT"}
"""The images, and the signal that stops process 1 of each."""
PATTERNS = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
BASE = re.compile(r"python:(\d+\.\d+)\.\d+-slim-[a-z]+(@sha256:[0-9a-f]{64})?")
READ_ONLY = f"{shutil.which('bwrap')} --ro-bind / / --dev /dev --proc /proc --unshare-user --uid 1000 --gid 1000".split()
HADOLINT = Path(sys.executable).parent / "hadolint"
PROMPT = ("--prompt", "the cat said", "--max-new-tokens", "30", "--seed", "3")


def hadolint(text: str) -> list[str]:
    """Return the rules that hadolint finds violated, those of style included."""
    command = [HADOLINT, "--failure-threshold", "style", "--format", "json", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, cwd=ROOT)
    found = [line["code"] for line in json.loads(done.stdout)]
    assert bool(found) == bool(done.returncode), done.stderr
    return found


def extras(stages: dict[str, dockerfiles.Stage], target: str) -> list[str]:
    """Return the extras that a target installs, with `$EXTRA` at its default."""
    command = next(text for name, text in stages["requirements"].instructions if name == "RUN")
    words = re.search(rf"requirements\.py ([^<]*)< pyproject\.toml > {target}\.txt", command)
    assert words, command
    return [re.sub(r'"\$\{EXTRA:-(\w+)\}"', r"\1", word) for word in words[1].split()]


def stage_faults(stage: dockerfiles.Stage, earlier: list[str]) -> Iterator[str]:
    """Yield the faults of the base and the sources of a stage."""
    base = BASE.fullmatch(stage.base)
    if stage.base not in earlier and not base:
        yield f"{stage.base} is not pinned to a patch version and a release of Debian"
    if base and not any(re.search(rf"compileall .*/usr/local/lib/python{base[1]}$", text) for _, text in stage.instructions):
        yield "the modules of this Python are not compiled"
    for source in dockerfiles.sources(stage):
        if not dockerfiles.context_files(ROOT, source):
            yield f"{source} does not exist, or .dockerignore excludes it"


def target_faults(target: str, stages: dict[str, dockerfiles.Stage]) -> Iterator[str]:
    """Yield the faults of an image that hadolint does not look for."""
    stage = stages[target]
    if not re.fullmatch(r"[1-9]\d*:[1-9]\d*", stage.last("USER")):
        yield "the user is root, or not a number, which runAsNonRoot needs"
    if stage.last("STOPSIGNAL") != TARGETS[target]:
        yield f"not stopped by {TARGETS[target]}"
    if not stage.last("ENTRYPOINT").startswith("[") or stage.last("CMD")[:1] not in ("", "["):
        yield "a shell is process 1"
    elif json.loads(stage.last("ENTRYPOINT"))[0] not in PROJECT["scripts"]:
        yield "the entry point is not a command of lmdist"
    if ("ARG", f"VERSION={lmdist.__version__}") not in stage.instructions:
        yield f"the version is not {lmdist.__version__}"
    runs = [dockerfiles.read_run(text) for name, text in stage.instructions if name == "RUN"]
    with_code = [any(mount.get("from") == "wheel" for mount in run.mounts) for run in runs]
    if any(name == "COPY" for name, _ in stage.instructions) or with_code != [False, True]:
        yield "the dependencies have no layer of their own below that of the code"
    known = PROJECT["optional-dependencies"]
    for extra in extras(stages, target):
        if extra not in known:
            yield f"pyproject.toml has no extra {extra}"
    needs = [line for extra in extras(stages, target) for line in known.get(extra, [])]
    if (target == "train") != any(re.match(r"torch\b", line) for line in needs):
        yield "torch is installed in sample, or is missing in train"


def faults(text: str) -> list[str]:
    """Return the faults of a Dockerfile of lmdist, each after the name of its stage."""
    stages = dockerfiles.read(text)
    names = list(stages)
    found = [f"{name}: {fault}" for name in names for fault in stage_faults(stages[name], names[: names.index(name)])]
    return found + [f"{target}: {fault}" for target in TARGETS for fault in target_faults(target, stages)]


def mutated(old: str, new: str) -> str:
    """Return the Dockerfile with its last `old` replaced."""
    before, found, after = DOCKERFILE.rpartition(old)
    assert found, old
    return before + new + after


needs_hadolint = pytest.mark.skipif(not HADOLINT.exists(), reason="hadolint is not installed")


@needs_hadolint
def test_hadolint_finds_nothing():
    assert hadolint(DOCKERFILE) == []


@needs_hadolint
@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("python:3.12.14-slim-trixie", "python:latest", "DL3007"),
        ("python:3.12.14-slim-trixie", "python", "DL3006"),
        ("python -m compileall", "sudo python -m compileall", "DL3004"),
        ("python -m compileall", "apt-get install libgomp1 && python -m compileall", "DL3008"),
        ("--constraint /requirements/constraints.txt --requirement /requirements/sample.txt", "mlflow", "DL3013"),
        ("--no-cache-dir ", "", "DL3042"),
        ('ENTRYPOINT ["lmdist-generate"]', "ENTRYPOINT lmdist-generate", "DL3025"),
        ("WORKDIR /home/lmdist", "WORKDIR lmdist", "DL3000"),
        ("USER 1000:1000", "USER root", "DL3002"),
        ("/wheel/*.whl", "$WHEEL/*.whl", "SC2086"),
    ],
)
def test_hadolint_finds(old: str, new: str, rule: str):
    assert rule in hadolint(mutated(old, new))


def test_the_dockerfile_has_no_fault():
    assert faults(DOCKERFILE) == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("3.12.14-slim-trixie", "3.12-slim-trixie", "base: python:3.12-slim-trixie is not pinned"),
        ("3.12.14-slim-trixie", "3.12.14-slim", "base: python:3.12.14-slim is not pinned"),
        ("3.12.14-slim-trixie", "3.13.5-slim-trixie", "base: the modules of this Python"),
        ("USER 1000:1000\n", "USER 1000:1000\nUSER root\n", "sample: the user"),
        ("USER 1000:1000\n", "USER lmdist\n", "sample: the user"),
        ("USER 1000:1000\n", "USER 1000:0\n", "sample: the user"),
        ("USER 1000:1000\n", "", "sample: the user"),
        ('CMD ["--help"]', "CMD --help", "sample: a shell is process 1"),
        ('"lmdist-generate"', '"lmdist-sample"', "sample: the entry point"),
        ("STOPSIGNAL SIGINT", "STOPSIGNAL SIGTERM", "sample: not stopped"),
        ("VERSION=0", "VERSION=9", "sample: the version"),
        ("WORKDIR /home", "COPY lmdist /opt/lmdist/\nWORKDIR /home", "sample: the dependencies"),
        ("FROM base AS sample\n", "FROM base AS sample\nCOPY docs /docs/\n", "sample: docs does not exist, or .dockerignore"),
        ("source=constraints.txt", "source=constraint.txt", "sample: constraint.txt does not exist"),
        ("COPY lmdist lmdist", "COPY lmdists lmdist", "wheel: lmdists does not exist"),
        ('requirements.py serve "${EXTRA:-cpu}"', "requirements.py serve tpu", "sample: pyproject.toml has no extra tpu"),
        ('requirements.py serve "${EXTRA:-cpu}"', "requirements.py cpu train", "sample: torch"),
        ("train demo zstd", "demo zstd", "train: torch"),
    ],
)
def test_a_fault_is_found(old: str, new: str, fault: str):
    assert any(line.startswith(fault) for line in faults(mutated(old, new)))


@pytest.mark.parametrize(
    "path",
    [
        *("lmdist/train.py", "export/lmdist_export/bundle.py", "launch/demo.toml"),
        *("README.md", "LICENSE", "pyproject.toml", "k8s/requirements.py"),
    ],
)
def test_the_sources_of_the_wheel_are_in_the_context(path: str):
    assert (ROOT / path).is_file()
    assert dockerfiles.included(path, PATTERNS)


@pytest.mark.parametrize(
    "path",
    [
        *(".git/HEAD", ".venv/bin/python", "data/news/train.bin", "runs/demo/recipe.toml", "bundles/demo/weights.bin"),
        *("mlflow.db", "tests/test_images.py", "benchmarks/speed.py", "lmdist/__pycache__/train.pyc", "k8s/Dockerfile"),
        *("export/more.py", "launch/node.sh", "x.csv"),
    ],
)
def test_everything_else_is_excluded(path: str):
    assert not dockerfiles.included(path, PATTERNS)


@pytest.mark.parametrize(
    "line", ["ADD x y", "COPY --from=wheel /wheel /wheel", "RUN --network=host true", "USER 1:1\nRUN true"]
)
def test_an_unknown_instruction_is_an_error(line: str, tmp_path: Path):
    with pytest.raises(NotImplementedError):
        dockerfiles.Build(dockerfiles.read(f"FROM x AS y\n{line}\n"), ROOT, tmp_path, {}).image("y")


def test_a_failing_command_stops_the_build(tmp_path: Path):
    with pytest.raises(RuntimeError, match="no such thing"):
        dockerfiles.Build(dockerfiles.read("FROM x AS y\nRUN echo no such thing; exit 3\n"), ROOT, tmp_path, {}).image("y")


@pytest.mark.slow
def test_the_environment_of_the_tests_has_the_packages_of_train(tmp_path: Path):
    command = [sys.executable, "k8s/requirements.py", *extras(dockerfiles.read(DOCKERFILE), "train")]
    with (ROOT / "pyproject.toml").open() as pyproject:
        listed = subprocess.run(command, cwd=ROOT, stdin=pyproject, capture_output=True, text=True, check=True).stdout
    if shutil.which("nvidia-smi") is None:  # then the environment has onnxruntime for CPUs
        listed = re.sub(r"onnxruntime-gpu.*", "onnxruntime", listed)
    (tmp_path / "train.txt").write_text(listed)
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--constraint", "constraints.txt"]
    done = subprocess.run([*pip, "--requirement", tmp_path / "train.txt"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Would install" not in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_sample_target_samples_without_torch_on_a_read_only_root(tmp_path: Path):
    build = dockerfiles.Build(dockerfiles.read(DOCKERFILE), ROOT, tmp_path, {})
    image = build.image("sample")
    environment = build.root / "opt" / "lmdist"
    packages = next(environment.glob("lib/python*/site-packages"))
    size = sum(path.stat().st_size for path in packages.rglob("*") if path.is_file())
    sys.stdout.write(f"\nthe environment of the image sample: {size / 2**20:.0f} MiB\n")

    assert not any((packages / name).exists() for name in ("torch", "pip", "pytest", "hatchling"))
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python"), "check"]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    for folder, package in (("lmdist", "lmdist"), ("export/lmdist_export", "lmdist_export")):
        modules = {path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*.py")}
        assert {path.relative_to(packages / package) for path in (packages / package).rglob("*.py")} == modules
        compiled = {path.parents[1] / path.name.split(".")[0] for path in (packages / package).rglob("__pycache__/*.pyc")}
        assert {path.relative_to(packages / package) for path in compiled} == {module.with_suffix("") for module in modules}
    modes = {path: path.lstat().st_mode for path in environment.rglob("*") if not path.is_symlink()}
    assert not [path for path, mode in modes.items() if not mode & stat.S_IROTH or mode & (stat.S_IWOTH | stat.S_IWGRP)]

    bundle = small_bundles.make_bundle(tmp_path / "model")
    expected = small_bundles.command("lmdist_export.generate", bundle, *PROMPT)
    assert expected.returncode == 0, expected.stderr
    entry = json.loads(build.stages["sample"].last("ENTRYPOINT"))

    def started(*command: str | Path) -> subprocess.CompletedProcess[str]:
        boxed = [*sandbox(tmp_path, image.folder / "tmp"), *command]
        return subprocess.run(boxed, cwd=image.workdir, env=image.environment, capture_output=True, text=True)

    assert started(*entry, *json.loads(build.stages["sample"].last("CMD"))).stdout.startswith("usage: lmdist-generate")
    generated = started(*entry, bundle, *PROMPT)
    assert generated.returncode == 0, generated.stderr
    assert generated.stdout == expected.stdout
    assert len(generated.stdout.split()) > 10
    assert started("lmdist-score", "--help").returncode == 0
    assert "No module named 'torch'" in started("python", "-c", "import torch").stderr
    if sandbox(tmp_path, image.folder / "tmp"):
        nothing_left = f'id -u && ! touch here && lmdist-generate "$@" > /dev/null && ls -A {image.folder / "tmp"}'
        assert started("/bin/sh", "-c", nothing_left, "sh", bundle, *PROMPT).stdout == "1000\n"


def sandbox(visible: Path, writable: Path) -> list[str | Path]:
    """Return what runs a command as uid 1000 on a read-only root with an empty /tmp, where this machine can."""
    if not shutil.which("bwrap") or subprocess.run([*READ_ONLY, "true"], capture_output=True).returncode:
        return []
    return [*READ_ONLY, "--tmpfs", "/tmp", "--ro-bind", visible, visible, "--tmpfs", writable]

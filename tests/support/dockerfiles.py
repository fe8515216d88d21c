"""Execute a stage of a Dockerfile without docker, as far as lmdist's own goes.

A stage is a folder: `/opt/lmdist` of the image is `FOLDER/opt/lmdist`. The link `root` points to the stage that is being built,
so a path that one stage writes into a script is valid in the stages built from it. This machine replaces the base image, and
the Python of the tests its Python. An unknown instruction, flag or mount is an error.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import string
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

FOLDERS = ("etc", "home", "opt", "root", "tmp", "var")
"""The folders of a base image that a stage may write to."""
PASSED_ON = re.compile(r"PIP_|SSL_CERT|REQUESTS_CA|https?_proxy$|HTTPS?_PROXY$")
"""Variables of this machine by which its pip reaches packages."""


@dataclass
class Stage:
    """The base of a stage, and its instructions as (name, text), continuation lines joined."""

    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def last(self, name: str) -> str:
        """Return the text of the last instruction of a name, which overrides earlier ones; empty where there is none."""
        return next((text for instruction, text in reversed(self.instructions) if instruction == name), "")


@dataclass(frozen=True)
class Run:
    """A RUN: its mounts, each as its options, and the command of the shell."""

    mounts: list[dict[str, str]]
    command: str


@dataclass
class Image:
    """A built stage: its folder, the variables of its processes, and their working directory."""

    folder: Path
    environment: dict[str, str]
    workdir: Path


def read(text: str) -> dict[str, Stage]:
    """Return the stages of a Dockerfile, by name."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    stages: dict[str, Stage] = {}
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        name, rest = line.split(maxsplit=1)
        if name == "FROM":
            base, _as, stage = rest.split()
            stages[stage] = Stage(base)
        else:
            stages[next(reversed(stages))].instructions.append((name, rest))
    return stages


def read_run(text: str) -> Run:
    """Return the mounts and the command of a RUN."""
    mounts = []
    while flag := re.match(r"--(\w+)=(\S+)\s+", text):
        if flag[1] != "mount":
            raise NotImplementedError(text)
        mounts.append(dict(option.split("=", 1) for option in flag[2].split(",")))
        text = text[flag.end() :]
    return Run(mounts, text)


def sources(stage: Stage) -> Iterator[str]:
    """Yield the sources of a stage in the build context, of COPY and of mounts."""
    for name, text in stage.instructions:
        if name == "COPY" and not text.startswith("--from="):
            yield from text.split()[:-1]
        if name == "RUN":
            yield from (mount["source"] for mount in read_run(text).mounts if mount["type"] == "bind" and "from" not in mount)


def included(path: str, patterns: list[str]) -> bool:
    """Return whether .dockerignore includes a file: the last pattern that matches it, or a folder above it, decides."""
    found = True
    for pattern in patterns:
        if "?" in pattern or "[" in pattern:
            raise NotImplementedError(pattern)
        expression = re.escape(pattern.removeprefix("!")).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
        if any(re.fullmatch(expression, str(part)) for part in (Path(path), *Path(path).parents)):
            found = pattern.startswith("!")
    return found


def context_files(context: Path, source: str) -> list[Path]:
    """Return the files of a source that .dockerignore includes."""
    patterns = [line for line in (context / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    found = (
        [context / source] if (context / source).is_file() else sorted(p for p in (context / source).rglob("*") if p.is_file())
    )
    return [path for path in found if included(path.relative_to(context).as_posix(), patterns)]


class Build:
    """Stages of a Dockerfile, built on demand in a folder."""

    def __init__(self, stages: dict[str, Stage], context: Path, folder: Path, arguments: dict[str, str]) -> None:
        self.stages, self.context, self.folder, self.arguments = stages, context, folder, arguments
        self.root = folder / "root"
        self.images: dict[str, Image] = {}
        self.commands = folder / "commands"
        self.commands.mkdir()
        for name, command in {"python": sys.executable, "pip": f"{sys.executable} -m pip"}.items():
            (self.commands / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
            (self.commands / name).chmod(0o755)

    def image(self, name: str) -> Image:
        """Return a built stage; the link `root` points to it."""
        if name not in self.images:
            self.images[name] = self.build(name)
        self.enter(self.images[name].folder)
        return self.images[name]

    def build(self, name: str) -> Image:
        """Execute the instructions of a stage."""
        stage, folder = self.stages[name], self.folder / name
        if stage.base in self.stages:
            base = self.image(stage.base)
            shutil.copytree(base.folder, folder, symlinks=True)
            image = Image(folder, dict(base.environment), base.workdir)
        else:
            for kept in FOLDERS:
                (folder / kept).mkdir(parents=True)
            image = Image(folder, {"PATH": f"{self.commands}:/usr/bin:/bin"}, self.root)
        arguments: dict[str, str] = {}
        user = ""
        for instruction, text in stage.instructions:
            match instruction:
                case "ARG":
                    key, _, default = text.partition("=")
                    arguments[key] = self.arguments.get(key, default)
                case "ENV":
                    known = image.environment | arguments
                    for pair in shlex.split(self.mapped(text)):
                        key, value = pair.split("=", 1)
                        image.environment[key] = string.Template(value).substitute(known)
                case "WORKDIR":
                    self.enter(folder)
                    image.workdir = Path(self.mapped(text))
                    image.workdir.mkdir(parents=True, exist_ok=True)
                case "COPY":
                    self.copy(text, image)
                case "RUN":
                    if user:
                        raise NotImplementedError("RUN after USER")
                    self.run(read_run(text), image, arguments)
                case "USER":
                    user = text
                case "LABEL" | "STOPSIGNAL" | "ENTRYPOINT" | "CMD":
                    pass  # for running the image
                case _:
                    raise NotImplementedError(f"{instruction} {text}")
        return image

    def enter(self, folder: Path) -> None:
        """Point the link `root` to a stage."""
        self.root.unlink(missing_ok=True)
        self.root.symlink_to(folder)

    def mapped(self, text: str) -> str:
        """Return a text with the absolute paths of the image replaced by those of the stage that is being built."""
        return re.sub(r"(?<![\w.:/*$}])/(?=\w)", f"{self.root}/", text)

    def copy(self, text: str, image: Image) -> None:
        """COPY files or folders of the context that .dockerignore includes."""
        if text.startswith("--"):
            raise NotImplementedError(f"COPY {text}")
        *names, target = text.split()
        self.enter(image.folder)
        destination = image.workdir / self.mapped(target)
        for name in names:
            self.lay(self.context / name, destination / Path(name).name if target.endswith("/") else destination)

    def lay(self, source: Path, destination: Path) -> None:
        """Copy a file or a folder of the context or of a stage."""
        if source.is_relative_to(self.context):
            files = context_files(self.context, source.relative_to(self.context).as_posix())
        else:
            files = [source] if source.is_file() else [path for path in source.rglob("*") if path.is_file()]
        if not files:
            raise FileNotFoundError(source)
        for path in files:
            target = destination / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)

    @contextmanager
    def mounted(self, mounts: list[dict[str, str]], image: Image) -> Iterator[None]:
        """Copy mounted files to their targets, and remove them again; a cache is empty."""
        targets = []
        for mount in mounts:
            target = image.folder / mount["target"].lstrip("/")
            targets.append(target)
            if mount["type"] == "bind":
                stage = self.image(mount["from"]).folder if "from" in mount else self.context
                self.lay(stage / mount["source"].lstrip("/"), target)
            elif mount["type"] == "cache":
                target.mkdir(parents=True)
            else:
                raise NotImplementedError(str(mount))
        self.enter(image.folder)
        yield
        for target in targets:
            target.unlink() if target.is_file() else shutil.rmtree(target)

    def run(self, run: Run, image: Image, arguments: dict[str, str]) -> None:
        """RUN a command in the shell."""
        passed = {name: value for name, value in os.environ.items() if PASSED_ON.match(name)}
        given = {name: value for name, value in arguments.items() if value}
        with self.mounted(run.mounts, image):
            done = subprocess.run(
                ["/bin/sh", "-c", self.mapped(run.command)],
                cwd=image.workdir,
                env=passed | given | image.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        if done.returncode:
            raise RuntimeError(f"{run.command}\n{done.stdout[-4000:]}")

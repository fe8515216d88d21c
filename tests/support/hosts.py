"""Hosts and sandboxes on this machine, for tests of jobs on several nodes.

    with hosts("lmdist-train-0.lmdist-train", "lmdist-train-1.lmdist-train") as machines:
        pod = Sandbox(machines[0], environment={"PATH": PATH}, mounts={"/runs": tmp_path / "runs"})
        job = subprocess.Popen(pod.command("lmdist-train", "--run_folder=/runs/a"))
        first_process(job).terminate()          # as Kubernetes stops a pod

Hosts are network namespaces (benchmarks/namespaces.py). A sandbox is a host on which commands run as in a container.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import psutil
import pytest

from namespaces import Host, can_make_hosts, hosts

__all__ = ["Host", "Sandbox", "first_process", "hosts", "needs_hosts", "needs_pods"]

ROOT = Path(__file__).parents[2]
IMAGE = [
    *(Path(folder) for folder in ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64")),
    *(Path("/etc") / name for name in ("alternatives", "group", "hosts", "ld.so.cache", "nsswitch.conf", "passwd", "ssl")),
]
"""What replaces an image: the files of this machine that a pod sees, beside Python's environment and this repository."""
can_make_hosts = cache(can_make_hosts)


@dataclass(frozen=True)
class Sandbox:
    """A container on a host of its own: read-only except for its mounts and its empty folders, and without privileges."""

    host: Host
    environment: Mapping[str, str] = field(default_factory=dict)
    """All variables of the command, PATH included."""
    mounts: Mapping[str, Path] = field(default_factory=dict)
    """Writable folders by their place in the pod. Their owner is not changed, as without an fsGroup."""
    configuration: Mapping[str, Path] = field(default_factory=dict)
    """Read-only files and folders by their place in the pod."""
    empty: Mapping[str, int] = field(default_factory=lambda: {"/dev/shm": 0, "/tmp": 0})
    """The size in bytes of empty folders in memory, writable by everybody, by their place; 0 is unlimited."""
    user: int = 10001
    group: int = 10001
    folder: str = "/"
    image: Sequence[Path] = (*IMAGE, Path(sys.prefix), Path(sys.base_prefix), ROOT)

    def command(self, *command: str | Path) -> list[str]:
        """Return a command line that runs a command as process 1 of the pod, and exits with its code.

        Signals go to `first_process`, not to the process of this command line.
        """
        box = ["bwrap", "--unshare-pid", "--unshare-ipc", "--as-pid-1", "--die-with-parent", "--clearenv"]
        box += ["--proc", "/proc", "--dev", "/dev"]
        for place, size in self.empty.items():
            box += ["--perms", "1777", *(["--size", str(size)] if size else []), "--tmpfs", place]
        # Later mounts hide earlier ones: Python may lie in /tmp.
        for path in self.image:
            if path.is_symlink():
                box += ["--symlink", os.readlink(path), str(path)]
            elif path.exists():
                box += mount("--ro-bind", path, str(path))
        for place, path in self.configuration.items():
            box += mount("--ro-bind", path, place)
        for place, path in self.mounts.items():
            box += mount("--bind", path, place)
        box += ["--remount-ro", "/", "--chdir", self.folder]
        for name, value in self.environment.items():
            box += ["--setenv", name, value]
        # The user is changed last, because creating namespaces takes root.
        user = [shutil.which("setpriv") or "setpriv", f"--reuid={self.user}", f"--regid={self.group}", "--clear-groups"]
        rights = ["--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"]
        return self.host.command(*box, "--", *user, *rights, "--", *command)


def mount(how: str, path: Path, place: str) -> list[str]:
    """Return bwrap's options that mount a path, in folders that everybody may enter."""
    parents = [str(parent) for parent in reversed(Path(place).parents)]
    return [*(option for parent in parents[1:] for option in ("--dir", parent)), how, str(path), place]


def first_process(pod: subprocess.Popen[str] | subprocess.Popen[bytes]) -> psutil.Process:
    """Return process 1 of a started pod; killing it kills the pod. ProcessLookupError where the pod has terminated."""
    until = time.monotonic() + 300
    while pod.poll() is None:
        with suppress(psutil.NoSuchProcess):  # it terminates between two looks
            shell = psutil.Process(pod.pid)  # it sets up the host first, and becomes bubblewrap then
            if shell.name() == "bwrap" and (children := shell.children()) and children[0].name() != "bwrap":
                return children[0]  # until then bubblewrap is still building the sandbox
        assert time.monotonic() < until
        time.sleep(0.01)
    raise ProcessLookupError(f"the pod has exited with {pod.returncode}")


@cache
def can_make_pods() -> bool:
    """Return whether this machine permits hosts and has the tools for sandboxes."""
    if not can_make_hosts() or not all(shutil.which(tool) for tool in ("bwrap", "setpriv")):
        return False
    with hosts("pod") as (host,):
        return subprocess.run(Sandbox(host).command("/usr/bin/true"), capture_output=True).returncode == 0


needs_hosts = pytest.mark.skipif(not can_make_hosts(), reason="no right to create network namespaces, or no iproute2")
needs_pods = pytest.mark.skipif(not can_make_pods(), reason="no bubblewrap, or no right to create network namespaces")

"""Hosts on this machine: network namespaces on one switch, each with an address and a host name, which know each other by name.

    with hosts("host-a", "host-b") as (a, b):
        subprocess.run(a.command("ping", "-c", "1", "host-b"))

A name may have a domain, such as `lmdist-train-0.lmdist-train`: the host is then called by what stands before the dot, as a
pod is, and answers to both. Hosts share this machine's files and processors; they do not reach this machine, nor the hosts of
another process. Linux, root, iproute2 and util-linux.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PREFIX = "lmdist"
"""Of the namespaces' names; the id of the process that made them follows."""
NUMBERS = itertools.count()
"""Of the contexts of this process, so that one can be within another."""
INSIDE = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'
"""Run in a namespace of names and of mounts, so that nobody else sees it."""


@dataclass(frozen=True)
class Host:
    """One of the hosts."""

    name: str
    address: str
    namespace: str
    switch: str
    """The namespace of the switch."""
    port: str
    """The switch's end of the cable."""
    names: Path
    """What the host has for an /etc/hosts."""

    def command(self, *command: str | Path) -> list[str]:
        """A command line that runs a command on this host; the process that it starts becomes the command."""
        enter = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "--mount", "sh", "-c", INSIDE, "sh"]
        return [*enter, self.name.partition(".")[0], str(self.names), *map(str, command)]

    def plug(self) -> None:
        """Connect the host to the switch."""
        ip("-n", self.switch, "link", "set", self.port, "up")

    def unplug(self) -> None:
        """Pull the host's cable: nobody is told, nothing arrives."""
        ip("-n", self.switch, "link", "set", self.port, "down")

    def kill_all(self) -> None:
        """SIGKILL to every process of the host, as if its power had failed."""
        kill_all(self.namespace)


@contextmanager
def hosts(*names: str) -> Iterator[list[Host]]:
    """Hosts of these names, for as long as the context lasts; what still runs on them then is killed."""
    remove_leftovers()
    context = next(NUMBERS)
    switch, *inside = [f"{PREFIX}-{os.getpid()}-{context}-{host}" for host in ("switch", *range(1, len(names) + 1))]
    with ExitStack() as stack:
        files = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lmdist-hosts-"))) / "hosts"
        files.parent.chmod(0o755)
        made = [
            Host(name, f"10.77.0.{number}", namespace, switch, f"port-{number}", files)
            for number, (name, namespace) in enumerate(zip(names, inside, strict=True), start=1)
        ]
        lines = ["127.0.0.1 localhost", *(f"{host.address} {host.name} {host.name.partition('.')[0]}" for host in made)]
        files.write_text("\n".join(lines) + "\n")
        for namespace in (switch, *inside):
            stack.callback(remove, namespace)
            ip("netns", "add", namespace)
        ip("-n", switch, "link", "add", "switch", "type", "bridge")
        ip("-n", switch, "link", "set", "switch", "up")
        for host in made:
            ends = ["eth0", "netns", host.namespace, "type", "veth", "peer", "name", host.port, "netns", switch]
            ip("link", "add", *ends)
            ip("-n", switch, "link", "set", host.port, "master", "switch")
            ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", host.namespace, "link", "set", device, "up")
            host.plug()
        yield made


def can_make_hosts() -> bool:
    """Root, the tools, and a kernel with network namespaces, veth and bridges."""
    if os.getuid() != 0 or not all(shutil.which(tool) for tool in ("ip", "unshare", "mount", "hostname")):
        return False
    try:
        with hosts("host") as (host,):
            return subprocess.run(host.command("true"), capture_output=True).returncode == 0
    except subprocess.CalledProcessError:
        return False


def namespaces() -> set[str]:
    """The names of this machine's network namespaces."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    return {line.split()[0] for line in listed.splitlines() if line.strip()}


def remove_leftovers() -> None:
    """Remove the hosts of processes that were killed before they could do it themselves."""
    for name in namespaces():
        made_by = re.fullmatch(rf"{PREFIX}-(\d+)-\d+-\w+", name)
        if made_by and not Path("/proc", made_by[1]).exists():
            remove(name)


def remove(namespace: str) -> None:
    """Remove a network namespace with all that runs in it, if it is there."""
    kill_all(namespace)
    subprocess.run(["ip", "netns", "delete", namespace], capture_output=True)


def kill_all(namespace: str) -> None:
    """SIGKILL to every process in a network namespace, until there is none."""
    until = time.monotonic() + 10
    while True:
        listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True).stdout.split()
        if not listed:
            return
        assert time.monotonic() < until, f"processes {listed} of {namespace} do not die"
        for process in listed:
            with suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)
        time.sleep(0.02)


def ip(*arguments: str) -> None:
    """Run iproute2's ip."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True)

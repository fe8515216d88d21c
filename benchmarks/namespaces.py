"""Hosts on this machine: network namespaces on one switch, each with an address and a host name that the others resolve.

    with hosts("host-a", "host-b") as (a, b):
        subprocess.run(a.command("ping", "-c", "1", "host-b"))

A name may have a domain, such as `lmdist-train-0.lmdist-train`: the host name is then the part before the dot, as in a pod,
and both names resolve. Hosts share this machine's files and CPUs. They cannot reach this machine, nor the hosts of another
process. Requires Linux, root, iproute2 and util-linux.
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
"""Of the namespaces' names; the id of the process that created them follows."""
NUMBERS = itertools.count()
"""One for each context of this process, so that contexts can be nested."""
INSIDE = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'
"""Run in a UTS and a mount namespace, so that no other process is affected."""


@dataclass(frozen=True)
class Host:
    """A host."""

    name: str
    address: str
    namespace: str
    switch: str
    """The namespace of the switch."""
    port: str
    """The switch's end of the veth pair."""
    names: Path
    """The file that the host has as /etc/hosts."""

    def command(self, *command: str | Path) -> list[str]:
        """Return a command line that runs a command on this host, by exec: without a process in between."""
        enter = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "--mount", "sh", "-c", INSIDE, "sh"]
        return [*enter, self.name.partition(".")[0], str(self.names), *map(str, command)]

    def plug(self) -> None:
        """Connect the host to the switch."""
        ip("-n", self.switch, "link", "set", self.port, "up")

    def unplug(self) -> None:
        """Disconnect the host: packets are lost without an error."""
        ip("-n", self.switch, "link", "set", self.port, "down")

    def kill_all(self) -> None:
        """Kill every process of the host, as a power failure would."""
        kill_all(self.namespace)


@contextmanager
def hosts(*names: str) -> Iterator[list[Host]]:
    """Yield hosts of these names; kill what still runs on them when the context ends."""
    remove_leftovers()
    context = next(NUMBERS)
    switch, *inside = [f"{PREFIX}-{os.getpid()}-{context}-{host}" for host in ("switch", *range(1, len(names) + 1))]
    with ExitStack() as stack:
        files = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lmdist-hosts-"))) / "hosts"
        files.parent.chmod(0o755)
        created = [
            Host(name, f"10.77.0.{number}", namespace, switch, f"port-{number}", files)
            for number, (name, namespace) in enumerate(zip(names, inside, strict=True), start=1)
        ]
        lines = ["127.0.0.1 localhost", *(f"{host.address} {host.name} {host.name.partition('.')[0]}" for host in created)]
        files.write_text("\n".join(lines) + "\n")
        for namespace in (switch, *inside):
            stack.callback(remove, namespace)
            ip("netns", "add", namespace)
        ip("-n", switch, "link", "add", "switch", "type", "bridge")
        ip("-n", switch, "link", "set", "switch", "up")
        for host in created:
            ends = ["eth0", "netns", host.namespace, "type", "veth", "peer", "name", host.port, "netns", switch]
            ip("link", "add", *ends)
            ip("-n", switch, "link", "set", host.port, "master", "switch")
            ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", host.namespace, "link", "set", device, "up")
            host.plug()
        yield created


def can_make_hosts() -> bool:
    """Return whether there are root, the tools, and a kernel with network namespaces, veth and bridges."""
    if os.getuid() != 0 or not all(shutil.which(tool) for tool in ("ip", "unshare", "mount", "hostname")):
        return False
    try:
        with hosts("host") as (host,):
            return subprocess.run(host.command("true"), capture_output=True).returncode == 0
    except subprocess.CalledProcessError:
        return False


def namespaces() -> set[str]:
    """Return the names of this machine's network namespaces."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    return {line.split()[0] for line in listed.splitlines() if line.strip()}


def remove_leftovers() -> None:
    """Remove the hosts of processes that were killed."""
    for name in namespaces():
        creator = re.fullmatch(rf"{PREFIX}-(\d+)-\d+-\w+", name)
        if creator and not Path("/proc", creator[1]).exists():
            remove(name)


def remove(namespace: str) -> None:
    """Remove a network namespace with all its processes, if it exists."""
    kill_all(namespace)
    subprocess.run(["ip", "netns", "delete", namespace], capture_output=True)


def kill_all(namespace: str) -> None:
    """Kill every process in a network namespace, until there is none."""
    until = time.monotonic() + 10
    while True:
        listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True).stdout.split()
        if not listed:
            return
        assert time.monotonic() < until, f"processes {listed} of {namespace} are still running"
        for process in listed:
            with suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)
        time.sleep(0.02)


def ip(*arguments: str) -> None:
    """Run iproute2's ip."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True)

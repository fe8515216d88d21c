"""Serve a bundle over HTTP: `lmdist-serve bundles/news`.

One process and one port have OpenAI's completions API (/v1/completions, also streamed), MLflow's scoring protocol
(/invocations), figures for Prometheus (/metrics) and a page to try the model (/). This module reads the command line and starts
what serving/ has. docs/serving.md has more.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lmdist.bounds import above, between, check
from lmdist.command_line import CommandParser, exit_on_error
from lmdist.console import log
from lmdist.counted import counted
from lmdist.errors import DataError, MissingInputError, Stopped, UsageError, require
from lmdist_export import registered
from lmdist_export.api import BUNDLE, load
from lmdist_export.options import BATCH_SIZES, THREADS

if TYPE_CHECKING:
    from lmdist_export.serving.application import Application
    from lmdist_export.serving.service import Service
    from lmdist_export.serving.watching import Watched

T = TypeVar("T")

COMMAND = "lmdist-serve"
PACKAGES = ("onnxruntime", "starlette", "uvicorn", "httptools", "prometheus_client")
ORIGIN = re.compile(r"\*|https?://[^/?#\s]+")
HOST = re.compile(r"\*|[\w.-]+")
BACKLOG = 2_048
"""Connections that wait to be accepted."""
EVERY_SECONDS = 30
"""How often --watch looks, where it is not said."""
MAX_WAIT_SECONDS = 3_600
"""Until --watch tries again to load a bundle that could not be loaded."""

PORTS = between(0, 65_535, "0 takes a free one")
TIMEOUT_SECONDS = above(0)
DRAIN_SECONDS = between(0, 86_400)
WATCH_SECONDS = between(0.1, 86_400)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = CommandParser(
        prog=COMMAND,
        description="Serve a bundle written by lmdist-export over HTTP: OpenAI's completions API at /v1/completions, MLflow's "
        "scoring protocol at /invocations, Prometheus' metrics at /metrics, and a page to try the model at /.",
        epilog="At Ctrl-C or SIGTERM no more requests are accepted, those that were received are answered, then it ends. "
        "docs/serving.md has examples, limits, and how to run it in production.",
    )
    parser.add_argument("bundle", help=BUNDLE)
    where = parser.add_argument_group("where it listens, and for whom")
    where.add_argument("--host", default="127.0.0.1", help="(default: 127.0.0.1, this machine only; 0.0.0.0 is every address)")
    where.add_argument("--port", type=int, default=8000, metavar="N", help="(default: 8000; 0 takes a free one)")
    where.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="answer only requests with one of these keys, a key a line (default: all)",
    )
    where.add_argument(
        "--cors-origin", action="append", default=[], metavar="ORIGIN",
        help="let pages of https://example.org, or of any (*), read the answers in a browser; may be given several times",
    )  # fmt: skip
    where.add_argument(
        "--allowed-host", action="append", default=[], metavar="NAME",
        help="answer requests whose Host is NAME, as behind a proxy, and else those for localhost and for addresses in numbers "
        "only; * is any; may be given several times (default: none on this machine only and without keys, else any)",
    )  # fmt: skip
    model = parser.add_argument_group("the model")
    model.add_argument("--name", help="what clients call the model (default: the name of the folder, or in MLflow)")
    model.add_argument(
        "--watch", type=float, nargs="?", const=EVERY_SECONDS, metavar="SECONDS",
        help="look every SECONDS whether the folder, or the alias in MLflow, is another bundle now, and serve that one from "
        f"then on; no request is lost (default: serve what was loaded until the end; --watch alone: {EVERY_SECONDS})",
    )  # fmt: skip
    model.add_argument("--provider", choices=("cpu", "cuda"), default="cpu", help="where the model runs (default: cpu)")
    model.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads (default: available CPUs, at most 4)")
    model.add_argument("--batch-size", type=int, default=32, metavar="N", help="texts generated at a time (default: 32)")
    requests = parser.add_argument_group("requests")
    requests.add_argument(
        "--timeout", type=float, default=600, metavar="SECONDS", help="of a request, then it is cancelled (default: 600)"
    )
    requests.add_argument(
        "--drain", type=int, default=45, metavar="SECONDS", help="for open requests to end after a SIGTERM (default: 45)"
    )
    requests.add_argument("--no-access-log", action="store_true", help="do not log requests (default: a line of JSON for each)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Serve a bundle, or print in one line why that is not possible."""
    with exit_on_error(COMMAND):
        run(parser().parse_args(argv))


def run(arguments: argparse.Namespace) -> None:
    """Load the bundle, and answer requests until a signal comes."""
    check_arguments(arguments)
    require(*PACKAGES, purpose=f"{COMMAND} needs a package: ")
    from lmdist_export.serving.access import ApiKeys, Hosts
    from lmdist_export.serving.application import Application
    from lmdist_export.serving.watching import Watched

    keys = None if arguments.api_key_file is None else ApiKeys.read(arguments.api_key_file)
    watched = None if arguments.watch is None else Watched(arguments.bundle)
    listening = bound(arguments.host, arguments.port)
    host, port = listening.getsockname()[:2]
    is_local = ip_address(host).is_loopback
    is_open = is_local and keys is None  # to pages of other servers too, which a browser of this machine shows
    with listening:
        version = watched.version() if watched else ""
        application = Application(  # which alone holds the service, so that another one takes its place in memory too
            opened(watched.address(version) if watched else arguments.bundle, arguments),
            arguments.name or name_of(arguments.bundle),
            version,
            keys=keys,
            hosts=Hosts(arguments.allowed_host) if is_open or arguments.allowed_host else None,
            timeout_seconds=arguments.timeout,
            cors_origins=arguments.cors_origin,
            access_log=not arguments.no_access_log,
        )
        if not is_local and keys is None:
            log(f"warning: whoever reaches {arguments.host} can use the model: --api-key-file has keys for it", COMMAND)
        address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        with port_errors(arguments.host, arguments.port, listening):
            listening.listen(BACKLOG)
        log(f"{application.name} at {address} (a page), {address}/v1 (OpenAI's API), {address}/invocations (MLflow's)", COMMAND)
        # The thread of the batches gets the interpreter's lock back from the event loop, and from a thread that reads a long
        # body, 50 times as soon as by default: 32 clients get a tenth more tokens a second (benchmarks/serving.py).
        sys.setswitchinterval(0.0001)
        num_cancelled = asyncio.run(serve(application, listening, arguments, watched, version))
        application.service.batcher.close()
    if num_cancelled:
        late = f"{counted(num_cancelled, 'request')} had not ended within --drain, {counted(arguments.drain, 'second')}"
        log(f"warning: {late}, and were cancelled", COMMAND)
    else:
        log("all requests are answered", COMMAND)


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise UsageError for mistakes that can be seen before anything is read."""
    check("--port", arguments.port, PORTS)
    check("--threads", arguments.threads, THREADS)
    check("--batch-size", arguments.batch_size, BATCH_SIZES)
    check("--timeout", arguments.timeout, TIMEOUT_SECONDS)
    check("--drain", arguments.drain, DRAIN_SECONDS)
    if arguments.watch is not None:
        check("--watch", arguments.watch, WATCH_SECONDS)
    for origin in arguments.cors_origin:
        if not ORIGIN.fullmatch(origin):
            raise UsageError(f"--cors-origin is {origin!r}; a scheme and a host, as https://example.org, or * is expected")
    for name in arguments.allowed_host:
        if not HOST.fullmatch(name):
            raise UsageError(f"--allowed-host is {name!r}; a name alone, as news.example.org, or * is expected")


def name_of(bundle: str) -> str:
    """Return what clients call a model: the name of its folder, or its name in MLflow."""
    if registered.is_registered(bundle):
        kind, _, place = bundle.partition(":")
        parts = place.strip("/").split("/")
        return parts[0].partition("@")[0] if kind == "models" else parts[-1]
    return Path(bundle).absolute().name


def bound(host: str, port: int) -> socket.socket:
    """Return a socket at an address, which does not listen yet: clients wait for the model by asking again.

    Raise UsageError for an address that this machine does not have, DataError for a port that is taken.
    """
    try:
        if not host:  # which would be every address
            raise UnicodeError
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError):
        raise UsageError(f"--host is {host!r}; an address of this machine is expected, as 127.0.0.1 or 0.0.0.0") from None
    found = socket.socket(family, kind, protocol)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with port_errors(host, port, found):
        found.bind(address)
    return found


@contextmanager
def port_errors(host: str, port: int, used: socket.socket) -> Iterator[None]:
    """Use a port inside; raises DataError, and closes the socket, where it cannot be used."""
    try:
        yield
    except OSError as error:
        used.close()
        raise DataError(f"port {port} of {host} cannot be used: {error.strerror}") from None


def opened(address: str, arguments: argparse.Namespace) -> Service:
    """Load a bundle and generate a token by it."""
    from lmdist_export.serving.batching import RequestTimeout
    from lmdist_export.serving.service import Service

    model = load(address, provider=arguments.provider, threads=arguments.threads)
    service = Service(model.sampler, arguments.batch_size)
    try:
        service.warm_up(arguments.timeout)
    except RequestTimeout:
        raise Stopped(f"the model generated no token within --timeout, {arguments.timeout:g} seconds") from None
    log(f"loaded {model!r}", COMMAND)
    return service


async def serve(
    application: Application, listening: socket.socket, arguments: argparse.Namespace, watched: Watched | None, version: str
) -> int:
    """Answer requests until a signal comes, and look for another bundle meanwhile; return how many were cancelled then."""
    from lmdist_export.serving.application import reading_threads
    from lmdist_export.serving.connections import server_of

    asyncio.get_running_loop().set_default_executor(reading_threads())
    watching = asyncio.ensure_future(watch(application, arguments, watched, version)) if watched else None
    server = server_of(application.asgi, arguments.drain)
    try:
        await server.serve([listening])
    finally:
        if watching:
            watching.cancel()
    return server.num_cancelled


async def in_daemon_thread(work: Callable[[], T]) -> T:
    """Return what a thread makes of `work`; it may take minutes, and neither the end of the loop nor of the process waits."""

    def run(done: Future[T]) -> None:
        done.set_running_or_notify_cancel()
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)
        finally:
            del done  # else an error, which knows this frame, would keep itself and what was loaded

    done: Future[T] = Future()
    threading.Thread(target=run, args=(done,), name="watch", daemon=True).start()
    return await asyncio.wrap_future(done)


async def watch(application: Application, arguments: argparse.Namespace, watched: Watched, version: str) -> None:
    """Look for another bundle again and again, and serve it; what goes wrong is logged once, and tried again.

    One that could not be loaded is tried again ever more rarely: loading takes the CPUs and the network from requests.
    """
    reported, failed = "", None
    wait = again = 0.0
    now = asyncio.get_running_loop().time
    while True:
        await asyncio.sleep(arguments.watch)
        found = None
        try:
            found = await in_daemon_thread(watched.version)
            if found == failed and now() < again:
                continue
            if found != version:
                service = await in_daemon_thread(partial(opened, watched.address(found), arguments))
                application.replace(service, found)
                version = found
                log(f"{application.name}: from now on version {version} answers", COMMAND)
                del service  # the one that answers is the application's alone, so that it can go
            reported, failed = "", None
        except Exception as error:  # whatever it is, the model that was loaded goes on, and so does the watch
            if found:
                wait = min(2 * wait if found == failed else 2 * arguments.watch, max(MAX_WAIT_SECONDS, arguments.watch))
                failed, again = found, now() + wait
            is_known = isinstance(error, UsageError | DataError | MissingInputError | Stopped)
            sentence = str(error) if is_known else f"{type(error).__name__}: {error}"
            if sentence != reported:
                log(f"warning: --watch: {sentence}; the model that was loaded goes on", COMMAND)
            reported = sentence


if __name__ == "__main__":
    main(sys.argv[1:])

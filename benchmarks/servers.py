"""A real MLflow server that can be killed and stopped, and a proxy that delays, fails or loses responses."""

from __future__ import annotations

import http.client
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Server:
    """`mlflow server` over a database in `folder`; it keeps its port when it is started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = f"sqlite:///{folder}/server.db"
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        options = ["--backend-store-uri", self.store, "--port", str(self.port), "--workers", "1"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *options],
            cwd=self.folder,
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 120
        while not answers(f"{self.uri}/health"):
            assert time.monotonic() < deadline, "the MLflow server does not start"
            time.sleep(0.2)

    def signal(self, number: int) -> None:
        """Send a signal to all its processes."""
        assert self.process
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """Kill all its processes."""
        if self.process:
            with suppress(ProcessLookupError):  # killed already
                self.signal(signal.SIGKILL)
            self.process.wait()
            self.process = None


class Proxy(ThreadingHTTPServer):
    """Forwards requests to a server as `mode` says."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.target_port = port
        self.mode = "fine"
        """fine, slow (responses are delayed), error (500 without forwarding), lost (forwarded, and answered with 500)"""
        self.delay_seconds = 1.0
        self.uri = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    """One connection through the proxy."""

    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        """Answer one request."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        assert isinstance(self.server, Proxy)
        mode = self.server.mode
        status, headers, content = 500, {}, b"error"
        if mode == "slow":
            time.sleep(self.server.delay_seconds)
        if mode != "error":
            behind = http.client.HTTPConnection("127.0.0.1", self.server.target_port, timeout=60)
            behind.request(self.command, self.path, body, dict(self.headers))
            response = behind.getresponse()
            answered = response.read()
            if mode != "lost":
                status, headers, content = response.status, dict(response.headers), answered
            behind.close()
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with suppress(OSError):  # the client has gone
            self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


def answers(url: str) -> bool:
    """Return whether a server answers, and not by an error."""
    try:
        urllib.request.urlopen(url, timeout=10).close()
    except OSError:
        return False
    return True


def free_port() -> int:
    """Return a port that nobody listens on, below the ephemeral ports, so that it stays free until it is used."""
    while True:
        port = 20_000 + secrets.randbelow(9_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port

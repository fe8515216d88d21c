"""Servers of bundles in processes of their own, for the tests of serving."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from email.message import Message
from pathlib import Path
from typing import Any

from servers import answers, free_port


class Serving:
    """A server of one bundle, in a process of its own; `arguments` are those of Python."""

    def __init__(self, arguments: Sequence[str], folder: Path, **environment: str) -> None:
        self.port = free_port()
        self.log = folder / "serving.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *arguments, "--port", str(self.port)],
                stdout=log,
                stderr=log,
                env=os.environ
                | {"MLFLOW_DISABLE_TELEMETRY": "true", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
                | environment,
            )

    def wait(self) -> None:
        """Wait until it is up."""
        deadline = time.monotonic() + 200
        while not answers(f"http://127.0.0.1:{self.port}/ping"):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def post(self, body: object, content_type: str = "application/json", path: str = "/invocations") -> tuple[int, Any]:
        """Return the status and the answer to a body."""
        status, _, answer = self.request("POST", path, body, {"Content-Type": content_type})
        return status, json.loads(answer)

    def request(
        self, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Message, bytes]:
        """Return the status, the headers and the answer to a request."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        url = f"http://127.0.0.1:{self.port}{path}"
        asked = urllib.request.Request(url, data, dict(headers or {"Content-Type": "application/json"}), method=method)
        try:
            with urllib.request.urlopen(asked, timeout=120) as answer:
                return answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers, error.read()

    def allowed_origin(self, origin: str, method: str, body: object = None) -> str | None:
        """Return the origin of pages that may read an answer, for a request of a page of `origin`, by a browser's own rules."""
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        asks = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
        client.request(method, "/invocations", json.dumps(body).encode(), asks | {"Content-Type": "application/json"})
        answer = client.getresponse()
        answer.read()
        client.close()
        return answer.getheader("Access-Control-Allow-Origin")

    def texts(self, *prompts: str, **params: object) -> list[dict[str, Any]]:
        """Return the texts that continue prompts."""
        status, answer = self.post({"dataframe_records": [{"prompt": prompt} for prompt in prompts], "params": params})
        assert status == 200, answer
        return answer["predictions"]

    def stop(self) -> int:
        """Terminate it, and return its exit code."""
        self.process.terminate()
        return self.process.wait(timeout=60)

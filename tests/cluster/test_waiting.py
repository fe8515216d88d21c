"""The wait that docs/kubernetes.md prints ends when the Job has failed as well: real kubectl and a small API server."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from support.manifests import KUBECTL, ROOT

pytestmark = pytest.mark.skipif(KUBECTL is None, reason="kubectl is missing")

BATCH = {"name": "batch", "versions": [{"groupVersion": "batch/v1", "version": "v1"}]}
JOBS = {"name": "jobs", "singularName": "job", "kind": "Job", "namespaced": True, "verbs": ["get", "list", "watch"]}
ANSWERS = {
    "/api": {"kind": "APIVersions", "versions": ["v1"]},
    "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": [BATCH | {"preferredVersion": BATCH["versions"][0]}]},
    "/api/v1": {"kind": "APIResourceList", "groupVersion": "v1", "resources": []},
    "/apis/batch/v1": {"kind": "APIResourceList", "groupVersion": "batch/v1", "resources": [JOBS]},
}
COMPLETE = [{"type": "SuccessCriteriaMet", "status": "True"}, {"type": "Complete", "status": "True"}]
FAILED = [{"type": "FailureTarget", "status": "True"}, {"type": "Failed", "status": "True"}]


@contextmanager
def api_server(conditions: list[dict[str, str]]) -> Iterator[str]:
    """Serve a namespace with one Job, which runs when it is listed first and then has these conditions; yield the address."""
    job: dict[str, Any] = {"apiVersion": "batch/v1", "kind": "Job", "spec": {}, "status": {"active": 2}}
    job["metadata"] = {"name": "lmdist-smoke", "namespace": "lmdist", "uid": "1", "resourceVersion": "1"}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            answer: dict[str, Any] | None = ANSWERS.get(url.path)
            if "watch=" in url.query:
                answer = {"type": "MODIFIED", "object": job | {"status": {"conditions": conditions}}}
            elif url.path.endswith("/jobs"):
                answer = {"kind": "JobList", "apiVersion": "batch/v1", "metadata": {"resourceVersion": "1"}, "items": [job]}
            elif url.path.endswith("/lmdist-smoke"):
                answer = job
            self.send_response(404 if answer is None else 200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode() + b"\n")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(("conditions", "ends"), [(COMPLETE, True), (COMPLETE[1:], True), (FAILED, True), ([], False)])
def test_the_wait_of_the_page_ends_with_the_job(conditions: list[dict[str, str]], ends: bool, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    [command] = set(re.findall(r"^kubectl -n lmdist wait .* job/lmdist-smoke$", page, re.MULTILINE))
    words = [word for word in shlex.split(command)[1:] if not word.startswith("--timeout")]
    with api_server(conditions) as address:
        done = subprocess.run(
            [KUBECTL or "", f"--server={address}", f"--cache-dir={tmp_path}", *words, f"--timeout={20 if ends else 2}s"],
            env={"HOME": str(tmp_path)},
            capture_output=True,
            text=True,
        )
    assert (done.returncode == 0) == ends, done.stderr
    assert ("condition met" in done.stdout) == ends

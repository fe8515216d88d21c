"""Why MLflow does not accept something: in a line, without secrets, and at once where patience mends nothing."""

from __future__ import annotations

import os
import re
import sqlite3
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from lmdist.tracking import address, failures, store, uploader
from lmdist.tracking.failures import FinalError, UploadError, is_final, reason_without_secrets, upload_error, without_secrets
from servers import free_port


def failure(uri: str) -> Exception:
    """The error of a request to a store."""
    address.configure(2)
    with pytest.raises(Exception) as raised:  # noqa: PT011 - any exception of MLflow and the libraries below it
        store.Store(uri).experiment_id("lmdist")
    return raised.value


def test_a_server_that_is_away_may_come_back_and_is_named_without_its_password(monkeypatch):
    uri = f"http://somebody:pass%2Dword@127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    error = failure(uri)
    assert "pass" in str(error), "the test needs an error that quotes the address"
    assert reason_without_secrets(error) == "ConnectionRefusedError: Connection refused"
    assert not is_final(error)


class Answer(BaseHTTPRequestHandler):
    """A server that has one answer to all."""

    status, body = 200, b""

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.parametrize(
    ("status", "body", "final", "expected"),
    [
        (401, b"<html>no</html>", True, "UNAUTHENTICATED: .* failed with error code 401"),
        (403, b'{"error_code": "PERMISSION_DENIED", "message": "Ask Jo"}', True, "RestException PERMISSION_DENIED: .*Ask Jo"),
        (404, b"another server", True, "ENDPOINT_NOT_FOUND: .* error code 404"),
        (500, b"error", False, "too many 500 error responses"),
        (503, b"", False, "too many 503 error responses"),
        (200, b"<html>hello</html>", False, "not in a valid JSON format"),
    ],
)
def test_what_a_server_answers_is_shown_and_a_refusal_is_final(monkeypatch, status, body, final, expected):
    answer = type("OneAnswer", (Answer,), {"status": status, "body": body})
    with ThreadingHTTPServer(("127.0.0.1", 0), answer) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://somebody:pass-word@127.0.0.1:{server.server_port}")
        error = failure(os.environ["MLFLOW_TRACKING_URI"])
        server.shutdown()
    assert is_final(error) == final
    assert re.search(expected, reason_without_secrets(error))
    assert "pass-word" not in reason_without_secrets(error)


def test_an_address_of_no_store_is_final():
    error = failure("foo://bar")
    assert is_final(error)
    assert "foo://bar" in reason_without_secrets(error)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("GET http://a:b@host:1/api?signature=7 failed", "GET http://host:1/api failed"),
        ("the key is sesame!", "the key is ***!"),
        ("somebody with pass-word and pass%2Dword", "*** with *** and ***"),
        ("it is false, and true", "it is false, and true"),
        ("by ghp_1", "by ***"),
        ("nothing to hide: //host/path, 3 @ 4", "nothing to hide: //host/path, 3 @ 4"),
    ],
)
def test_secrets_are_removed(monkeypatch, text, expected):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://somebody:pass%2Dword@host")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "sesame")
    monkeypatch.setenv("GITHUB_TOKEN", "ghp_1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # as half of all environments have it
    monkeypatch.setenv("MLFLOW_USE_TOKEN_FILE", "true")
    assert without_secrets(text) == expected


def test_a_database_that_is_damaged_is_named_with_its_reason(tmp_path):
    (tmp_path / "text.db").write_text("this is no database")
    assert reason_without_secrets(failure(f"sqlite:///{tmp_path}/text.db")).endswith("text.db is not a database of SQLite")
    with sqlite3.connect(tmp_path / "half.db") as half:  # as MLflow leaves it on a full disk
        half.execute("CREATE TABLE experiments (experiment_id INTEGER)")
    error = failure(f"sqlite:///{tmp_path}/half.db")
    assert is_final(error)
    assert "the database is damaged, or of another version of MLflow: move it away" in reason_without_secrets(error)


def test_a_database_is_created_at_once_or_not_at_all(tmp_path, monkeypatch):
    """The disk is full: a limit to the size of files."""
    code = (
        "import resource, sys; from lmdist.tracking import address, store\n"
        "address.configure(); resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.RLIM_INFINITY))\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "with store.silence():\n    store.Store('sqlite:///new/other.db').experiment_id('lmdist')\n"
    )
    (tmp_path / "new").mkdir()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f"new/other.db.writing-{os.uname().nodename}-{dead.pid}").touch()  # of a process that was killed
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert list((tmp_path / "new").iterdir()) == []


JOB = """
import sys
from pathlib import Path
from lmdist.settings import TrackingSettings
from lmdist.tracking.logger import RunLogger
with RunLogger(Path(sys.argv[1]), TrackingSettings(), {"seed": 1}, "data", {}, 0, resume=False) as logger:
    logger.log_metrics(1, {"train/loss": 1.0})
"""


@pytest.mark.slow
def test_a_default_store_in_a_read_only_folder_costs_no_patience(tmp_path):
    """The run lies where it can be written, and the job is started where nothing can be."""
    run, here = tmp_path / "run", tmp_path / "here"
    run.mkdir()
    here.mkdir(mode=0o555)
    job = [sys.executable, "-c", JOB, str(run)]
    if os.geteuid() == 0:  # who may write where the mode forbids it, but not on a read-only file system
        read_only = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && cd "$0" && exec "$@"'
        job = ["unshare", "--mount", "sh", "-c", read_only, str(here), *job]
        if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
            pytest.skip("no namespaces here")
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    done = subprocess.run(job, cwd=here, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, *_, last = done.stderr.splitlines()
    assert f"does not accept this run's points ({here} cannot be written to: set MLFLOW_TRACKING_URI" in first
    assert last.endswith(f"MLflow has not received all of this run; lmdist-sync {run} uploads the rest")
    assert "#/experiments" not in done.stderr
    assert list(here.iterdir()) == []


def test_what_patience_does_not_mend_is_reported_once_and_not_tried_again(monkeypatch, tmp_path):
    with (tmp_path / "stderr").open("w+") as stderr:
        retry = uploader.Retry("points", Path("metrics.jsonl"), Path("runs/my run"), stderr)
        attempts: list[Exception] = []

        def refused() -> None:
            attempts.append(FinalError("no permission"))
            raise attempts[-1]

        assert not retry.attempt(refused)
        assert not retry.persist(refused)
        assert len(attempts) == 2
        assert retry.next_time > time.monotonic() + 20
        stderr.seek(0)
        (line,) = stderr.read().splitlines()
    assert "(no permission); they are in metrics.jsonl; lmdist-sync 'runs/my run' uploads them later" in line


def test_errors_of_an_upload_keep_their_kind():
    assert type(upload_error(TimeoutError("slow"))) is UploadError
    assert type(upload_error(PermissionError(13, "Permission denied"))) is FinalError
    assert str(upload_error(PermissionError(13, "Permission denied"))) == "PermissionError: Permission denied"
    assert failures.reason_without_secrets(RuntimeError()) == "RuntimeError"


@pytest.mark.parametrize(
    ("uri", "line"),
    [
        (None, "MLflow: http://127.0.0.1:5000/#/experiments/1/runs/ab?workflowType=machine_learning"),
        ("https://me:secret@host/path/", "MLflow: https://host/path/#/experiments/1/runs/ab?workflowType=machine_learning"),
        (
            "postgresql://me:secret@host/db",
            "MLflow: http://127.0.0.1:5000/#/experiments/1/runs/ab?workflowType=machine_learning",
        ),
    ],
)
def test_pages_of_a_run(monkeypatch, uri, line):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    lines = address.pages("1", "ab")
    assert lines[0] == line
    assert "secret" not in "\n".join(lines)
    assert any("mlflow ui" in line for line in lines) == (uri is None or uri.startswith("postgresql"))


def test_the_experiment_of_the_recipe_then_of_the_environment(monkeypatch):
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    assert address.experiment_name() == "lmdist"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    assert address.experiment_name() == "mine"
    assert address.experiment_name("the recipe's") == "the recipe's"

"""Addresses of real servers on this machine: s3:// of moto's server, https:// of a server with a certificate of its own."""

from __future__ import annotations

import os
import shutil
import ssl
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lmdist.settings import PrepareSettings
from lmdist.text.machines import merge_shards, prepare_shard
from lmdist.text.prepare import main, prepare
from servers import free_port
from support.failures import last_line

CSV = "id,content\n" + "".join(f"{number},The council met {number} times.\n" for number in range(60))
FLAGS = ("--tokenizer", "wordpunct")
SAME = ("train.bin", "valid.bin", "test.bin", "vocab.txt")


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """The data folder of the same rows in a local file."""
    (tmp_path / "a.csv").write_text(CSV)
    prepare(PrepareSettings(inputs=[str(tmp_path / "a.csv")], tokenizer="wordpunct"), tmp_path / "local")
    return tmp_path / "local"


# --- s3:// ---------------------------------------------------------------------------------------------------------


def post(address: str, data: bytes) -> None:
    """Send data to an address."""
    with urllib.request.urlopen(urllib.request.Request(address, data, {"Content-Type": "text/plain"})) as answer:
        assert answer.status == 200


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server of S3 with a bucket; nobody is asked for a key yet."""
    s3fs = pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    environment = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": "geheim",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    files = s3fs.S3FileSystem()
    if not files.exists("bucket"):  # of the test before
        files.mkdir("bucket")
    files.pipe("bucket/news/a.csv", CSV.encode())
    yield address
    post(f"{address}/moto-api/reset-auth", b"inf")
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


def test_s3_gives_the_folder_of_a_local_file(s3: str, local: Path, tmp_path: Path) -> None:
    for number, address in enumerate(("s3://bucket/news/a.csv", "s3://bucket/news/*.csv")):
        main([address, "-o", str(tmp_path / str(number)), *FLAGS])
    chosen = PrepareSettings(inputs=["s3://bucket/news/*.csv"], tokenizer="wordpunct")
    for index in range(2):
        prepare_shard(chosen, tmp_path / "shards", index, 2)
    merge_shards(chosen, tmp_path / "shards", overwrite=False)
    for name in SAME:
        for folder in ("0", "1", "shards"):
            assert (tmp_path / folder / name).read_bytes() == (local / name).read_bytes()


def test_what_fails_at_s3_is_one_line(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from s3fs import S3FileSystem

    def failure(address: str) -> tuple[int, str]:
        S3FileSystem.clear_instance_cache()
        return last_line(main, capsys, address, "-o", tmp_path / "out", *FLAGS)

    assert failure("s3://bucket/news/z.csv") == (66, "lmdist-prepare: error: s3://bucket/news/z.csv does not exist")
    assert failure("s3://bucket/news/z*.csv") == (66, "lmdist-prepare: error: no file matches s3://bucket/news/z*.csv")
    assert failure("s3://nowhere/a.csv") == (66, "lmdist-prepare: error: s3://nowhere/a.csv does not exist")
    code, line = failure("s3://bucket/news")
    assert (code, "is a folder; name files in it, like 's3://bucket/news/*.csv'" in line) == (64, True), line
    post(f"{s3}/moto-api/reset-auth", b"0")  # from now on the key is looked at
    code, line = failure("s3://bucket/news/a.csv")
    assert code == 65
    assert line.startswith("lmdist-prepare: error: s3://bucket/news/a.csv cannot be read: ")
    assert "geheim" not in line
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    code, line = failure("s3://bucket/news/a.csv")
    assert code == 65
    assert "Could not connect to the endpoint URL" in line
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    code, line = failure("s3://bucket/news/a.csv")
    assert (code, "Unable to locate credentials" in line) == (65, True), line
    assert not (tmp_path / "out").exists()


# --- https:// ------------------------------------------------------------------------------------------------------


class Handler(SimpleHTTPRequestHandler):
    """Python's web server, which has a folder that nobody may read."""

    def do_HEAD(self) -> None:
        self.answer(super().do_HEAD)

    def do_GET(self) -> None:
        self.answer(super().do_GET)

    def answer(self, send: object) -> None:
        if self.path.startswith("/forbidden/"):
            self.send_error(403)
        else:
            assert callable(send)
            send()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def tls(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of a server for `localhost` alone, and the certificate that vouches for it."""
    pytest.importorskip("aiohttp")
    if not shutil.which("openssl"):
        pytest.skip("no openssl to make a certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    line = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*line.split(), *names], check=True, capture_output=True)
    served = tmp_path / "served"
    served.mkdir()
    (served / "a.csv").write_text(CSV)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(served))) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"https://localhost:{server.server_port}", certificate
        server.shutdown()


SEVERAL = """
import sys
from lmdist.text.prepare import main
for number, address in enumerate(sys.argv[1:]):
    try:
        main([address, "-o", str(number), "--tokenizer", "wordpunct"])
        code = 0
    except SystemExit as stop:
        code = stop.code
    print(f"code {code}", file=sys.stderr, flush=True)
"""


def test_https_by_a_certificate_and_what_fails_there(tls: tuple[str, Path], local: Path, tmp_path: Path) -> None:
    server, certificate = tls
    addresses = [f"{server}/a.csv", f"{server}/z.csv", f"{server}/forbidden/a.csv"]
    expected = [
        (0, "written to 0"),
        (66, f"{addresses[1]} does not exist"),
        (65, f"{addresses[2]} cannot be read: 403"),
    ]
    for address, what in (
        (server.replace("localhost", "127.0.0.1"), "certificate is not valid for '127.0.0.1'"),  # another host's
        (f"https://127.0.0.1:{free_port()}", "Cannot connect to host"),
        ("https://nowhere.invalid", "Cannot connect to host nowhere.invalid"),
    ):
        addresses.append(f"{address}/a.csv")
        expected.append((65, what))
    environment = os.environ | {"SSL_CERT_FILE": str(certificate)}
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL, *addresses], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert expected[0][1] in done.stdout
    lines = done.stderr.splitlines()
    ends = [number for number, line in enumerate(lines) if line.startswith("code ")]
    found = [(int(lines[end].split()[1]), lines[end - 1]) for end in ends]
    for (code, what), (code_found, line) in zip(expected[1:], found[1:], strict=True):
        assert code_found == code, line
        assert line.startswith("lmdist-prepare: error: ")
        assert what in line
    for name in SAME:
        assert (tmp_path / "0" / name).read_bytes() == (local / name).read_bytes()
    assert not any((tmp_path / str(number)).exists() for number in range(1, 6))


def test_a_certificate_that_nobody_vouches_for(
    tls: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, line = last_line(main, capsys, f"{tls[0]}/a.csv", "-o", tmp_path / "out", *FLAGS)
    assert code == 65
    assert "cannot be read: " in line
    assert "CERTIFICATE_VERIFY_FAILED" in line
    assert "; SSL_CERT_FILE, " in line

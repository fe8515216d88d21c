"""Files at addresses: in memory, and of a real web server, with ranges and without; and that no password is shown."""

import base64
import gzip
import io
import json
import re
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lmdist.credentials import without_credentials
from lmdist.errors import DataError, MissingInputError, Stopped, UsageError
from lmdist.settings import PrepareSettings
from lmdist.text.documents import Documents
from lmdist.text.finding import find_files
from lmdist.text.machines import merge_shards, prepare_shard
from lmdist.text.prepare import main, prepare
from lmdist.text.shards import stamp
from lmdist.text.sources import ReadOptions, size_of
from support.failures import last_line

fsspec = pytest.importorskip("fsspec")

CSV = "id,content\n" + "".join(f"{number},The council met {number} times.\n" for number in range(60))
TEXTS = [f"The council met {number} times." for number in range(60)]


def texts(*patterns: str, **options) -> list[str]:
    documents = Documents(find_files(patterns), ReadOptions(**options))
    documents.check()
    found = [document.text for document in documents]
    assert documents.bytes_read == documents.bytes
    return found


def zip_of(name: str, data: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, data)
    return file.getvalue()


def parquet_of(column: list[str]) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pa.table({"content": column}), file)
    return file.getvalue()


FILES = {
    "news/a.csv": CSV.encode(),
    "news/b.csv.gz": gzip.compress(b"content\nmore\n"),
    "news/c.zip": zip_of("c.csv", "content\nzipped\n"),
    "news/d.parquet": parquet_of(["in Parquet"]),
    "news/e f.txt": b"plain\n\ntext\n",
}
EXPECTED = [*TEXTS, "more", "zipped", "in Parquet", "plain", "text"]


@pytest.fixture
def memory() -> Iterator[str]:
    filesystem = fsspec.filesystem("memory")
    for name, data in FILES.items():
        filesystem.pipe(f"/{name}", data)
    yield "memory://news"
    filesystem.rm("/news", recursive=True)


def test_addresses_are_read_as_files_are(memory, tmp_path):
    assert texts(*(f"memory://{name}" for name in FILES)) == EXPECTED
    assert texts(f"{memory}/*") == texts("memory://**/*.*") == EXPECTED
    assert texts(f"{memory}/?.csv", f"{memory}/[ab].csv") == TEXTS
    assert texts(f"{memory}/a.csv", where="id < 2") == TEXTS[:2]
    assert [str(file) for file in find_files([f"{memory}/a.csv"])] == ["memory://news/a.csv"]
    with pytest.raises(MissingInputError, match=r"memory://news/z\.csv does not exist"):
        find_files([f"{memory}/z.csv"])
    with pytest.raises(MissingInputError, match="no file matches memory://news/z\\*"):
        find_files([f"{memory}/z*"])
    with pytest.raises(UsageError, match=r"memory://news is a folder; name files in it, like 'memory://news/\*\.csv'"):
        find_files([memory])
    fsspec.filesystem("memory").pipe("/years/2017/a.csv", b"content\nx\n")
    with pytest.raises(UsageError, match=r"name files in it, like 'memory://years/\*\*/\*\.csv'"):
        find_files(["memory://years"])
    fsspec.filesystem("memory").rm("/years", recursive=True)
    with pytest.raises(UsageError, match=r"nowhere://a\.csv cannot be read: Protocol not known: nowhere"):
        find_files(["nowhere://a.csv"])
    with pytest.raises(UsageError, match=r"zip://a\.csv::file:///c\.zip is a chain of addresses, which is not read"):
        find_files(["zip://a.csv::file:///c.zip"])
    with pytest.raises(UsageError, match=r"^webhdfs://host/d/\*\.csv is a pattern, and at such an address each file must be"):
        find_files(["webhdfs://user:geheim@host/d/*.csv"])
    for name in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(FILES[name])
    assert texts((tmp_path / "news" / "*").as_uri().replace("%2A", "*")) == EXPECTED


def test_the_folder_is_that_of_local_files(memory, tmp_path):
    (tmp_path / "a.csv").write_text(CSV)
    prepare(PrepareSettings(inputs=[str(tmp_path / "a.csv")], tokenizer="wordpunct"), tmp_path / "local")
    prepare(PrepareSettings(inputs=[f"{memory}/*.csv"], tokenizer="wordpunct"), tmp_path / "remote")
    for name in ("train.bin", "valid.bin", "test.bin", "vocab.txt"):
        assert (tmp_path / "local" / name).read_bytes() == (tmp_path / "remote" / name).read_bytes()
    meta = json.loads((tmp_path / "remote" / "meta.json").read_text())
    assert meta["sources"] == [{"name": "memory:///news/a.csv", "bytes": len(CSV)}]


def test_shards_of_another_text_at_the_same_address_are_not_merged(memory, tmp_path):
    chosen = PrepareSettings(inputs=[f"{memory}/a.csv"], tokenizer="wordpunct")
    for index in range(2):
        prepare_shard(chosen, tmp_path / "data", index, 2)
    fsspec.filesystem("memory").pipe("/news/a.csv", CSV.replace("council", "parlia.").encode())
    assert size_of(find_files(chosen.inputs)[0]) == len(CSV)
    with pytest.raises(Stopped, match=r"2 of 2 shards .* \(files\)"):
        merge_shards(chosen, tmp_path / "data", overwrite=False)
    for index in range(2):
        prepare_shard(chosen, tmp_path / "data", index, 2)
    merge_shards(chosen, tmp_path / "data", overwrite=False)
    assert "parlia" in (tmp_path / "data" / "vocab.txt").read_text().split()


# --- a web server --------------------------------------------------------------------------------------------------


class Handler(SimpleHTTPRequestHandler):
    """Python's web server, which sends no ranges; with ranges, a password and a failure where a path asks for it."""

    requests: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        if (
            self.headers.get("Authorization") != f"Basic {base64.b64encode(b'reader:geheim').decode()}"
            and "locked" in self.path
        ):
            return self.send_error(401)
        if "broken" in self.path and self.command == "GET":
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(CSV.encode())
            return None
        wanted = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        self.requests.append(f"{self.command} {self.path} {wanted[0] if wanted else ''}".strip())
        if not wanted or "ranges" not in self.path:
            return super().do_GET() if self.command == "GET" else super().do_HEAD()
        data = Path(self.translate_path(self.path)).read_bytes()
        first, last = int(wanted[1]), min(int(wanted[2]), len(data) - 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        self.wfile.write(data[first : last + 1])
        return None

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def server_of(folder: Path) -> Iterator[str]:
    """Serve a folder; yield the address without its scheme."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def server(tmp_path) -> Iterator[str]:
    pytest.importorskip("aiohttp")
    for name in ("plain", "ranges", "locked"):
        (tmp_path / name / "news").mkdir(parents=True)
        for file, data in FILES.items():
            (tmp_path / name / file).write_bytes(data)
    with server_of(tmp_path) as address:
        yield address


@pytest.mark.parametrize("folder", ["plain", "ranges"])
def test_a_web_server_with_ranges_and_without(server, folder, tmp_path):
    Handler.requests.clear()
    addresses = [f"http://{server}/{folder}/{name}".replace(" ", "%20") for name in FILES]
    assert texts(*addresses) == EXPECTED
    assert texts(f"http://{server}/{folder}/news/*.csv*") == [*TEXTS, "more"]
    assert texts(f"http://{server}/{folder}/news/a.csv?download=1") == TEXTS
    (file,) = find_files([addresses[0]])
    assert stamp(file)[1] == formatdate((tmp_path / folder / "news/a.csv").stat().st_mtime, usegmt=True), (
        "as any process finds it"
    )
    assert any("bytes=0-" in request for request in Handler.requests) == (folder == "ranges")
    if folder == "plain":
        with pytest.raises(
            UsageError, match=r"a\.csv cannot be read again by each machine, nor in parts, for its server sends no ranges"
        ):
            prepare_shard(PrepareSettings(inputs=[addresses[0]], tokenizer="wordpunct"), tmp_path / "data", 0, 2)
    with pytest.raises(MissingInputError, match=f"http://{server}/{folder}/z.csv does not exist"):
        find_files([f"http://{server}/{folder}/z.csv"])
    with pytest.raises(MissingInputError, match="no file matches"):
        find_files([f"http://{server}/{folder}/z*.csv"])


def test_no_credentials_are_shown_or_kept(server, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    shown = f"http://{server}/locked/news/a.csv?..."
    address = f"http://reader:geheim@{server}/locked/news/a.csv?token=abcdef"
    main([address, "-o", "out", "--tokenizer", "wordpunct"])
    done = capfd.readouterr()
    meta = (tmp_path / "out" / "meta.json").read_text()
    assert json.loads(meta)["sources"] == [{"name": shown, "bytes": len(CSV)}]
    assert json.loads(meta)["prepare"]["inputs"] == [shown]
    assert f"reading {shown} into out" in done.err
    failures = {
        (address, "--text-column", "body"): (65, f"{shown} has no column body"),
        (address.replace("geheim", "geheim2"),): (65, f"{shown} cannot be read: 401"),
        (address.replace("a.csv", "z.csv"),): (66, f"{shown.replace('a.csv', 'z.csv')} does not exist"),
        (address.replace("a.csv", "z*.csv"),): (66, "no file matches"),
        (re.sub(r":\d+/", ":9/", address),): (65, "http://127.0.0.1:9/locked/news/a.csv?... cannot be read: Cannot connect"),
        (address.replace("http", "hppt"),): (64, "Protocol not known: hppt"),
    }
    everything = [done.out, done.err, meta]
    for arguments, (code, message) in failures.items():
        with pytest.raises(SystemExit) as stop:
            main([*arguments, "-o", "failed", "--tokenizer", "wordpunct"])
        failed = capfd.readouterr()
        assert stop.value.code == code, failed.err
        assert message in failed.err.splitlines()[-1]
        everything += [failed.out, failed.err]
    for secret in ("reader", "geheim", "abcdef"):
        assert secret not in "".join(everything)
    assert not (tmp_path / "failed").exists()


def test_a_connection_that_breaks_off_is_one_line(server, tmp_path, capsys):
    code, line = last_line(main, capsys, f"http://{server}/broken/a.csv", "-o", tmp_path / "out")
    assert code == 65
    assert f"error: http://{server}/broken/a.csv cannot be read: " in line


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("s3://bucket/year=201?/month=01/*.csv", "s3://bucket/year=201?/month=01/*.csv"),
        ("s3://bucket/a@b/c.csv", "s3://bucket/a@b/c.csv"),
        ("https://u:p%40@host/a.csv#part", "https://host/a.csv#part"),
        ("https://u:p@q@host/a.csv", "https://host/a.csv"),
        ("https://host/a.csv?X-Amz-Signature=ab/c=&b=1", "https://host/a.csv?..."),
        ("az://c/a.csv?sv=1&sig=x and https://t@h/b", "az://c/a.csv?... and https://h/b"),
        ("who? a = b", "who? a = b"),
    ],
)
def test_credentials_are_what_stands_before_the_host_and_in_the_query(address, shown):
    assert without_credentials(address) == shown


def test_an_error_of_a_server_while_reading_is_a_data_error(memory, monkeypatch):
    files = find_files([f"{memory}/a.csv"])

    def read(*_: object) -> bytes:
        raise RuntimeError("the bucket of https://key:geheim@host is gone")

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFile.read", read, raising=False)
    with pytest.raises(DataError, match=r"memory://news/a\.csv cannot be read: the bucket of https://host is gone"):
        list(Documents(files))

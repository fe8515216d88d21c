"""lmdist-prepare on a real Dask cluster: a scheduler and two worker processes, one of which is killed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path

import pytest

from lmdist.errors import EXIT_AGAIN, EXIT_USAGE, UsageError
from lmdist.settings import PrepareSettings
from lmdist.text.machines import prepare_on_cluster
from lmdist.text.prepare import prepare
from support.jobs import installed

SHARDS = 6


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """The address and the processes of a scheduler; it has two workers of one thread, started in another folder."""
    place = tmp_path / "scheduler.json"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    options = ["--scheduler-file", str(place), "--no-dashboard", "--host", "127.0.0.1"]
    commands = [["dask_scheduler", *options, "--port", "0"]]
    commands += [["dask_worker", *options, "--nthreads", "1", "--no-nanny", "--local-directory", str(elsewhere)]] * 2
    processes = []
    with ExitStack() as stack:
        for name, *arguments in commands:
            log = stack.enter_context((tmp_path / f"{name}.log").open("ab"))
            line = [sys.executable, "-m", f"distributed.cli.{name}", *arguments]
            process = subprocess.Popen(line, cwd=elsewhere, env=installed(), stdout=log, stderr=log)
            processes.append(process)
            stack.callback(process.wait)
            stack.callback(process.kill)
        until = time.monotonic() + 300
        while not place.exists() or not place.read_text():
            assert time.monotonic() < until, (tmp_path / "dask_scheduler.log").read_text()
            time.sleep(0.05)
        yield json.loads(place.read_text())["address"], processes


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_its_shard_only(
    cluster: tuple[str, list[subprocess.Popen[bytes]]], tmp_path: Path
) -> None:
    address, processes = cluster
    text = "\n".join(json.dumps({"content": " ".join(f"w{n * 7 % 5000 + m}" for m in range(100))}) for n in range(8_000))
    (tmp_path / "a.jsonl").write_text(text)
    arguments = ["a.jsonl", "-o", "data", "--tokenizer", "wordpunct", "--scheduler", address, "--shards", str(SHARDS)]
    line = [sys.executable, "-m", "lmdist.text.prepare", *arguments]
    process = subprocess.Popen(line, cwd=tmp_path, env=installed(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "data.shards"
    until = time.monotonic() + 300
    done: dict[str, int] = {}
    while True:  # until a shard is done and another one is being written
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        names = os.listdir(folder) if folder.exists() else []
        done = {name: (folder / name).stat().st_ino for name in names if not name.startswith(".")}
        writing = [match for name in names if (match := re.fullmatch(r"\.(.+)\.writing-.+-(\d+)", name))]
        if done and writing:
            break
        time.sleep(0.002)
    (killed,) = (process for process in processes if process.pid == int(writing[0][2]))
    killed.kill()
    killed.wait()  # a zombie would still be a process
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert f"{SHARDS} of {SHARDS} shards are counted" in err
    assert "written to data\n" in out
    assert {name: (folder / name).stat().st_ino for name in done} == done
    assert len(os.listdir(folder)) == SHARDS, "what the killed worker left is removed"

    prepare(PrepareSettings(inputs=[str(tmp_path / "a.jsonl")], tokenizer="wordpunct"), tmp_path / "whole")
    for name in ("train.bin", "valid.bin", "test.bin", "vocab.txt", "text.json"):
        assert (tmp_path / "data" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("has_workers", [True, False])
def test_a_scheduler_that_is_lost_is_no_defect(
    cluster: tuple[str, list[subprocess.Popen[bytes]]], tmp_path: Path, has_workers: bool
) -> None:
    address, (scheduler, *workers) = cluster
    for worker in workers if not has_workers else ():
        worker.kill()
        worker.wait()
    text = "\n".join(json.dumps({"content": f"w{number} " * 200}) for number in range(8_000))
    (tmp_path / "a.jsonl").write_text(text)
    code = "from lmdist.text import dask_cluster, prepare; dask_cluster.SECONDS_TO_CONNECT = 4; prepare.main()"
    line = [sys.executable, "-c", code, "a.jsonl", "-o", "data", "--tokenizer=wordpunct", f"--scheduler={address}"]
    process = subprocess.Popen(line, cwd=tmp_path, env=installed(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    assert process.stderr
    if not has_workers:
        assert "waiting for a worker of tcp://" in process.stderr.readline()
        time.sleep(1)  # it is asked for them
    while has_workers and not list(tmp_path.glob("data.shards/.*.writing-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.002)
    scheduler.kill()
    _, err = process.communicate(timeout=120)
    assert process.returncode == EXIT_AGAIN, err
    assert "the shards that are done stay" in err


def test_workers_that_do_not_share_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("one two\n\none two three\n\nthree\n")
    monkeypatch.setattr("lmdist.text.machines.dask_cluster", lambda _: nullcontext((None, 1)))
    monkeypatch.setattr("lmdist.text.machines.count_on_cluster", lambda *_: None)  # nothing of what they write arrives here
    settings = PrepareSettings(inputs=[str(tmp_path / "a.txt")], tokenizer="wordpunct")
    with pytest.raises(UsageError, match=r"data\.shards, and here they are not: give an -o in a folder that they share"):
        prepare_on_cluster(settings, tmp_path / "data", "tcp://host:8786", overwrite=False)


def test_nobody_at_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("one two\n\none two three\n\nthree\n")
    for address in ("tcp://127.0.0.1:9", "nowhere"):
        code = "from lmdist.text import dask_cluster, prepare; dask_cluster.SECONDS_TO_CONNECT = 1; prepare.main()"
        line = [sys.executable, "-c", code, "a.txt", "-o", "data", "--tokenizer=wordpunct", f"--scheduler={address}"]
        done = subprocess.run(line, cwd=tmp_path, env=installed(), capture_output=True, text=True, timeout=60)
        assert done.returncode == EXIT_USAGE, done.stderr
        assert f"--scheduler {address}: " in done.stderr.splitlines()[-1]
        assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]

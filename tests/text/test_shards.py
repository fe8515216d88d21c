"""Shards: whoever counts them, and however many there are, the data folder has the same bytes."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet as pq

from lmdist.errors import DataError, Stopped, UsageError
from lmdist.settings import PrepareSettings
from lmdist.text import prepare as command
from lmdist.text.counting import cut_evenly
from lmdist.text.documents import Documents
from lmdist.text.machines import merge_shards, prepare_shard
from lmdist.text.outputs import errors_of_writing
from lmdist.text.prepare import prepare
from lmdist.text.shards import stamp
from lmdist.text.sources import File

ROOT = Path(__file__).parents[2]


def files(folder: Path) -> dict[str, bytes]:
    """The content of a data folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """lmdist-prepare as a user runs it."""
    line = [sys.executable, "-m", "lmdist.text.prepare", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, **options)


# --- the same bytes ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_steps() -> Iterator[None]:
    """Files of some kB are cut in several places, as large ones are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lmdist.text.sources.SAMPLE_BYTES", 512)
        patch.setattr("lmdist.text.decoding.PROGRESS_CHARACTERS", 100)
        patch.setattr("lmdist.text.chunks.CHUNK_CHARACTERS", 500)
        patch.setattr("lmdist.text.shard_files.BLOCK_TOKENS", 50)
        patch.setattr("lmdist.text.counting.BUFFERED_TOKENS", 100)
        yield


def as_file(rows: list[list[str]], kind: str) -> bytes:
    """Rows of a title and a text as a file of a kind has them."""
    if kind == "parquet":
        table = pa.table({"title": [title for title, _ in rows], "content": [content for _, content in rows]})
        pq.write_table(table, file := io.BytesIO(), row_group_size=4)
        return file.getvalue()
    if kind.endswith(".zip"):
        kind, _, order = kind.removesuffix(".zip").partition(".")
        members = {f"{index}.{kind}": as_file(rows[index::3], kind) for index in range(3) if rows[index::3]}
        if order == "tiny":
            members = {f"a.{kind}": as_file(rows, kind), f"b.{kind}": as_file(rows[:1], kind)}
        with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
            for name in sorted(members, reverse=order == "reversed"):
                archive.writestr(name, members[name])
        return file.getvalue()
    return gzip.compress(as_text(rows, "csv")) if kind == "csv.gz" else as_text(rows, kind)


def as_text(rows: list[list[str]], kind: str) -> bytes:
    """The same of a kind of text."""
    table = io.StringIO(newline="")
    csv.writer(table).writerows([["title", "content"], *rows])
    lines = [json.dumps({"title": title, "content": content}) for title, content in rows]
    return {
        "csv": table.getvalue(),
        "txt": "\n\n".join(content for _, content in rows),
        "jsonl": "\n".join(lines),
        "tsv": "title\tcontent\n" + "".join(f'{title}\t"{content}"\n' for title, content in rows),
    }[kind].encode()


WORDS = ["the", "cat", "said", "“so”", "caf\u00e9", "e\u0301", "\n", '"', ",", "1,000", "U.S.", "Mr.", "end.", "x" * 400]
words = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join)
# Of a few texts many rows, so that many are duplicates; a long one every now and then, so that a file has several positions.
row = st.tuples(st.sampled_from(["a", "b", "c", ""]), words, st.sampled_from([0, 1, 1, 1, 900]))
KINDS = ["csv", "csv.gz", "jsonl", "tsv", "txt", "parquet", "txt.zip", "csv.zip", "csv.reversed.zip", "csv.tiny.zip"]
file = st.tuples(st.sampled_from(KINDS), st.lists(row, min_size=1, max_size=30))
ROWS_OF_SEVERAL_MEMBERS = [("a", f"text number {number}", 1 + 899 * (number == 9)) for number in range(30)]


@example([("txt.zip", ROWS_OF_SEVERAL_MEMBERS)], 0, 3, "", "whitespace", False)
@example([("csv.reversed.zip", ROWS_OF_SEVERAL_MEMBERS)], 0, 2, "title", "whitespace", False)
@example([("csv.tiny.zip", ROWS_OF_SEVERAL_MEMBERS)], 3, 2, "", "wordpunct", False)
@given(
    inputs=st.lists(file, min_size=1, max_size=3),
    more=st.integers(0, 3),
    number=st.integers(2, 7),
    group_by=st.sampled_from(["", "title"]),
    tokenizer=st.sampled_from(["wordpunct", "whitespace"]),
    given_splits=st.booleans(),
)
@settings(max_examples=15, deadline=None)
def test_any_number_of_shards_gives_the_same_folder(
    tmp_path_factory, small_steps, inputs, more, number, group_by, tokenizer, given_splits
):
    folder = tmp_path_factory.mktemp("shards")
    names = []
    for index, (kind, rows) in enumerate(inputs):
        names.append(folder / f"{index}.{kind}")
        names[-1].write_bytes(as_file([[title, f"{text} " * times] for title, text, times in rows * (more + 1)], kind))
    if any("txt" in kind for kind, _ in inputs):
        group_by = ""
    values: dict[str, Any] = {"inputs": [*map(str, names)], "group_by": group_by}
    if given_splits:
        values = dict(zip(("train", "valid", "test"), map(str, names), strict=False))
    chosen = PrepareSettings(**values, tokenizer=tokenizer, min_count=1, valid_fraction=0.2, test_fraction=0.1)

    def outcome(write: Callable[[Path], None], output: Path) -> Any:
        try:
            write(output)
        except DataError as error:  # too few documents, or none
            return str(error).replace(output.name, "")
        return files(output)

    def in_shards(output: Path) -> None:
        for index in random.Random(number).sample(range(number), number):
            prepare_shard(chosen, output, index, number)
        merge_shards(chosen, output, overwrite=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lmdist.text.data_folder.FILE_BYTES", 4000)
        whole = outcome(lambda output: prepare(chosen, output), folder / "whole")
        assert outcome(in_shards, folder / "merged") == whole


@given(sizes=st.lists(st.integers(0, 40_000), min_size=1, max_size=5), number=st.integers(1, 6), start=st.integers(0, 9_000))
def test_the_parts_of_several_processes_are_all_of_the_text(tmp_path_factory, sizes, number, start):
    folder = tmp_path_factory.mktemp("parts")
    paths: list[File] = [folder / str(index) for index in range(len(sizes))]
    for path, size in zip(paths, sizes, strict=True):
        with Path(str(path)).open("wb") as file:
            file.truncate(size)
    sources = {"train": Documents(paths[:2]), "valid": Documents(paths[2:])}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lmdist.text.counting.BYTES_OF_START", start)
        parts = [part["train"].part for part in cut_evenly(sources, number)]
    if number > 1:
        assert (parts[0].start, parts[-1].stop) == (0, sum(sizes) + 1)
        assert all(before.stop == after.start for before, after in pairwise(parts))
        lengths = [part.stop - part.start for part in parts]
        assert min(lengths) >= 0
        if sum(sizes) > 10 * number * (start + 1):
            assert max(lengths[1:]) <= lengths[0] + 1, "the first skips nothing"


def articles(path: Path, size: int, seed: int = 1) -> Path:
    """A CSV of some MB, with quoted line breaks, duplicates, quotes that are never closed and bytes that are not UTF-8."""
    chosen = random.Random(seed)
    lines = ["id,title,content\n"]
    length = number = 0
    while length < size:
        number += 1
        text = " ".join(f"w{chosen.randrange(3000)}" for _ in range(chosen.randrange(5, 300)))
        text = {0: lines[-1][20:60].replace('"', ""), 1: f"{text}\n{text}, ''", 2: "caf\udce9 " + text}.get(number % 50, text)
        open_quote = '"' if number % 97 == 0 else ""
        lines.append(f"{number},title {number % 40},{open_quote}{text}\n" if open_quote else f'{number},"a title","{text}"\n')
        length += len(lines[-1])
    path.write_bytes("".join(lines).encode("utf-8", "surrogateescape"))
    return path


def test_worker_processes_give_the_same_folder_and_notes(tmp_path, monkeypatch, capfd):
    paths = [articles(tmp_path / "a.csv", 900_000), articles(tmp_path / "b.csv", 300_000, seed=2)]
    values = {"inputs": [*map(str, paths)], "tokenizer": "wordpunct", "allow_losses": True}
    notes = []
    for workers in (1, 2, 3):
        prepare(PrepareSettings(**values, workers=workers), tmp_path / str(workers))
        notes.append([line for line in capfd.readouterr().err.splitlines() if line.startswith("note: ")])
        monkeypatch.setattr("lmdist.text.inputs.ONE_PROCESS_BYTES", {"wordpunct": 0})
    assert any("were read as Windows-1252" in note for note in notes[0])
    assert any("a quote is opened" in note for note in notes[0])
    assert notes[0] == notes[1] == notes[2]
    assert files(tmp_path / "1") == files(tmp_path / "2") == files(tmp_path / "3")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "3", "a.csv", "b.csv"]


def test_where_sentences_end_is_learned_from_the_same_text_or_not_at_all(tmp_path):
    """The sample is the beginning of the text, which only the first shard reads; or else another vocabulary's is taken."""
    text = [f"Mr. Smith went to St. Mary's on Jan. {number}. He said so. It rained in the U.S. then." for number in range(150)]
    (tmp_path / "a.txt").write_text("\n\n".join(text))
    (tmp_path / "b.txt").write_text("\n\n".join(f"{line} It was the {number}th day." for number, line in enumerate(text)))
    of_text = PrepareSettings(inputs=[str(tmp_path / "a.txt")])
    of_other = PrepareSettings(inputs=[str(tmp_path / "b.txt")], vocabulary=str(tmp_path / "whole-a"), extend=True)
    for name, chosen in (("a", of_text), ("b", of_other)):
        prepare(chosen, tmp_path / f"whole-{name}")
        for index in range(3):
            with pytest.MonkeyPatch.context() as patch:
                if index:  # the first has left what it learned
                    patch.setattr("lmdist.text.tokenizer.train_punkt", None)
                prepare_shard(chosen, tmp_path / name, index, 3)
        merge_shards(chosen, tmp_path / name, overwrite=False)
        assert files(tmp_path / name) == files(tmp_path / f"whole-{name}")
    (learned,) = (tmp_path / "a.shards").glob("text-*.json")
    assert learned.read_bytes() == (tmp_path / "a" / "text.json").read_bytes()
    assert not [*(tmp_path / "b.shards").glob("text-*.json")], "nothing was learned"
    assert json.loads((tmp_path / "b" / "meta.json").read_text())["vocabulary"]["new"] > 0
    with pytest.raises(Stopped, match=r"something else than is given here \(tokenizer\)"):
        merge_shards(PrepareSettings(inputs=of_other.inputs), tmp_path / "b", overwrite=True)


# --- several machines ----------------------------------------------------------------------------------------------


def test_a_shard_that_is_done_is_not_done_again(tmp_path, capsys):
    path = articles(tmp_path / "a.csv", 300_000)
    output = tmp_path / "data"
    arguments = [str(path), "-o", str(output), "--tokenizer", "wordpunct", "--allow-losses"]
    command.main([*arguments, "--shard", "0/2"])
    first = tmp_path / "data.shards" / "00000-of-00002"
    assert f"written to {first}" in capsys.readouterr().out
    inode = first.stat().st_ino
    command.main([*arguments, "--shard", "0/2", "--min-count", "5"])
    assert capsys.readouterr().out == f"{first} is done\n"
    assert first.stat().st_ino == inode
    with pytest.raises(SystemExit) as stopped:
        command.main([*arguments, "--merge"])
    assert stopped.value.code == 75
    assert "1 of 2 shards" in capsys.readouterr().err
    command.main([*arguments, "--shard", "1/2"])

    # The same shards serve several vocabularies.
    for minimum in (2, 5):
        command.main([*arguments, "--merge", "--overwrite", "--min-count", str(minimum)])
        assert f"next: lmdist-train --data.folder {output}" in capsys.readouterr().out
        command.main([*arguments[:2], str(tmp_path / f"whole-{minimum}"), *arguments[3:], "--min-count", str(minimum)])
        assert files(output) == files(tmp_path / f"whole-{minimum}")

    # Of other inputs or settings there are none.
    with pytest.raises(SystemExit) as wrong:
        command.main([*arguments, "--merge", "--overwrite", "--seed", "2"])
    assert wrong.value.code == 75, "others may be counting them at this moment"
    assert "00000-of-00002 was counted with something else than is given here (seed): " in capsys.readouterr().err
    os.utime(path, (1, 1))
    with pytest.raises(SystemExit):
        command.main([*arguments, "--merge", "--overwrite"])
    assert "than is given here (files): " in capsys.readouterr().err
    command.main([*arguments, "--shard", "0/2", "--overwrite"])
    assert first.stat().st_ino != inode
    assert files(output) == files(tmp_path / "whole-5"), "a merge that fails replaces nothing"


def test_shards_of_the_same_files_in_another_order_are_of_something_else(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("\n\n".join(f"{name} {number:02}" for number in range(20)))
    names = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    chosen, turned = (PrepareSettings(inputs=inputs, tokenizer="wordpunct") for inputs in (names, names[::-1]))
    prepare_shard(chosen, tmp_path / "data", 0, 2)
    prepare_shard(turned, tmp_path / "data", 1, 2)
    with pytest.raises(Stopped, match=r"1 of 2 shards .*00001-of-00002 was counted .* \(files\)"):
        merge_shards(chosen, tmp_path / "data", overwrite=False)


def test_an_input_that_is_gone_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("one two")
    documents = Documents([tmp_path / "a.txt"])
    (tmp_path / "a.txt").unlink()
    for look in (documents.check, lambda: stamp(tmp_path / "a.txt")):
        with pytest.raises(DataError, match=r"a\.txt cannot be read: .*No such file"), errors_of_writing(tmp_path / "data"):
            look()


def test_the_same_loss_of_two_files_of_one_name_is_added_up():
    documents = Documents([])
    for line in (3, 5):
        loss = {"name": "https://h/a.csv?...", "why": "a quote", "line": line, "rows": 2, "lines": 4}
        documents.add({"lines": 9, "skipped": {}, "losses": [loss], "notes": [], "rows": {}})
    assert [(loss.line, loss.rows, loss.lines) for loss in documents.losses.values()] == [(3, 4, 8)]


def test_a_shard_that_was_killed_leaves_nothing_that_counts(tmp_path):
    path = articles(tmp_path / "a.csv", 1_000_000)
    arguments = [path.name, "-o", "data", "--tokenizer", "wordpunct", "--allow-losses"]
    line = [sys.executable, "-m", "lmdist.text.prepare", *arguments, "--shard", "1/2"]
    process = subprocess.Popen(line, cwd=tmp_path, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not list(tmp_path.glob("data.shards/.00001-of-00002.writing-*/tokens.bin")):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    of_another_machine = tmp_path / "data.shards" / ".00000-of-00002.writing-another-machine-1"
    of_another_machine.mkdir()
    assert run(*arguments, "--merge", cwd=tmp_path).returncode == 75
    for index in (0, 1):
        assert run(*arguments, "--shard", f"{index}/2", cwd=tmp_path).returncode == 0
    done = run(*arguments, "--merge", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert of_another_machine.is_dir(), "its process may be running"
    of_another_machine.rmdir()
    assert sorted(path.name for path in (tmp_path / "data.shards").iterdir()) == ["00000-of-00002", "00001-of-00002"]
    prepare(PrepareSettings(inputs=[str(path)], tokenizer="wordpunct", allow_losses=True), tmp_path / "whole")
    assert (tmp_path / "data" / "train.bin").read_bytes() == (tmp_path / "whole" / "train.bin").read_bytes()


@pytest.mark.parametrize("damage", ["another NLTK", "another row"])
def test_shards_that_do_not_fit_are_not_merged(tmp_path, damage):
    path = articles(tmp_path / "a.csv", 300_000)
    chosen = PrepareSettings(inputs=[str(path)], tokenizer="wordpunct", allow_losses=True)
    for index in range(2):
        prepare_shard(chosen, tmp_path / "data", index, 2)
    shard = tmp_path / "data.shards" / "00001-of-00002"
    if damage == "another NLTK":
        (shard / "text.json").write_text((shard / "text.json").read_text().replace('"nltk": "', '"nltk": "9.'))
    else:
        read = json.loads((shard / "read.json").read_text())
        read[""]["rows"]["0"][0] += 1
        (shard / "read.json").write_text(json.dumps(read))
    with pytest.raises(DataError, match="tokenized differently" if damage == "another NLTK" else "was not read alike"):
        merge_shards(chosen, tmp_path / "data", overwrite=False)
    assert not (tmp_path / "data").exists()


def test_what_no_shard_can_read(tmp_path):
    path = articles(tmp_path / "a.csv", 1000)
    with pytest.raises(UsageError, match="--rows"):
        prepare_shard(PrepareSettings(inputs=[str(path)], rows=3), tmp_path / "data", 0, 2)
    os.mkfifo(tmp_path / "pipe")
    for name in ("-", str(tmp_path / "pipe")):
        with pytest.raises(UsageError, match=f"{name} cannot be read again"):
            prepare_shard(PrepareSettings(inputs=[name]), tmp_path / "data", 0, 2)
    (tmp_path / "pipe").unlink()
    with pytest.raises(Stopped, match=r"no shard in .*data\.shards yet"):
        merge_shards(PrepareSettings(inputs=[str(path)]), tmp_path / "data", overwrite=False)
    for wrong in ("2/2", "1", "1/0", "-1/2", "a/b"):
        done = run(path, "-o", tmp_path / "data", f"--shard={wrong}")
        assert done.returncode == 64
        assert "I/N is expected" in done.stderr
    for wrong in (["--shard=0/2", "--merge"], ["--shards=2"], ["--scheduler=tcp://127.0.0.1:9", "--shards=0"]):
        assert run(path, "-o", tmp_path / "data", *wrong).returncode == 64
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.csv"]


# --- bad input -----------------------------------------------------------------------------------------------------


def test_bad_input_in_one_shard_names_file_and_line_and_leaves_nothing(tmp_path, monkeypatch, capfd):
    lines = [json.dumps({"content": f"text number {number} " + "word " * 90}) for number in range(4000)]
    lines[3000:3100] = ["no object"] * 100
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lmdist.text.inputs.ONE_PROCESS_BYTES", {"wordpunct": 0})
    arguments = ["a.jsonl", "-o", "data", "--tokenizer", "wordpunct", "--workers", "2"]
    with pytest.raises(SystemExit) as wrong:
        command.main(arguments)
    assert wrong.value.code == 65
    last = capfd.readouterr().err.splitlines()[-1]
    assert "100 of 4,000 lines" in last
    assert "a.jsonl: not an object in JSON: 100 rows on 100 lines, the first at line 3,001" in last
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    for index in range(2):
        command.main([*arguments, f"--shard={index}/2"])
    with pytest.raises(SystemExit):
        command.main([*arguments, "--merge"])
    assert capfd.readouterr().err.splitlines()[-1] == last
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "data.shards"]


def test_a_file_that_ends_too_early_in_one_shard_leaves_no_shard(tmp_path, monkeypatch, capfd):
    chosen = random.Random(1)
    rows = "\n".join(f"{number},{chosen.random()}" for number in range(30_000))
    data = gzip.compress(f"id,content\n{rows}\n".encode())
    (tmp_path / "a.csv.gz").write_bytes(data[:-1000])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lmdist.text.inputs.ONE_PROCESS_BYTES", {"wordpunct": 0})
    arguments = ["a.csv.gz", "-o", "data", "--tokenizer", "wordpunct"]
    for more in (["--workers", "2"], ["--shard", "1/2"]):
        with pytest.raises(SystemExit) as wrong:
            command.main([*arguments, *more])
        assert wrong.value.code == 65
        assert "a.csv.gz cannot be read: " in capfd.readouterr().err.splitlines()[-1]
        assert not list(tmp_path.glob("**/*.bin"))
    command.main([*arguments, "--shard", "0/2"])

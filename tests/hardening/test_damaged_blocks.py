"""Damaged token files: a flipped bit is found where it is read first, and nothing is read before it is needed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corpora import chain, write_data_folder
from lmdist.errors import EXIT_AGAIN, EXIT_DATA, DataError
from lmdist.settings import DataSettings
from lmdist.storage.checksums import BLOCK_BYTES
from lmdist.storage.held import HeldFolder
from lmdist.storage.reading import read_json, write_json
from lmdist.text.data_folder import BLOCK_SUMS, BLOCKS, META
from lmdist.text.token_files import TokenFile, Tokens
from lmdist.training import evaluate
from lmdist.training.data import DataFolder, training_batches
from support.jobs import SMALL, train
from support.small_bundles import make_run

WORDS = 30
TOKENS = 5 * BLOCK_BYTES // 4  # two blocks and a half


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data_folder(tmp_path / "data", {"train": chain(TOKENS, WORDS), "valid": chain(700, WORDS)}, WORDS)


def flip(path: Path, place: int, bit: int = 0) -> None:
    """Change one bit of a file."""
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))


def without_blocks(data: Path) -> Path:
    """Make a data folder as it was before there were checksums of blocks."""
    (data / BLOCKS).unlink()
    write_json(data / META, {name: value for name, value in read_json(data / META).items() if name != "blocks"})
    return data


def checked(folder: DataFolder) -> list[int]:
    """Return which blocks of the training text were checked."""
    [file] = [file for file in folder.in_use if file.name == "train.bin"]
    return list(file.checked)


@pytest.mark.parametrize(("batching", "first"), [("streams", 2), ("windows", 1)])
def test_a_block_is_checked_when_it_is_first_read(data: Path, batching: str, first: int) -> None:
    folder = DataFolder(data)
    settings = DataSettings(batching=batching, global_batch=3 if batching == "streams" else 1, window=7)  # type: ignore[arg-type]
    batches = training_batches(folder, settings, seed=4)
    assert checked(folder) == [0, 0, 0]
    batches.batch(0, slice(0, settings.global_batch))
    assert sum(checked(folder)) == first
    for step in (*range(1, 40), batches.steps_per_epoch - 1):
        batches.batch(step, slice(0, settings.global_batch))
    assert checked(folder) == [1, 1, 1]


def test_a_flipped_bit_is_found_in_its_block(data: Path) -> None:
    flip(data / "train.bin", BLOCK_BYTES + 7000)
    tokens, per_block = DataFolder(data).tokens("train"), BLOCK_BYTES // 2
    assert len(tokens[:per_block]) == per_block
    assert len(tokens[2 * per_block :]) == TOKENS - 2 * per_block
    message = f"train.bin is damaged in its block 2 of 3, bytes {BLOCK_BYTES} to {2 * BLOCK_BYTES}: its checksum"
    for place in (slice(per_block, per_block + 1), slice(0, per_block + 1), slice(0, TOKENS)):
        with pytest.raises(DataError, match=message):
            tokens[place]


def test_every_flipped_bit_is_found(data: Path) -> None:
    random = np.random.default_rng(5)
    for place, bit in zip(random.integers(0, 2 * TOKENS, 20).tolist(), random.integers(0, 8, 20).tolist(), strict=True):
        flip(data / "train.bin", place, bit)
        with pytest.raises(DataError, match="is damaged in its block"):
            DataFolder(data).tokens("train")[:]
        flip(data / "train.bin", place, bit)
    assert len(DataFolder(data).tokens("train")[:]) == TOKENS


@pytest.mark.parametrize("sums", [True, False])
def test_an_id_outside_the_vocabulary_is_found_when_it_is_read(data: Path, sums: bool) -> None:
    """In a folder with sums that a stranger has computed, too; and in one of before there were any."""
    tokens = np.fromfile(data / "train.bin", "<u2")
    tokens[-1] = WORDS
    path = write_data_folder(data.with_name("other"), {"train": tokens}, WORDS)
    found = DataFolder(path if sums else without_blocks(path)).tokens("train")
    assert len(found[: TOKENS // 2])
    with pytest.raises(DataError, match=f"block 3 of 3, .*: it has a token {WORDS}, and the vocabulary ends at {WORDS - 1}"):
        found[TOKENS - 5 :]


def test_a_token_file_that_is_truncated_is_an_error_with_a_name(data: Path) -> None:
    """Where it was mapped into memory, the signal SIGBUS ended the job."""
    folder = DataFolder(data)
    tokens = folder.tokens("train")
    assert len(tokens[:100]) == 100
    os.truncate(data / "train.bin", 150)
    for place in (slice(90, 110), slice(TOKENS - 10, TOKENS)):
        with pytest.raises(DataError, match=r"train\.bin was truncated while it was read"):
            tokens[place]
    with pytest.raises(DataError, match=r"train\.bin was overwritten"):
        folder.check_unchanged()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing: the folder is damaged"),
        ({}, "is damaged: it has"),
        ({BLOCK_SUMS: {}}, "has no sums of train.bin"),
        ({BLOCK_SUMS: {"train.bin": "00", "valid.bin": ""}}, "is damaged"),
        ({BLOCK_SUMS: {"train.bin": "x" * 24, "valid.bin": ""}}, "is damaged"),
        ({BLOCK_SUMS: {"train.bin": 7}}, "a string is expected"),
        ({BLOCK_SUMS: {"train.bin": "0" * 16, "valid.bin": "0" * 8}}, "it has 2 sums of the 3 blocks of train.bin"),
    ],
)
def test_sums_that_are_damaged_are_refused(data: Path, content: dict[str, object] | None, message: str) -> None:
    path = data / BLOCKS
    if content is None:
        path.unlink()
    else:
        write_json(path, content)
        meta = read_json(data / META)
        if content:  # as a stranger does
            meta["blocks"] = {"bytes": path.stat().st_size, "sha256": HeldFolder(data).sha256(BLOCKS)}
        write_json(data / META, meta)
    with pytest.raises(DataError, match=message):
        DataFolder(data).tokens("train")


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    places=st.lists(st.tuples(st.integers(-5, 130), st.integers(-5, 130)), max_size=10),
)
def test_several_files_are_read_as_one(
    lengths: list[int], places: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path, whole = tmp_path_factory.mktemp("parts"), np.arange(sum(lengths), dtype="<u4")
    start, files = 0, []
    for number, length in enumerate(lengths):
        whole[start : start + length].tofile(path / f"{number}.bin")
        files.append(TokenFile(HeldFolder(path), f"{number}.bin", "uint32", length, 200, None))
        start += length
    tokens = Tokens(files)
    assert len(tokens) == len(whole)
    for first, last in places:
        np.testing.assert_array_equal(tokens[first:last], whole[first:last])


def test_an_evaluation_finds_a_damaged_block(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path)
    meta = read_json(tmp_path / "data" / META)
    assert "blocks" not in meta, "a folder of before there were any"
    evaluate.main([str(run), "--split", "valid"])
    capsys.readouterr()
    words = meta["vocabulary_size"]
    tokens = np.fromfile(tmp_path / "data" / "valid.bin", "<u2")
    tokens[-3] = words
    tokens.tofile(tmp_path / "data" / "valid.bin")
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(run), "--split", "valid"])
    assert stop.value.code == 65
    assert f"valid.bin is damaged in its block 1 of 1, bytes 0 to 1200: it has a token {words}" in capsys.readouterr().err


def test_the_rank_that_alone_reads_a_damaged_block_names_it(data: Path, tmp_path: Path) -> None:
    """Under plain torchrun, where rank 0 speaks for the others: it only sees that a rank is lost."""
    flip(data / "train.bin", TOKENS + 7)  # in the middle of the text, where the stream of rank 1 begins
    flags = (*SMALL, "--data.folder=data", "--run_folder=run", "--training.steps=2", "--data.global_batch=2")
    done = train(2, *flags, cwd=tmp_path, codes=(EXIT_AGAIN, EXIT_DATA))
    assert "train.bin is damaged in its block 2 of 3" in done.stderr

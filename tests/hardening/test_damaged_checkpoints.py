"""Damaged checkpoints: a manifest that has changed is seen, a name that disagrees too, and progress is not lost in silence."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from lmdist.errors import DataError
from lmdist.storage.checksums import OWN_CHECKSUM
from lmdist.storage.reading import read_json, write_json
from lmdist.tracking.run_folder import read_metrics
from lmdist.training.checkpoints.format import FIRST_KEYS, MODEL
from lmdist.training.checkpoints.read import open_checkpoint, read_manifest
from lmdist.training.checkpoints.retain import find_checkpoint, newest_checkpoint
from lmdist_export.bundle import WEIGHTS, Bundle
from support.jobs import SMALL, small_data, train
from support.small_bundles import edit_json, make_bundle, make_run


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_run(tmp_path) / "checkpoints" / "step-000000007"


def test_every_flipped_bit_of_a_manifest_is_seen_or_changes_nothing(checkpoint: Path) -> None:
    path, random = checkpoint / "manifest.json", np.random.default_rng(3)
    content, expected = path.read_bytes(), read_manifest(checkpoint)
    seen = 0
    for _ in range(400):
        changed = bytearray(content)
        changed[random.integers(len(content))] ^= 1 << int(random.integers(8))
        path.write_bytes(changed)
        try:
            assert read_manifest(checkpoint) == expected, "another whitespace, at the most"
        except DataError:
            seen += 1
    assert seen > 300


def test_another_number_in_the_progress_is_seen(checkpoint: Path) -> None:
    manifest = read_json(checkpoint / "manifest.json")
    for name in manifest["progress"]:
        changed = json.loads(json.dumps(manifest))
        changed["progress"][name] = 8
        write_json(checkpoint / "manifest.json", changed)
        with pytest.raises(DataError, match="its sha256 is not the one recorded"):
            read_manifest(checkpoint)


def test_a_manifest_without_a_checksum_of_its_own_is_one_of_the_first(checkpoint: Path) -> None:
    manifest = read_json(checkpoint / "manifest.json")
    digest = manifest.pop(OWN_CHECKSUM)
    assert manifest.keys() == FIRST_KEYS
    write_json(checkpoint / "manifest.json", manifest)
    assert read_manifest(checkpoint)["progress"]["step"] == 7
    write_json(checkpoint / "manifest.json", {**manifest, "sha2v6": digest})
    with pytest.raises(DataError, match="is damaged"):
        read_manifest(checkpoint)


def test_a_checkpoint_is_of_the_step_that_it_is_named_after(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("step-000000020", "step-999999999"):
        shutil.copytree(checkpoint, checkpoint.with_name(name))
        with pytest.raises(DataError, match="is of step 7, and not of the step that the folder is named after"):
            open_checkpoint(checkpoint.with_name(name))
    assert newest_checkpoint(checkpoint.parent) == checkpoint
    assert find_checkpoint(checkpoint.parents[1]) == checkpoint
    other = Path(shutil.copytree(checkpoint, tmp_path / "my best one"))
    assert open_checkpoint(other).manifest["progress"]["step"] == 7


def test_where_no_checkpoint_can_be_read_the_job_ends(tmp_path: Path) -> None:
    small_data(tmp_path / "data")
    flags = [*SMALL, "--data.folder=data", "--run_folder=run", "--resume=auto", "--training.steps=2"]
    train(1, *flags, cwd=tmp_path)
    checkpoints = tmp_path / "run" / "checkpoints"
    [folder] = checkpoints.glob("step-*")
    os.truncate(folder / MODEL, 100)
    for code in (65, 65):  # and again, for nothing has been written
        message = train(1, *flags, cwd=tmp_path, code=code).stderr
        assert "skipping a damaged checkpoint" in message
        assert "has no checkpoint that can be read, and the run had made progress" in message.splitlines()[-1]
        assert "to start anew, remove the folder or name another run" in message.splitlines()[-1]
    shutil.rmtree(folder)
    with pytest.raises(DataError, match="has no checkpoint that can be read"):
        newest_checkpoint(checkpoints)
    shutil.rmtree(checkpoints)
    assert newest_checkpoint(checkpoints) is None


def test_lines_of_metrics_that_are_no_rows_are_passed_over(tmp_path: Path) -> None:
    rows = ['{"step": 1, "time": 1.0, "train/loss": NaN}', '{"step": 2, "tim": 1.0}', "5", "[]", '{"step": "3", "time": 1.0}']
    rows += ['{"step": 4, "time": 1.0, "train/loss": "x"}', "[" * 100_000, '{"step": 5, "time": 2.0}', '{"st']
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 5]


def test_sizes_come_before_sums(checkpoint: Path, tmp_path: Path) -> None:
    """Weights of 40 GB, a hole in the disk, are refused by what their size says: their sha256 would take minutes."""
    huge = 40 << 30
    os.truncate(checkpoint / MODEL, huge)
    with pytest.raises(DataError, match=r"it has 42,949,672,960 bytes, and [\d,]+ were written"):
        open_checkpoint(checkpoint).model()
    with (checkpoint / MODEL).open("r+b") as file:
        file.write(bytes(8))
    files = read_json(checkpoint / "manifest.json")["files"]
    edit_json(checkpoint / "manifest.json", files={**files, MODEL: {**files[MODEL], "bytes": huge}})
    with pytest.raises(DataError, match="is not a file of safetensors"):
        open_checkpoint(checkpoint).model()

    bundle = make_bundle(tmp_path / "other")
    os.truncate(bundle / WEIGHTS, huge)
    files = read_json(bundle / "manifest.json")["files"]
    edit_json(bundle / "manifest.json", files={**files, WEIGHTS: {**files[WEIGHTS], "bytes": huge}})
    with pytest.raises(DataError, match=r"names sizes that no model with [\d,]+ bytes of weights\.bin has"):
        Bundle.load(bundle)


def test_every_flipped_bit_of_a_bundles_manifest_is_seen_or_changes_nothing(tmp_path: Path) -> None:
    """Its neural cache is nowhere else, and sizes of other clusters may have as many bytes of weights."""
    bundle = make_bundle(tmp_path)
    path, random = bundle / "manifest.json", np.random.default_rng(4)
    content, expected = path.read_bytes(), Bundle.load(bundle).manifest
    for _ in range(100):
        changed = bytearray(content)
        changed[random.integers(len(content))] ^= 1 << int(random.integers(8))
        path.write_bytes(changed)
        with contextlib.suppress(DataError):
            assert Bundle.load(bundle).manifest == expected
    first = {name: value for name, value in expected.items() if name != OWN_CHECKSUM}
    write_json(path, first)
    assert Bundle.load(bundle).manifest == first, "one of the first"
    write_json(path, first | {"step": 8, OWN_CHECKSUM: expected[OWN_CHECKSUM]})
    with pytest.raises(DataError, match="its sha256 is not the one recorded"):
        Bundle.load(bundle)

"""A split of several token files is prepared, trained on, compared and reported as one of a single file is."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from lmdist.config import as_dict
from lmdist.errors import DataError
from lmdist.settings import DataSettings, PrepareSettings, Recipe
from lmdist.storage.reading import read_json, write_json
from lmdist.text.data_folder import META, token_files
from lmdist.text.machines import merge_shards, prepare_shard
from lmdist.text.prepare import prepare
from lmdist.tracking.metadata import datasets_of
from lmdist.training.data import DataFolder, training_batches
from lmdist.training.run import differences_from

FILE_BYTES = 4_000


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same text as a data folder with a token file a split, and, from two shards, as one with several."""
    path = tmp_path_factory.mktemp("several")
    chosen = random.Random(1)
    texts = (" ".join(f"word{chosen.randrange(300)}" for _ in range(50)) for _ in range(160))
    (path / "a.txt").write_text("\n\n".join(texts))
    settings = PrepareSettings(inputs=[str(path / "a.txt")], tokenizer="wordpunct", valid_fraction=0.3)
    prepare(settings, path / "one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lmdist.text.data_folder.FILE_BYTES", FILE_BYTES)
        for index in (1, 0):
            prepare_shard(settings, path / "several", index, 2)
        merge_shards(settings, path / "several", overwrite=False)
    return path / "one", path / "several"


def names_of(folder: Path, split: str) -> list[str]:
    return token_files(split, read_json(folder / META)["files"])


def test_the_files_are_the_bytes_of_one(folders: tuple[Path, Path]) -> None:
    one, several = folders
    assert names_of(several, "train") == ["train.bin", "train-1.bin", "train-2.bin"]
    assert names_of(several, "valid") == ["valid.bin", "valid-1.bin"]
    for split in ("train", "valid", "test"):
        parts = [(several / name).read_bytes() for name in names_of(several, split)]
        assert b"".join(parts) == (one / f"{split}.bin").read_bytes()
        assert all(len(part) == FILE_BYTES for part in parts[:-1])


@pytest.mark.parametrize("batching", ["streams", "windows"])
def test_the_batches_are_those_of_one(folders: tuple[Path, Path], batching: str) -> None:
    settings = DataSettings(batching=batching, global_batch=4, window=9)  # type: ignore[arg-type]
    of_one, of_several = (training_batches(DataFolder(folder), settings, seed=3) for folder in folders)
    assert of_one.steps_per_epoch == of_several.steps_per_epoch
    for step in (*range(of_one.steps_per_epoch), 10**6):
        first, second = (batches.batch(step, slice(0, 4)) for batches in (of_one, of_several))
        assert first.inputs.equal(second.inputs)
        assert first.targets.equal(second.targets)


def test_a_run_goes_on_with_all_of_its_files_only(folders: tuple[Path, Path], tmp_path: Path) -> None:
    several = DataFolder(folders[1])
    manifest = {"recipe": as_dict(Recipe()), "files": several.meta["files"], "data": several.meta}
    assert differences_from(manifest, Recipe(), several, is_main=True) == []
    [difference] = differences_from(manifest, Recipe(), DataFolder(folders[0]), is_main=True)
    assert "has another train.bin and train-1.bin and train-2.bin than" in difference
    digests = [{row["context"]: row["digest"] for row in datasets_of(folder)} for folder in folders]
    assert digests[0]["test"] == digests[1]["test"]
    assert digests[1]["train"] not in (digests[0]["train"], several.meta["files"]["train.bin"]["sha256"][:36])
    other = shutil.copytree(folders[1], tmp_path / "other")
    meta = read_json(other / META)
    meta["files"]["train-2.bin"]["sha256"] = "0" * 64
    write_json(other / META, meta)
    [difference] = differences_from(manifest, Recipe(), DataFolder(other), is_main=True)
    assert "has another train-2.bin than" in difference
    assert {row["context"]: row["digest"] for row in datasets_of(other)}["train"] != digests[1]["train"]


@pytest.mark.parametrize("damage", ["gone", "short", "fewer tokens", "a name less"])
def test_a_file_that_is_damaged_or_gone_is_named(folders: tuple[Path, Path], tmp_path: Path, damage: str) -> None:
    path = shutil.copytree(folders[1], tmp_path / "data")
    meta = read_json(path / META)
    match damage:
        case "gone":
            (path / "train-1.bin").unlink()
        case "short":
            (path / "train-1.bin").write_bytes(bytes(FILE_BYTES - 2))
        case "fewer tokens":
            meta["splits"]["train"]["tokens"] = FILE_BYTES // 2
        case "a name less":
            del meta["files"]["train-1.bin"]
    write_json(path / META, meta)
    name = "train-2" if damage == "fewer tokens" else "train" if damage == "a name less" else "train-1"
    with pytest.raises((DataError, OSError), match=rf"data/{name}\.bin"):
        DataFolder(path).tokens("train")

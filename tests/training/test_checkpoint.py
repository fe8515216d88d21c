from __future__ import annotations

import shutil

import pytest
import torch

from corpora import chain, write_data_folder
from lmdist.errors import DataError
from lmdist.settings import ModelSettings
from lmdist.storage.atomic import atomic_folder
from lmdist.training import checkpoint
from lmdist.training.checkpoint import Progress
from support.jobs import after_one_step


@pytest.fixture
def saved(tmp_path):
    """A folder of three checkpoints of one model."""
    data = write_data_folder(tmp_path / "data", {"train": chain(100, 20)}, 20)
    model, optimizer, streams, recipe = after_one_step(ModelSettings(embedding_size=6, hidden_size=8), 20, rows=3)
    for step, nats in ((10, 2.0), (20, 1.5), (30, 1.9)):
        taken = checkpoint.snapshot(Progress(step, valid_nats=nats), model, optimizer, streams)
        checkpoint.save(tmp_path / "run" / "checkpoints", taken, recipe, data)
    return tmp_path / "run", model, optimizer, streams


def test_what_was_saved_is_what_is_loaded(saved):
    run, model, optimizer, streams = saved
    loaded, manifest = checkpoint.load_model(run / "checkpoints" / "step-000000030")
    for name, value in model.named_parameters():
        assert torch.equal(dict(loaded.named_parameters())[name], value)
    assert loaded.projection.weight is loaded.embedding.weight
    assert manifest["model"]["hidden_size"] == 8
    fresh = torch.optim.AdamW(loaded.parameters())
    progress, state = checkpoint.load_training(run / "checkpoints" / "step-000000030", fresh)
    assert progress == Progress(30, valid_nats=1.9)
    assert state is not None
    assert torch.equal(state[0], streams[0])
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            assert torch.equal(fresh.state_dict()["state"][index][name], value)


def test_nothing_in_it_is_pickled(saved):
    run, *_ = saved
    for file in (run / "checkpoints" / "step-000000030").iterdir():
        assert file.suffix in (".safetensors", ".json", ".txt")


def test_a_damaged_newest_one_is_passed_over_with_a_warning(saved, capsys):
    run, *_ = saved
    weights = run / "checkpoints" / "step-000000030" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    newest = checkpoint.newest(run / "checkpoints")
    assert newest is not None
    assert newest.name == "step-000000020"
    assert "model.safetensors is damaged" in capsys.readouterr().err


def test_the_best_one_is_found_and_kept(saved):
    run, *_ = saved
    assert checkpoint.find(run).name == "step-000000020"
    checkpoint.prune(run / "checkpoints", keep=1)
    assert {path.name for path in (run / "checkpoints").glob("step-*")} == {"step-000000020", "step-000000030"}


def test_a_write_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "old").touch()
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "kept") as folder:
        shutil.copyfile(tmp_path / "nothing", folder / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["old"]


def test_names_that_lead_out_of_the_folder_are_refused(saved):
    run, *_ = saved
    folder = run / "checkpoints" / "step-000000030"
    shutil.copyfile(folder / "vocab.txt", folder.parent / "vocab.txt")
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"vocab.txt":', '"../vocab.txt":'))
    with pytest.raises(DataError, match="outside itself"):
        checkpoint.read_manifest(folder)

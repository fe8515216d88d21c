"""Checkpoints: what is saved is loaded bit for bit, damaged ones are skipped, and the best one is kept."""

from __future__ import annotations

import shutil
from typing import get_args, get_type_hints

import pytest
import torch
from safetensors.torch import save_file

from corpora import chain, write_data_folder
from lmdist import config
from lmdist.errors import DataError
from lmdist.model.language_model import LanguageModel
from lmdist.settings import DataSettings, ModelSettings, OptimizerSettings, Recipe
from lmdist.storage.atomic import atomic_folder
from lmdist.storage.held import HeldFolder
from lmdist.storage.reading import read_json
from lmdist.training.checkpoints.format import Progress
from lmdist.training.checkpoints.read import open_checkpoint, read_tensors
from lmdist.training.checkpoints.retain import find_checkpoint, newest_checkpoint, remove_old
from lmdist.training.checkpoints.write import take_snapshot, write_checkpoint
from lmdist.training.data import DataFolder
from lmdist.training.optimizer import OPTIMIZERS, build_optimizer, optimizer_state
from support.jobs import after_one_step
from support.mutations import with_correct_checksums
from support.small_bundles import edit_json

OPTIMIZER_NAMES = get_args(get_type_hints(OptimizerSettings)["name"])


@pytest.fixture
def saved(tmp_path):
    """A folder of three checkpoints of one model."""
    data = write_data_folder(tmp_path / "data", {"train": chain(100, 20)}, 20)
    model, optimizer, streams, recipe = after_one_step(ModelSettings(embedding_size=6, hidden_size=8), 20, rows=3)
    for step, nats in ((10, 2.0), (20, 1.5), (30, 1.9)):
        taken = take_snapshot(Progress(step, valid_nats=nats), model, optimizer, streams)
        write_checkpoint(tmp_path / "run" / "checkpoints", taken, recipe, DataFolder(data))
    return tmp_path / "run", model, optimizer, streams


def test_what_was_saved_is_what_is_loaded(saved):
    run, model, optimizer, streams = saved
    opened = open_checkpoint(run / "checkpoints" / "step-000000030")
    loaded, manifest = opened.model(), opened.manifest
    for name, value in model.named_parameters():
        assert torch.equal(dict(loaded.named_parameters())[name], value)
    assert loaded.projection.weight is loaded.embedding.weight
    assert manifest["model"]["hidden_size"] == 8
    fresh = torch.optim.AdamW(loaded.parameters())
    progress, state = open_checkpoint(run / "checkpoints" / "step-000000030").load_training(fresh)
    assert progress == Progress(30, valid_nats=1.9)
    assert state is not None
    assert torch.equal(state[0], streams[0])
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            assert torch.equal(fresh.state_dict()["state"][index][name], value)


@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_what_each_optimizer_keeps_is_saved_and_loaded_strictly(name, tmp_path):
    """Every choice of the setting: its tensors come back bit for bit; another shape, a missing or a foreign one is refused."""
    data = write_data_folder(tmp_path / "data", {"train": chain(100, 20)}, 20)
    recipe = Recipe(model=ModelSettings(embedding_size=6, hidden_size=8), data=DataSettings(global_batch=3))
    recipe.optimizer = OptimizerSettings(name, momentum=0.9)
    model = LanguageModel(recipe.model, 20)
    optimizer = build_optimizer(recipe.optimizer, model)
    hidden, state = model(torch.arange(12).view(3, 4), model.initial_state(3))
    model.projection(hidden).square().sum().backward()
    optimizer.step()
    snapshot = take_snapshot(Progress(1), model, optimizer, tuple(part.detach() for part in state))
    folder = write_checkpoint(tmp_path / "checkpoints", snapshot, config.as_dict(recipe), DataFolder(data))

    loaded = build_optimizer(recipe.optimizer, LanguageModel(recipe.model, 20))
    open_checkpoint(folder).load_training(loaded)
    assert optimizer_state(loaded).keys() == optimizer_state(optimizer).keys()
    for key, value in optimizer_state(optimizer).items():
        assert torch.equal(optimizer_state(loaded)[key], value), key

    tensors = read_tensors(HeldFolder(folder), "training.safetensors")
    kept = [key for key in tensors if key.startswith("optimizer.0.")]
    assert kept, "the optimizer saves nothing"
    for damaged in (
        *({**tensors, key: tensors[key][None]} for key in kept),
        *({key: value for key, value in tensors.items() if key != left_out} for left_out in kept if len(kept) > 1),
        {**tensors, "optimizer.0.foreign": torch.zeros(())},
        {**tensors, "optimizer.99.exp_avg": torch.zeros(6)},
    ):
        save_file(damaged, folder / "training.safetensors")
        with_correct_checksums(folder, "manifest.json")
        with pytest.raises(DataError, match=r"the shape of 'optimizer\."):
            open_checkpoint(folder).load_training(build_optimizer(recipe.optimizer, model))


def test_the_table_of_optimizers_has_every_choice_of_the_setting():
    assert tuple(OPTIMIZERS) == OPTIMIZER_NAMES


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
    newest = newest_checkpoint(run / "checkpoints")
    assert newest is not None
    assert newest.name == "step-000000020"
    assert "model.safetensors is damaged" in capsys.readouterr().err


def test_the_best_one_is_found_and_kept(saved):
    run, *_ = saved
    assert find_checkpoint(run).name == "step-000000020"
    remove_old(run / "checkpoints", keep=1)
    assert {path.name for path in (run / "checkpoints").glob("step-*")} == {"step-000000020", "step-000000030"}


def test_a_write_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "old").touch()
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "kept", replace=True) as folder:
        shutil.copyfile(tmp_path / "nothing", folder / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["old"]


def test_names_that_lead_out_of_the_folder_are_rejected(saved):
    run, *_ = saved
    folder = run / "checkpoints" / "step-000000030"
    shutil.copyfile(folder / "vocab.txt", folder.parent / "vocab.txt")
    files = read_json(folder / "manifest.json")["files"]
    edit_json(folder / "manifest.json", files={"../vocab.txt" if name == "vocab.txt" else name: files[name] for name in files})
    with pytest.raises(DataError, match="outside itself"):
        open_checkpoint(folder)

"""Streams and windows: each token is predicted once, on any number of ranks, in an order that a seed decides."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from corpora import chain, write_data_folder
from lmdist.errors import DataError, MissingInputError
from lmdist.model.loss import IGNORED
from lmdist.settings import DataSettings
from lmdist.text.vocabulary import END_ID
from lmdist.training.data import DataFolder, Streams, Windows, permute, training_batches

# A token of this file is its own position: what a batch predicts shows where it was cut.
POSITIONS = np.arange(60_000, dtype=np.uint16)


def epoch(batches: Streams | Windows, global_batch: int, world: int = 1, number: int = 0):
    """Return all tokens that `world` ranks predict in an epoch, and the sum of the batches' own counts."""
    predicted, counted = [], 0
    batch_size = global_batch // world
    for step in range(number * batches.steps_per_epoch, (number + 1) * batches.steps_per_epoch):
        parts = [batches.batch(step, slice(rank * batch_size, (rank + 1) * batch_size)) for rank in range(world)]
        counted += parts[0].num_tokens
        assert len({part.num_tokens for part in parts}) == 1
        for part in parts:
            mask = part.targets != IGNORED
            predicted.append(part.targets[mask])
            before = torch.where(part.targets == 0, END_ID, part.targets - 1)
            assert torch.equal(part.inputs[mask], before[mask])
    return torch.cat(predicted), counted


@given(
    length=st.integers(1, 400),
    batch_size=st.integers(1, 3),
    world=st.sampled_from([1, 2, 4]),
    window=st.integers(1, 50),
    spread=st.integers(0, 49),
    seed=st.integers(0, 9),
)
def test_streams_predict_each_token_once_on_any_number_of_ranks(length, batch_size, world, window, spread, seed):
    spread = min(spread, window - 1)
    batches = Streams(POSITIONS[:length], batch_size * world, window, spread, seed)
    predicted, counted = epoch(batches, batch_size * world, world, number=seed)
    assert sorted(predicted.tolist()) == list(range(length))
    assert counted == length
    lengths = [batches.batch(step, slice(0, 1)).inputs.shape[1] for step in range(batches.steps_per_epoch)]
    assert {*lengths[:-1]} <= {window - spread, window, window + spread}
    assert 0 < lengths[-1] <= window + spread


def test_windows_that_vary_cut_the_text_in_other_places_in_each_epoch_and_scale_the_rate():
    def windows(number, seed=1):
        batches = Streams(POSITIONS[:10_000], 4, 20, 8, seed)
        steps = range(number * batches.steps_per_epoch, (number + 1) * batches.steps_per_epoch)
        return [batches.batch(step, slice(0, 4)) for step in steps]

    def lengths(*arguments, **more):
        return [batch.inputs.shape[1] for batch in windows(*arguments, **more)]

    assert lengths(0) == lengths(0)
    assert len({tuple(order) for order in (lengths(0), lengths(1), lengths(0, seed=2))}) == 3
    first, second = (np.bincount(lengths(number)[:-1], minlength=29)[[12, 20, 28]] for number in (0, 1))
    assert np.array_equal(first, second)
    for before, batch in pairwise(windows(1)):
        assert torch.equal(batch.inputs[:, 0], before.targets[:, -1])
        assert batch.rate_share == batch.inputs.shape[1] / 20
    all_the_same = Streams(POSITIONS[:1010], 2, 20)
    assert {all_the_same.batch(step, slice(2)).rate_share for step in range(all_the_same.steps_per_epoch)} == {1.0}


@given(length=st.integers(2, 400), world=st.sampled_from([1, 2, 4]), window=st.integers(2, 30), seed=st.integers(0, 9))
def test_windows_predict_each_token_but_the_first_once(length, world, window, seed):
    window = min(window, length)
    batches = Windows(POSITIONS[:length], 4, window, 0, seed)
    predicted, counted = epoch(batches, 4, world, number=seed)
    assert sorted(predicted.tolist()) == list(range(1, length))
    assert counted == length - 1


@given(length=st.integers(20, 200), stride=st.integers(1, 19))
def test_windows_start_every_stride_tokens_and_the_last_may_be_short(length, stride):
    batches = Windows(POSITIONS[:length], 5, 20, stride, seed=1)
    starts = []
    for step in range(batches.steps_per_epoch):
        batch = batches.batch(step, slice(0, 5))
        starts += [int(row[0]) for row, targets in zip(batch.inputs, batch.targets, strict=True) if targets[0] != IGNORED]
    assert sorted(starts) == [stride * number for number in range(batches.count)]
    assert stride * (batches.count - 1) + 20 >= length


def test_epochs_are_shuffled_each_in_its_own_way_and_the_same_way_again():
    def order(seed, number):
        return epoch(Windows(POSITIONS[:500], 5, 20, 1, seed), 5, number=number)[0].tolist()

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


def test_streams_continue_after_a_stop():
    batches = Streams(POSITIONS[:1000], 4, 30)
    first, second = batches.batch(0, slice(0, 4)), batches.batch(1, slice(0, 4))
    assert first.state_reset
    assert not second.state_reset
    assert torch.equal(second.inputs[:, 0], first.targets[:, -1])
    assert batches.batch(batches.steps_per_epoch, slice(0, 4)).state_reset


@given(size=st.integers(1, 3000), seed=st.integers(0, 1000), number=st.integers(0, 5))
def test_permutation_reaches_each_number_once(size, seed, number):
    assert sorted(permute(np.arange(size), size, (seed, number)).tolist()) == list(range(size))


def test_permutation_mixes_well():
    order = permute(np.arange(10_000), 10_000, (1, 0))
    assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.05
    assert np.mean(np.abs(np.diff(order)) < 100) < 0.05


def test_text_too_short_for_the_window_is_rejected(tmp_path):
    folder = DataFolder(write_data_folder(tmp_path / "data", {"train": chain(100, 20)}, 20))
    with pytest.raises(DataError, match=r"100 tokens .* 20 sequences of 35 need 700"):
        training_batches(folder, DataSettings(), seed=1)
    with pytest.raises(DataError, match="101"):
        training_batches(folder, DataSettings(batching="windows", window=101), seed=1)
    assert training_batches(folder, DataSettings(batching="windows", window=100), seed=1).steps_per_epoch == 1


def test_missing_and_damaged_folders_are_named(tmp_path):
    with pytest.raises(MissingInputError, match="lmdist-prepare"):
        DataFolder(tmp_path / "nothing")
    path = write_data_folder(tmp_path / "data", {"train": chain(100, 20)}, 20)
    with pytest.raises(MissingInputError, match="no valid split; it has train"):
        DataFolder(path).tokens("valid")
    (path / "train.bin").write_bytes(b"\0\0")
    with pytest.raises(DataError, match=r"train\.bin has 2 bytes"):
        DataFolder(path).tokens("train")


@pytest.mark.parametrize("batching", ["streams", "streams that vary", "windows"])
def test_the_order_of_the_data_is_the_same_file_on_1_2_and_4_ranks(tmp_path, batching):
    """One file per number of ranks, with every position read and predicted in three epochs, compared byte for byte."""
    write_data_folder(tmp_path / "data", {"train": POSITIONS[:1003]}, 1003)
    own = {"windows": {"batching": "windows", "stride": 5}, "streams that vary": {"window_spread": 4}}
    settings = DataSettings(folder="data", global_batch=8, window=7, **own.get(batching, {}))
    files = []
    for world in (1, 2, 4):
        batches = training_batches(DataFolder(tmp_path / "data"), settings, seed=3)
        batch_size = settings.global_batch // world
        path = tmp_path / f"order-{world}"
        with path.open("wb") as file:
            for step in range(3 * batches.steps_per_epoch):
                parts = [batches.batch(step, slice(rank * batch_size, (rank + 1) * batch_size)) for rank in range(world)]
                for tensors in ([part.inputs for part in parts], [part.targets for part in parts]):
                    file.write(torch.cat(tensors).numpy().tobytes())
                file.write(f"{parts[0].num_tokens} {parts[0].state_reset}\n".encode())
        files.append(path.read_bytes())
    assert len(files[0]) > 3 * 1003 * 8
    assert files[0] == files[1] == files[2]

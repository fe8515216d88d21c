"""Schedules: their values at known points, the same as torch's where torch has them, and the optimizer follows them."""

from __future__ import annotations

import itertools
import math
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.nn import functional
from torch.optim.lr_scheduler import OneCycleLR

from lmdist import config
from lmdist.errors import UsageError
from lmdist.model.language_model import LanguageModel
from lmdist.settings import OptimizerSettings, ScheduleSettings
from lmdist.training.data import DataFolder, training_batches
from lmdist.training.optimizer import build_optimizer, set_momentum, weight_decay_of
from lmdist.training.schedule import SCHEDULES, Position, learning_rate, momentum
from support.jobs import SMALL, losses, small_data, train_here

NAMES = get_args(get_type_hints(ScheduleSettings)["name"])
OPTIMIZER_NAMES = get_args(get_type_hints(OptimizerSettings)["name"])


def factors(total_steps: int, *steps: int, **settings) -> list[float]:
    """Return the factors of the highest rate at some steps."""
    return [learning_rate(1.0, ScheduleSettings(**settings), Position(step, total_steps)) for step in steps]


def test_the_table_of_schedules_has_every_choice_of_the_setting():
    assert tuple(SCHEDULES) == NAMES


def test_known_points():
    assert factors(1000, 0, 9, 10, 500, 999, name="constant", warmup_steps=10) == [0.1, 1, 1, 1, 1]
    assert factors(1000, 0, 500, 999, name="cosine") == pytest.approx([1, 0.55, 0.1], rel=1e-4)
    stable = {"name": "warmup-stable-decay", "warmup_steps": 100, "decay_fraction": 0.2}
    assert factors(1000, 0, 99, 500, 800, 900, 999, **stable) == pytest.approx([0.01, 1, 1, 1, 0.5, 0.005])
    assert factors(1000, 49, 99, 399, 899, name="inverse-sqrt", warmup_steps=100) == pytest.approx([0.5, 1, 1 / 2, 1 / 3])
    assert factors(1000, 0, 299, 999, name="one-cycle") == pytest.approx([1 / 25, 1, 1 / 25e4])
    assert factors(1, 0, name="one-cycle") == [1]
    divided = Position(7, 10, divisions=2)
    assert learning_rate(1.0, ScheduleSettings("plateau", divide_by=3), divided) == pytest.approx(1 / 9)


@given(
    total_steps=st.integers(2, 100),
    fraction=st.floats(0.01, 0.99),
    low=st.floats(0, 0.9, allow_subnormal=False),  # the loop of other tests sets them to 0 in all of the process
    rise=st.floats(0, 0.09, allow_subnormal=False),
)
def test_one_cycle_is_torch_s(total_steps, fraction, low, rise):
    assume(fraction * total_steps != 1)  # theirs divides by zero
    settings = ScheduleSettings("one-cycle", warmup_fraction=fraction, momentum_low=low, momentum_high=low + rise)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.5)
    theirs = OneCycleLR(optimizer, 3.0, total_steps, pct_start=fraction, base_momentum=low, max_momentum=low + rise)
    for step in range(total_steps):
        group = optimizer.param_groups[0]
        assert learning_rate(3.0, settings, Position(step, total_steps)) == pytest.approx(group["lr"])
        assert momentum(settings, Position(step, total_steps)) == pytest.approx(group["momentum"])
        optimizer.step()
        if step + 1 < total_steps:
            theirs.step()


@given(
    name=st.sampled_from(NAMES),
    total_steps=st.integers(1, 900),
    warmup=st.integers(1, 200),
    fraction=st.floats(0.01, 0.99),
)
def test_rates_are_positive_continuous_and_at_most_the_highest(name, total_steps, warmup, fraction):
    """From one step to the next a rate changes by a part of its range that is in inverse proportion to the steps it has."""
    warmup = 0 if name == "one-cycle" else min(warmup, total_steps)
    settings = ScheduleSettings(name, warmup, warmup_fraction=fraction, decay_fraction=fraction)
    rates = [learning_rate(2.0, settings, Position(step, total_steps)) for step in range(total_steps)]
    assert all(0 < rate <= 2 for rate in rates)
    if warmup:
        assert rates[warmup - 1] == 2
    # one-cycle rises in one step fewer, and half a cosine is pi / 2 times as steep as a line.
    shortest = min(warmup or total_steps, total_steps - warmup, min(fraction, 1 - fraction) * total_steps - 1)
    steepest = 2 * math.pi / 2 / max(1, shortest)
    assert all(abs(after - before) <= steepest + 1e-9 for before, after in itertools.pairwise(rates))


@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_momentum_is_that_of_the_step(name):
    """A momentum that is set before each step leads where an optimizer with this momentum leads."""

    def end(built_with: float, then: float) -> torch.Tensor:
        layer = torch.nn.Linear(2, 1, bias=False)
        torch.nn.init.ones_(layer.weight)
        optimizer = build_optimizer(OptimizerSettings(name, 0.1, momentum=built_with, weight_decay=0), layer)
        for step in range(4):
            set_momentum(optimizer, then)
            layer.weight.grad = torch.tensor([[1.0, -2.0]]) * (-1) ** step
            optimizer.step()
        return layer.weight.detach()

    assert torch.equal(end(0.5, 0.8), end(0.8, 0.8))
    assert not torch.allclose(end(0.8, 0.8), end(0.8, 0.6))


def test_a_run_with_one_cycle_is_the_plain_loop_with_torch_s_schedule(tmp_path):
    data = small_data(tmp_path / "data")
    flags = [f"--data.folder={data}", f"--run_folder={tmp_path / 'run'}", "--training.steps=6", "--model.dropout=0"]
    flags += ["--optimizer.name=sgd", "--optimizer.clip=0", "--optimizer.learning_rate=0.5", "--schedule.name=one-cycle"]
    train_here(*flags)

    asked, folder = config.load([*SMALL, *flags]), DataFolder(data)
    torch.manual_seed(asked.seed)
    model = LanguageModel(asked.model, folder.vocabulary_size)
    stochastic = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9, weight_decay=weight_decay_of(asked.optimizer))
    schedule = OneCycleLR(stochastic, 0.5, 6, pct_start=0.3)
    batches, state, expected = training_batches(folder, asked.data, asked.seed), model.initial_state(8), []
    for step in range(6):
        batch = batches.batch(step, slice(0, 8))
        hidden, state = model(batch.inputs, tuple(part.detach() for part in state))
        loss = functional.cross_entropy(model.projection(hidden).flatten(0, 1), batch.targets.flatten())
        stochastic.zero_grad()
        loss.backward()
        stochastic.step()
        if step < 5:
            schedule.step()
        expected.append(loss.item())
    np.testing.assert_allclose(losses(tmp_path / "run"), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "one-cycle", "warmup_steps": 3}, "warmup_fraction"),
        ({"name": "inverse-sqrt"}, "give schedule.warmup_steps"),
        ({"momentum_low": 0.9, "momentum_high": 0.8}, "momentum_low is 0.9"),
        ({"name": "no-such-schedule"}, "one of constant, cosine"),
    ],
)
def test_mistakes(settings, message):
    with pytest.raises(UsageError, match=message):
        ScheduleSettings(**settings)

"""The schedules: the learning rate of each step, and with one-cycle the momentum, as pure functions of the step.

A schedule is a row of `SCHEDULES`: the factor of `optimizer.learning_rate` after the warmup, which all of them share, and what
else it does. To add one, add its name to `ScheduleSettings.name` and a row. A resumed run needs nothing but its step; a
schedule that divides the rate also needs how often it has, which a checkpoint holds. This module knows neither optimizers nor
the loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from lmdist.settings import ScheduleSettings

FIRST, LAST = 1 / 25, 1 / 25e4
"""one-cycle's factors of the first and the last step, those of torch's OneCycleLR."""


class Position(NamedTuple):
    """Where in a run a step is."""

    step: int
    """Number of the step, from 0."""
    total_steps: int
    """Steps of the run."""
    divisions: int = 0
    """How often a schedule that divides the rate has done so."""


class Schedule(NamedTuple):
    """A schedule of the setting `schedule.name`."""

    factor: Callable[[ScheduleSettings, Position], float]
    """What the highest rate is multiplied by."""
    momentum: Callable[[ScheduleSettings, Position], float] | None = None
    """None leaves it to the optimizer."""
    divides: bool = False
    """Whether the rate is divided after each validation that is no better than the best, so that it needs validations."""


def cosine(settings: ScheduleSettings, position: Position) -> float:
    """Return a factor that falls from 1 to a tenth by half a cosine (Loshchilov and Hutter 2017, arXiv:1608.03983)."""
    done = (position.step - settings.warmup_steps) / max(1, position.total_steps - settings.warmup_steps)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def one_cycle(settings: ScheduleSettings, position: Position) -> float:
    """Return a factor that rises to 1 and falls to almost 0, both by half a cosine (Smith 2018, arXiv:1803.09820)."""
    rising, height = cycle(settings, position)
    lowest = FIRST if rising else LAST
    return lowest + (1 - lowest) * height


def one_cycle_momentum(settings: ScheduleSettings, position: Position) -> float:
    """Return the momentum, highest where the rate is lowest."""
    return settings.momentum_high - (settings.momentum_high - settings.momentum_low) * cycle(settings, position)[1]


def warmup_stable_decay(settings: ScheduleSettings, position: Position) -> float:
    """Return 1 until the last part of the run, in which the factor falls to 0 by a line (Hu et al. 2024, arXiv:2404.06395)."""
    steps = position.total_steps
    decay_steps = max(1, min(round(settings.decay_fraction * steps), steps - settings.warmup_steps))
    return min(1.0, (steps - position.step) / decay_steps)


def inverse_sqrt(settings: ScheduleSettings, position: Position) -> float:
    """Return a factor that falls with the square root of the step (Vaswani et al. 2017, arXiv:1706.03762)."""
    return math.sqrt(settings.warmup_steps / (position.step + 1))


SCHEDULES: dict[str, Schedule] = {
    "constant": Schedule(lambda settings, position: 1.0),
    "cosine": Schedule(cosine),
    "plateau": Schedule(lambda settings, position: settings.divide_by**-position.divisions, divides=True),
    "one-cycle": Schedule(one_cycle, one_cycle_momentum),
    "warmup-stable-decay": Schedule(warmup_stable_decay),
    "inverse-sqrt": Schedule(inverse_sqrt),
}


def learning_rate(peak: float, settings: ScheduleSettings, position: Position) -> float:
    """Return the learning rate of a step, whose highest value is `peak`."""
    assert position.step < position.total_steps, position  # beyond the end rates rise again, or are negative
    if position.step < settings.warmup_steps:
        return peak * (position.step + 1) / settings.warmup_steps
    return peak * SCHEDULES[settings.name].factor(settings, position)


def momentum(settings: ScheduleSettings, position: Position) -> float | None:
    """Return the momentum of a step; None where the schedule leaves it to the optimizer."""
    momentum_of = SCHEDULES[settings.name].momentum
    return momentum_of(settings, position) if momentum_of else None


def cycle(settings: ScheduleSettings, position: Position) -> tuple[bool, float]:
    """Return whether one-cycle still rises, and its height between 0 (the first and the last step) and 1 (the peak)."""
    peak, last = settings.warmup_fraction * position.total_steps - 1, position.total_steps - 1
    if last == 0:
        return False, 1.0  # a run of one step shall learn something
    rising = position.step < peak
    done = position.step / peak if rising else 1 - (position.step - peak) / (last - peak)
    return rising, (1 - math.cos(math.pi * done)) / 2

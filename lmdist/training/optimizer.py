"""The optimizer, and the learning rate of each step.

The rate is a pure function of the step and of how often validation has stalled, so nothing but that count has to be saved.
This module knows neither data nor ranks.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from lmdist.settings import OptimizerSettings, ScheduleSettings


def build(settings: OptimizerSettings, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of `model`'s parameters."""
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.name == "sgd":
        return torch.optim.SGD(model.parameters(), rate, momentum=settings.momentum, weight_decay=decay, fused=True)
    kind = torch.optim.Adam if settings.name == "adam" else torch.optim.AdamW
    return kind(model.parameters(), rate, weight_decay=decay, fused=True)


def learning_rate(peak: float, schedule: ScheduleSettings, step: int, total_steps: int, divisions: int) -> float:
    """The learning rate of step number `step`, counted from 0, after the plateau schedule has divided `divisions` times."""
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.name == "constant":
        return peak
    if schedule.name == "plateau":
        return peak * schedule.divide_by**-divisions
    done = (step - schedule.warmup_steps) / max(1, total_steps - schedule.warmup_steps)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))

"""Averages of the parameters over the steps, which are validated, sampled and exported in place of the last step's.

ema is an exponential moving average from the first step on. Its decay grows with the number of steps, so that the random
parameters of the start are forgotten. nt-asgd (non-monotonically triggered averaged SGD, Merity et al. 2018,
arXiv:1708.02182) is the mean of all steps since validation stopped improving; before that there is no average. The rule of
both is torch.optim.swa_utils'. To add one, add its name to `AveragingSettings.name` and a row to `AVERAGES`.

Every rank averages the same parameters, so nothing is sent. When the average began is in the progress; with the average
itself, which a checkpoint holds beside the parameters, that is all that a resumed run needs. This module does not know
what is trained, or when to validate.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from lmdist.model.language_model import LanguageModel
from lmdist.settings import AveragingSettings
from lmdist.training.checkpoints.format import Progress


class Average(NamedTuple):
    """An average of the setting `averaging.name`."""

    update: Callable[[AveragingSettings, int], Callable[..., None]]
    """torch's function that moves an average, in place, towards the parameters, given the number of steps already in it."""
    is_due: Callable[[AveragingSettings, Sequence[float]], bool]
    """Whether the average begins, given the nats of the validations so far."""
    needs_validations: bool = False


AVERAGES: dict[str, Average] = {
    "ema": Average(
        lambda settings, count: get_ema_multi_avg_fn(min(settings.decay, (1 + count) / (10 + count))),
        is_due=lambda settings, validations: True,
    ),
    "nt-asgd": Average(
        lambda settings, count: get_swa_multi_avg_fn(),
        is_due=lambda settings, validations: is_nonmonotone(validations, settings.nonmonotone_interval),
        needs_validations=True,
    ),
}


class Averaging:
    """The average of a model's parameters, once it has begun."""

    def __init__(self, settings: AveragingSettings, model: LanguageModel, progress: Progress) -> None:
        """Average by `settings`; without an average, `model` itself takes its place."""
        self.settings = settings
        self.source = model
        self.progress = progress
        self.averaged: LanguageModel | None = None

    @property
    def model(self) -> LanguageModel:
        """Return the model to validate, to sample and to export: with the average, or before it begins with the parameters."""
        return self.averaged or self.source

    def start_if_due(self) -> None:
        """Let the average begin with the next step, if it has not and is due."""
        progress, settings = self.progress, self.settings
        if settings.name == "none" or self.averaged:
            return
        if AVERAGES[settings.name].is_due(settings, progress.validations):
            progress.averaged_from = progress.step
            self.start()

    def start(self) -> LanguageModel:
        """Take a copy of the model for the average, and return it; the next update, or a checkpoint, fills it."""
        averaged = copy.deepcopy(self.source).requires_grad_(False)
        self.averaged = averaged.to(averaged.embedding.weight.device)  # a GPU's LSTM weights are one block of memory again
        return self.averaged

    @torch.no_grad()
    def update(self) -> None:
        """Add the parameters to the average, before the step that they are the result of is counted."""
        if self.averaged:
            assert self.progress.averaged_from is not None
            average: list[Tensor] = list(self.averaged.parameters())
            count = self.progress.step - self.progress.averaged_from
            AVERAGES[self.settings.name].update(self.settings, count)(average, list(self.source.parameters()), count)


def is_nonmonotone(validations: Sequence[float], interval: int) -> bool:
    """Return whether the newest of `validations` is worse than the best of all but the last `interval` before it."""
    before = validations[:-1][:-interval]
    return bool(before) and validations[-1] > min(before)

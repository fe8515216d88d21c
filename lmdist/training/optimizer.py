"""The optimizers: how each is built and what it keeps for a parameter.

To add an optimizer, add its name to `OptimizerSettings.name` and a row to `OPTIMIZERS`. Learning rates are schedule.py's; a
group of parameters may have a share of them. This module knows neither data nor ranks nor files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer

from lmdist.model.language_model import LanguageModel
from lmdist.settings import OptimizerSettings

Groups = list[dict[str, Any]]
"""Groups of parameters, in the order of the model's, each with its SHARE."""
SHARE = "share"
"""The key of a group's learning rate relative to that of the step."""


class Row(NamedTuple):
    """An optimizer of the setting `optimizer.name`."""

    build: Callable[[Groups, OptimizerSettings], Optimizer]
    tensors: tuple[str, ...]
    """Names of the tensors it keeps for each parameter, of the parameter's shape."""
    scalars: tuple[str, ...]
    """Names of the single numbers it keeps for each parameter."""
    weight_decay: float = 0.0
    """Unless one is given. Apart from the gradient (Loshchilov and Hutter 2019, arXiv:1711.05101) it can be large."""


OPTIMIZERS: dict[str, Row] = {
    "sgd": Row(
        lambda groups, settings: SGD(
            groups,
            settings.learning_rate,
            momentum=settings.momentum,
            weight_decay=weight_decay_of(settings),
            fused=True,
        ),
        tensors=("momentum_buffer",),  # none at all without momentum
        scalars=(),
    ),
    "adam": Row(
        lambda groups, settings: Adam(groups, settings.learning_rate, weight_decay=weight_decay_of(settings), fused=True),
        tensors=("exp_avg", "exp_avg_sq"),
        scalars=("step",),
    ),
    "adamw": Row(
        lambda groups, settings: AdamW(groups, settings.learning_rate, weight_decay=weight_decay_of(settings), fused=True),
        tensors=("exp_avg", "exp_avg_sq"),
        scalars=("step",),
        weight_decay=0.1,
    ),
    "nadam": Row(
        lambda groups, settings: NAdam(
            groups, settings.learning_rate, weight_decay=weight_decay_of(settings), decoupled_weight_decay=True
        ),
        tensors=("exp_avg", "exp_avg_sq"),
        scalars=("step", "mu_product"),
        weight_decay=0.1,
    ),
}


def weight_decay_of(settings: OptimizerSettings) -> float:
    """Return the weight decay that is given, or that of the optimizer."""
    return OPTIMIZERS[settings.name].weight_decay if settings.weight_decay is None else settings.weight_decay


def build_optimizer(settings: OptimizerSettings, model: nn.Module) -> Optimizer:
    """Return the optimizer of `model`'s parameters."""
    return OPTIMIZERS[settings.name].build(groups_of(model, settings.layer_decay), settings)


def groups_of(model: nn.Module, layer_decay: float) -> Groups:
    """Return all parameters as one group, or, with a `layer_decay` other than 1, as groups whose shares differ.

    The share is 1 of the projection, tied or not, and falls from layer to layer towards the input.
    """
    if layer_decay == 1:
        return [{"params": list(model.parameters()), SHARE: 1.0}]
    assert isinstance(model, LanguageModel), type(model)
    shares: dict[nn.Parameter, float] = {}
    for depth, part in enumerate(reversed(model.parts.values())):
        for parameter in part.parameters():
            shares.setdefault(parameter, layer_decay**depth)
    # In the order of the parameters, by which their state is saved, whatever the shares are.
    return [{"params": list(group), SHARE: share} for share, group in groupby(model.parameters(), shares.__getitem__)]


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """Set the learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group[SHARE]


def optimizer_state(optimizer: Optimizer) -> dict[str, Tensor]:
    """Return what `optimizer` keeps, named `INDEX.NAME` with the index of the parameter; nothing before the first step."""
    found = {}
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            assert value is None or isinstance(value, Tensor), (type(optimizer), name, value)  # else it would not be saved
            if value is not None:
                found[f"{index}.{name}"] = value
    return found


def optimizer_state_shapes(name: str, optimizer: Optimizer) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor that the optimizer called `name` may keep, by the names of `optimizer_state`."""
    row = OPTIMIZERS[name]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shapes: dict[str, tuple[int, ...]] = {}
    for index, parameter in enumerate(parameters):
        shapes |= {f"{index}.{key}": tuple(parameter.shape) for key in row.tensors}
        shapes |= {f"{index}.{key}": () for key in row.scalars}
    return shapes


def load_optimizer_state(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restore what `optimizer_state` returned; the settings of the groups stay as they are."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def fill_momentum(optimizer: Optimizer) -> None:
    """Let the momentum of SGD begin with zeros, which changes no step.

    torch's fused SGD begins with memory that its first step is to fill, and keeps it as it is where a loss scaler skips that.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("momentum") else ():
            if parameter.grad is not None and optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def set_momentum(optimizer: Optimizer, momentum: float | None) -> None:
    """Set the momentum of the next steps: that of SGD, or beta1, which is Adam's; None leaves it as it is."""
    for group in optimizer.param_groups if momentum is not None else ():
        if "betas" in group:
            group["betas"] = (momentum, *group["betas"][1:])
        else:
            group["momentum"] = momentum

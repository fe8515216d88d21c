"""The optimizers: how each is built and what it keeps for a parameter.

To add an optimizer, add its name to `OptimizerSettings.name` and a row to `OPTIMIZERS`. Learning rates are schedule.py's. This
module knows neither data nor ranks nor files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer

from lmdist.settings import OptimizerSettings


class Row(NamedTuple):
    """An optimizer of the setting `optimizer.name`."""

    build: Callable[[nn.Module, OptimizerSettings], Optimizer]
    tensors: tuple[str, ...]
    """Names of the tensors it keeps for each parameter, of the parameter's shape."""
    scalars: tuple[str, ...]
    """Names of the single numbers it keeps for each parameter."""


OPTIMIZERS: dict[str, Row] = {
    "sgd": Row(
        lambda model, settings: SGD(
            model.parameters(),
            settings.learning_rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            fused=True,
        ),
        tensors=("momentum_buffer",),  # none at all without momentum
        scalars=(),
    ),
    "adam": Row(
        lambda model, settings: Adam(
            model.parameters(), settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        ),
        tensors=("exp_avg", "exp_avg_sq"),
        scalars=("step",),
    ),
    "adamw": Row(
        lambda model, settings: AdamW(
            model.parameters(), settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        ),
        tensors=("exp_avg", "exp_avg_sq"),
        scalars=("step",),
    ),
    "nadam": Row(
        lambda model, settings: NAdam(
            model.parameters(), settings.learning_rate, weight_decay=settings.weight_decay, decoupled_weight_decay=True
        ),
        tensors=("exp_avg", "exp_avg_sq"),
        scalars=("step", "mu_product"),
    ),
}


def build_optimizer(settings: OptimizerSettings, model: nn.Module) -> Optimizer:
    """Return the optimizer of `model`'s parameters."""
    return OPTIMIZERS[settings.name].build(model, settings)


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
    _, tensors, scalars = OPTIMIZERS[name]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shapes: dict[str, tuple[int, ...]] = {}
    for index, parameter in enumerate(parameters):
        shapes |= {f"{index}.{key}": tuple(parameter.shape) for key in tensors}
        shapes |= {f"{index}.{key}": () for key in scalars}
    return shapes


def load_optimizer_state(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restore what `optimizer_state` returned; the settings of the groups stay as they are."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def set_momentum(optimizer: Optimizer, momentum: float | None) -> None:
    """Set the momentum of the next steps: that of SGD, or beta1, which is Adam's; None leaves it as it is."""
    for group in optimizer.param_groups if momentum is not None else ():
        if "betas" in group:
            group["betas"] = (momentum, *group["betas"][1:])
        else:
            group["momentum"] = momentum

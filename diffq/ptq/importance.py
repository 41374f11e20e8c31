"""How much an error in each weight costs: second moments of an optimizer, or measured losses.

For small errors e, the loss grows by Σ h e² / 2, with the diagonal h of its Hessian. The
second moments that Adam keeps stand for h (Choi, El-Khamy and Lee, arXiv:1612.01543).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffq.errors import ConfigError, listed
from diffq.ptq.sensitivity import Sensitivity, TensorSensitivity
from diffq.ptq.state import STATISTICS, Place, StateGrid, StatePlan, place_of

#: What can tell how much errors cost: an optimizer or its state dict, losses that
#: `diffq.sensitivity` measured, or a mapping of names to tensors.
Source = torch.optim.Optimizer | Sensitivity | Mapping[str, Any]

# Where optimizers keep a running mean of squared gradients.
_MOMENTS = ("exp_avg_sq", "square_avg")
# Added to all, in units of the mean: the batches may not have reached every weight.
_LEAST = 0.01


def importance_of(source: Source, plan: StatePlan) -> dict[str, Tensor]:
    """What the squared errors of each tensor to quantize are multiplied by, 1 on average.

    Args:
        source: where that is known from.
        plan: the tensors.

    Returns:
        Name of each tensor to quantize to float32, of its shape or 0-dim.

    Raises:
        ConfigError: the source is of another kind, lacks a tensor, or holds what cannot be.
    """
    found = _by_name(source, plan)
    chosen: dict[str, Tensor] = {}
    missing = []
    for grid in plan.grids:
        values = next((found[name] for name in plan.names[grid.name] if name in found), None)
        if values is None:
            missing.append(grid.name)
        else:
            chosen[grid.name] = _checked(grid, values)
    if missing:
        raise ConfigError(
            "sensitivity must be known for each tensor to quantize, got none for "
            f"{listed(missing)}. Exclude them, or pass a dict of tensors that has them too."
        )
    return _normalized(chosen, plan.grids)


def _by_name(source: Any, plan: StatePlan) -> Mapping[str, Any]:
    if isinstance(source, torch.optim.Optimizer):
        return _of_optimizer(source, plan)
    if isinstance(source, Sensitivity):
        return {
            name: _slope(tensor, source.loss)
            for tensor in source.tensors.values()
            for name in tensor.names
        }
    if isinstance(source, Mapping):
        return _of_saved(source, plan) if "param_groups" in source else source
    raise ConfigError(
        "sensitivity must be an optimizer, its state dict, a result of diffq.sensitivity, or a "
        f"dict of names to tensors, got {type(source).__name__}."
    )


def _slope(tensor: TensorSensitivity, loss: float) -> float:
    """Change of the loss by squared error, over all bitwidths."""
    changes = {bits: abs(value - loss) for bits, value in tensor.losses.items()}
    finite = [bits for bits, change in changes.items() if math.isfinite(change)]
    error = sum(tensor.errors[bits] for bits in finite)
    if not finite:
        raise ConfigError(
            f"sensitivity needs a finite loss for each tensor, got none for {tensor.names[0]}. "
            "Measure higher bitwidths too, or exclude the tensor."
        )
    # Only a constant tensor is quantized without an error, and it has no bitwidths to choose.
    return sum(changes[bits] for bits in finite) / error if error else 0.0


def _of_optimizer(optimizer: torch.optim.Optimizer, plan: StatePlan) -> dict[str, Tensor]:
    """Second moments of the parameters that the state dict shows, by name."""
    names: dict[Place, str] = {place_of(tensor): name for name, tensor in plan.tensors.items()}
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shown = {names[place_of(p)]: p for p in trained if place_of(p) in names}
    if not shown:
        raise ConfigError(
            "The optimizer must train the tensors of the state dict themselves, got copies of "
            "them or others. Pass model.state_dict() of the model that it trains, or "
            "optimizer.state_dict()."
        )
    states = {name: optimizer.state.get(parameter, {}) for name, parameter in shown.items()}
    return _moments(states, type(optimizer).__name__)


def _of_saved(saved: Mapping[str, Any], plan: StatePlan) -> dict[str, Tensor]:
    """Second moments in an optimizer's state dict, by the names that it has or by order."""
    groups, states = saved["param_groups"], saved.get("state", {})
    numbers = [number for group in groups for number in group["params"]]
    if all("param_names" in group for group in groups):
        names = [name for group in groups for name in group["param_names"]]
    else:
        names = _in_order([states.get(number, {}) for number in numbers], len(groups), plan)
    by_name = {name: states.get(number, {}) for name, number in zip(names, numbers, strict=True)}
    return _moments(by_name, "a saved one")


def _in_order(states: Sequence[Mapping[str, Any]], groups: int, plan: StatePlan) -> list[str]:
    """The names of an optimizer's parameters, if it has them in the order of the state dict."""
    trainable = {
        name: tensor
        for name, tensor in plan.tensors.items()
        if tensor.is_floating_point() and name.rpartition(".")[2] not in STATISTICS
    }
    same = groups == 1 and len(trainable) == len(states)
    for state, tensor in zip(states, trainable.values(), strict=False):
        moments = next((state[key] for key in _MOMENTS if key in state), tensor)
        same = same and moments.shape == tensor.shape
    if not same:
        raise ConfigError(
            "A saved optimizer without param_names must hold all parameters of the state dict in "
            f"its order, in one group, got {len(states)} in {groups} for {len(trainable)}. Pass "
            "the optimizer itself, or one made of model.named_parameters()."
        )
    return list(trainable)


def _moments(states: Mapping[str, Mapping[str, Any]], kind: str) -> dict[str, Tensor]:
    found = {name: state[key] for name, state in states.items() for key in _MOMENTS if key in state}
    if not found:
        raise ConfigError(
            f"sensitivity needs the second moments that Adam and its kin keep ({_MOMENTS[0]}), got "
            f"an optimizer without: {kind}. Pass one that has taken steps, or a result of "
            "diffq.sensitivity."
        )
    return found


def _checked(grid: StateGrid, values: Any) -> Tensor:
    shape = grid.grid.weight.shape
    tensor = torch.as_tensor(values).detach().to("cpu", torch.float32)
    if tensor.numel() == 1:
        tensor = tensor.reshape(())
    elif tensor.shape != shape:
        raise ConfigError(
            f"sensitivity must be one number or have the shape of its tensor, {list(shape)} for "
            f"{grid.name}, got {list(tensor.shape)}. Pass that of the same model."
        )
    # NaN is not at least 0.
    if not (tensor >= 0).all() or not torch.isfinite(tensor).all():
        raise ConfigError(
            f"sensitivity must hold finite numbers from 0, but that of {grid.name} does not. "
            "Find the step that diverged, or exclude the tensor."
        )
    return tensor


def _normalized(chosen: dict[str, Tensor], grids: Sequence[StateGrid]) -> dict[str, Tensor]:
    counts = {grid.name: grid.grid.weight.numel() for grid in grids}
    total = sum(float(chosen[name].double().mean()) * count for name, count in counts.items())
    mean = total / max(1, sum(counts.values()))
    if grids and not mean:
        raise ConfigError(
            "sensitivity must be above 0 somewhere, got 0 everywhere. "
            "Pass an optimizer that has seen gradients, or leave sensitivity out."
        )
    return {
        name: ((values.double() / mean + _LEAST) / (1 + _LEAST)).float()
        for name, values in chosen.items()
    }

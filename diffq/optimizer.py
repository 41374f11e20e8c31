"""What a quantizer learns, as a parameter group of the user's optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from diffq.errors import OptimizerError


def add_extras(
    optimizer: Optimizer,
    model: nn.Module,
    extras: Sequence[nn.Parameter],
    options: Mapping[str, Any],
) -> None:
    """Gives learned extras a parameter group of their own, without weight decay.

    Extras that the optimizer holds already are moved there.

    Args:
        optimizer: holds the model's parameters.
        model: the quantized model.
        extras: what its quantizer learns; may be empty.
        options: options of the group, such as `lr`.

    Raises:
        OptimizerError: this is no optimizer, or it holds no parameter of the model.
    """
    if not isinstance(optimizer, Optimizer):
        raise OptimizerError(
            f"setup_optimizer needs a torch.optim.Optimizer, got {type(optimizer).__name__}."
        )
    ids = {id(extra) for extra in extras}
    ours = {id(parameter) for parameter in model.parameters()} - ids
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not ours & held:
        raise OptimizerError(
            "setup_optimizer needs the optimizer that trains this quantizer's model, "
            "but got one that holds none of its parameters. "
            "Make it with model.parameters(), after fully_shard if the model is sharded, "
            "then call setup_optimizer."
        )
    if any("initial_lr" in group for group in optimizer.param_groups) and ids - held:
        raise OptimizerError(
            "The optimizer has a learning rate scheduler, which would not know the new parameter "
            "group. Call setup_optimizer first, then make the scheduler."
        )
    if extras:
        _remove(optimizer, ids)
        decay = {"weight_decay": 0.0} if "weight_decay" in optimizer.defaults else {}
        optimizer.add_param_group({"params": list(extras), **decay, **options})


def _remove(optimizer: Optimizer, ids: set[int]) -> None:
    """Takes parameters out of an optimizer's groups, and groups out that held no others."""
    groups = []
    for group in optimizer.param_groups:
        kept = [p for p in group["params"] if id(p) not in ids]
        if kept or not group["params"]:
            groups.append(group)
        group["params"] = kept
    optimizer.param_groups[:] = groups

"""Pruned weights stay zero: the masks of `torch.nn.utils.prune` as parametrizations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from diffq.errors import AttachError
from diffq.torch_inside.modules import pruned_names


class Pruned(nn.Module):
    """Parametrization that holds the weights outside of a mask at zero.

    Pruned weights get no gradient. A weight quantizer after it keeps the zeros exact.

    Args:
        mask: True where a weight is kept, in the weight's shape.
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask.bool())

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with zeros outside of the mask."""
        return torch.where(self.mask, weight, 0)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What is stored when the weight is assigned."""
        return weight


def parametrize_pruning(model: nn.Module) -> nn.Module:
    """Turns the masks of `torch.nn.utils.prune` into parametrizations, in place.

    torch keeps a pruned weight as `weight_orig` and `weight_mask`. After this call it is
    `weight` again, the same parameter, with the zeros held by a parametrization. Call it
    after pruning and before a quantizer is attached; files and states then hold `weight`
    with its zeros, and load into a plain model:

        prune.l1_unstructured(model.fc, "weight", amount=0.5)
        diffq.parametrize_pruning(model)
        quantizer = diffq.QATQuantizer(model, bits=4)

    `torch.nn.utils.parametrize.remove_parametrizations(model.fc, "weight")` makes the
    zeros part of the parameter.

    Args:
        model: a model, of which any tensors are pruned.

    Returns:
        The same model.

    Raises:
        AttachError: a pruned tensor has a parametrization already.
    """
    pruned = [(module, name) for module in model.modules() for name in pruned_names(module)]
    for module, name in pruned:
        if parametrize.is_parametrized(module, f"{name}_orig"):
            raise AttachError(
                f"The pruned tensor {name!r} of {type(module).__name__} has a parametrization. "
                "Remove it first, or detach() the quantizer."
            )
    for module, name in pruned:
        mask = getattr(module, f"{name}_mask")
        prune.remove(module, name)  # type: ignore[no-untyped-call]
        parametrize.register_parametrization(module, name, Pruned(mask))
    return model


def is_pruned(owner: nn.Module, name: str) -> bool:
    """Whether a tensor has zeros that are held by `Pruned`, after all else that shapes it."""
    chains: Any = getattr(owner, "parametrizations", {})
    return name in chains and isinstance(list(chains[name])[-1], Pruned)

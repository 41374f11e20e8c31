"""Kinds of modules and of tensors in them that torch has no public name for."""

from __future__ import annotations

from collections.abc import Set
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn import parameter
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import prune

#: The class of every convolution of torch, transposed ones included.
CONVOLUTIONS: TypeAlias = _ConvNd


def is_attention_projection(module: nn.Module) -> bool:
    """Whether a layer projects the output of an attention, which reads its weight uncalled."""
    return isinstance(module, NonDynamicallyQuantizableLinear)


def is_lazy(tensor: Any) -> bool:
    """Whether a tensor gets its shape from the first input of its module, and has none yet."""
    return parameter.is_lazy(tensor)


def non_persistent_buffers(module: nn.Module) -> Set[str]:
    """The names of a module's own buffers that its state dict leaves out."""
    return module._non_persistent_buffers_set


def pruned_names(module: nn.Module) -> list[str]:
    """The tensors of a module that `torch.nn.utils.prune` prunes."""
    hooks = module._forward_pre_hooks.values()
    return [hook._tensor_name for hook in hooks if isinstance(hook, prune.BasePruningMethod)]


def parameter_in(module: nn.Module, name: str) -> nn.Parameter | None:
    """The Parameter that a module itself holds by a name; None if there is none."""
    return module._parameters.get(name)


def children_in(module: Any) -> dict[str, nn.Module | None]:
    """The modules that a module itself holds, as it holds them."""
    children: dict[str, nn.Module | None] = module._modules
    return children


def parameters_in(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The Parameters that a module itself holds, as it holds them."""
    return module._parameters


def buffers_in(module: nn.Module) -> dict[str, Tensor | None]:
    """The buffers that a module itself holds, as it holds them."""
    return module._buffers

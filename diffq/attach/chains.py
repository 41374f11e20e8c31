"""Chains of parametrizations: what `torch.nn.utils.parametrize` leaves on a module, and off it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from diffq.attach.plan import TensorPlan
from diffq.attach.weight import WeightQuantizer


def quantizers_in(model: nn.Module) -> list[WeightQuantizer]:
    """The weight quantizers that sit on a model, each once."""
    return [module for module in model.modules() if isinstance(module, WeightQuantizer)]


def chain_at(owner: nn.Module, name: str) -> parametrize.ParametrizationList | None:
    """The parametrizations of a tensor; None if there are none."""
    if not parametrize.is_parametrized(owner, name):
        return None
    return chains(owner)[name]


def chains(owner: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    """The parametrizations of a module, by the name of the tensor; none if it has none."""
    named: Any = getattr(owner, "parametrizations", {})
    return dict(named.items())


def original_names(chain: parametrize.ParametrizationList) -> list[str]:
    """The attributes under which a chain keeps what it is computed from."""
    return ["original"] if chain.is_tensor else [f"original{i}" for i in range(chain.ntensors)]


def originals(chain: parametrize.ParametrizationList) -> list[Tensor]:
    """What a chain is computed from: parameters, or sharded parts of them."""
    return [getattr(chain, name) for name in original_names(chain)]


def quantizers_at(owner: nn.Module) -> list[tuple[str, WeightQuantizer]]:
    """The weight quantizers of a module's tensors, by the tensors' names."""
    lasts = [(name, list(chain)[-1]) for name, chain in chains(owner).items()]
    return [(name, last) for name, last in lasts if isinstance(last, WeightQuantizer)]


def unregister(owner: nn.Module, name: str, quantizer: WeightQuantizer) -> None:
    """Takes a weight quantizer off one place, where it still is."""
    chain = chain_at(owner, name)
    if chain is None or quantizer not in list(chain):
        return
    if len(chain) > 1:
        del chain[list(chain).index(quantizer)]
        return
    owner.__class__ = own_class(owner)
    parametrize.remove_parametrizations(owner, name, leave_parametrized=False)
    if isinstance(owner, nn.RNNBase):
        owner._init_flat_weights()


def own_class(owner: nn.Module) -> type[nn.Module]:
    """A copy of a parametrized module's class, which its deep copies share with it.

    torch adds and removes properties there, and must not do so for other modules.
    """
    shared = type(owner)
    members = {k: v for k, v in vars(shared).items() if k not in ("__dict__", "__weakref__")}
    return type(shared.__name__, shared.__bases__, members)


def reorder(owner: nn.Module, order: list[str]) -> None:
    """Puts parameters back in an order that was."""
    parameters = {name: owner._parameters[name] for name in order if name in owner._parameters}
    parameters.update(owner._parameters)
    owner._parameters.clear()
    owner._parameters.update(parameters)


def bake(model: nn.Module, plan: TensorPlan, value: Tensor) -> None:
    """Sets a tensor of a detached model at every place; whatever computed it is removed."""
    for site in plan.sites:
        if parametrize.is_parametrized(site.owner(model), site.attribute):
            # The tensor was computed from others, which cannot give this very value.
            parametrize.remove_parametrizations(
                site.owner(model), site.attribute, leave_parametrized=True
            )
    with torch.no_grad():
        plan.sites[0].read(model).copy_(value)

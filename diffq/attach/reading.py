"""The short way from `module.weight` to a weight that is computed already.

torch's property calls two modules in a row for each reading, which takes longer than
many a small layer computes. A model reads hundreds of weights in a forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def shorten_reading(owner: nn.Module, name: str) -> None:
    """Lets a parametrized module return its weight at once, where nothing is to be computed.

    The class of a parametrized module is its own; the property goes with the
    parametrization.

    Args:
        owner: the module, just parametrized.
        name: the tensor's attribute.
    """
    whole: property = vars(type(owner))[name]
    compute: Any = whole.fget

    def _read(owner: Any) -> Tensor:
        if not torch.compiler.is_compiling():
            chain = owner._modules["parametrizations"]._modules[name]
            weight = chain._parameters.get("original")
            # The type's own attribute, because isinstance takes long for an abstract class.
            at_hand = getattr(type(chain._modules["0"]), "at_hand", None)
            if weight is not None and at_hand is not None and len(chain._modules) == 1:
                ready: Tensor | None = at_hand(chain._modules["0"], weight)
                if ready is not None:
                    return ready
        computed: Tensor = compute(owner)
        return computed

    setattr(type(owner), name, property(_read, whole.fset))

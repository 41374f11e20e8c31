"""When weights that are exactly zero are looked for, so that quantization keeps them zero.

A padding row, a pruned weight or a mask is zero by design. A quantizer that is told of
zeros (`WeightQuantizer.look`) keeps them, and the result holds until the next look:

| when | whose weights |
| --- | --- |
| the quantizer is attached | all |
| `load_state_dict`, `state_dict` | parameters, whole ones |
| each `eval()`, and `train()` after it | parameters, whole ones |
| eval, export and sizes, where no compiler traces them | all, as they are computed with |
| a training forward, a compiled forward | none: it would wait for the device |

`state_dict` looks because training that goes on from it does so after loading: both then
compute with the same grids. Tensors that another parametrization computes, and those that FSDP
shards, are seen in the first and the fourth row alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from diffq.chains import chains, quantizers_at
from diffq.sharding import is_dtensor
from diffq.weight import WeightQuantizer


def watch_states(owner: nn.Module) -> list[RemovableHandle]:
    """Hooks that look for zeros when a module's state is loaded or taken."""
    after_load = owner.register_load_state_dict_post_hook(_look)  # type: ignore[no-untyped-call]
    return [after_load, owner.register_state_dict_pre_hook(_look)]  # type: ignore[no-untyped-call]


class ModeWatch:
    """Looks for zeros when a weight quantizer is switched to eval, or back to training.

    Args:
        owner: the module that holds the weight.
        quantizer: the weight's quantizer.
    """

    def __init__(self, owner: nn.Module, quantizer: WeightQuantizer) -> None:
        self.owner = owner
        self.quantizer = quantizer

    def set_training(self, training: bool) -> None:
        """Looks, unless the quantizer trains already: some loops call `train()` in each step."""
        if not training or not self.quantizer.training:
            _look(self.owner)

    def remove(self) -> None:
        """Nothing is left behind."""


def _look(owner: nn.Module, *_: Any) -> None:
    if torch.compiler.is_compiling():
        return
    for name, quantizer in quantizers_at(owner):
        chain = chains(owner)[name]
        weight = chain._parameters.get("original")
        # What other parametrizations compute may change with each computation.
        if len(chain) == 1 and weight is not None and not weight.is_meta and not is_dtensor(weight):
            quantizer.look(weight.detach())

"""When weights that are exactly zero are looked for, so that quantization keeps them zero.

A padding row, a pruned weight or a mask is zero by design. To see one takes a pass over the
weight, and to act on it waits for the device, which training must not. So a quantizer is told
(`WeightQuantizer.look`) at these times whether there may be zeros, until the next time:

| when | whose weights |
| --- | --- |
| the quantizer is attached | all |
| `load_state_dict` | parameters, whole ones |
| each `eval()`, and `train()` after it | parameters, whole ones |
| eval, export and sizes, where no compiler traces them | all, as they are computed with |
| a training forward, a compiled forward | none |

Where there may be zeros, each forward finds out by itself, on the device, whether there are. So
zeros that go, as those of a layer that starts at zero, leave no trace in what is computed, and a
resumed training sees what the uninterrupted one does. Zeros that come are seen at the next of
these times. Tensors that another parametrization computes, and those that FSDP shards, are seen
in the first and the fourth row alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from diffq.attach.chains import chain_at, quantizers_at
from diffq.attach.weight import WeightQuantizer
from diffq.torch_inside.sharding import is_dtensor


def look_after_load(owner: nn.Module) -> RemovableHandle:
    """A hook that looks for zeros once a module's state was loaded."""
    return owner.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call,no-any-return]


class ModeWatch:
    """Looks for zeros when a weight quantizer is switched to eval, or back to training.

    Args:
        owner: the module that holds the weight.
        name: the weight's attribute.
        quantizer: the weight's quantizer.
    """

    def __init__(self, owner: nn.Module, name: str, quantizer: WeightQuantizer) -> None:
        self.owner = owner
        self.name = name
        self.quantizer = quantizer

    def set_training(self, training: bool) -> None:
        """Looks, unless the quantizer trains already: some loops call `train()` in each step."""
        if not training or not self.quantizer.training:
            _look(self.owner, self.name, self.quantizer)

    def remove(self) -> None:
        """Nothing is left behind."""


def _after_load(owner: nn.Module, incompatible_keys: Any) -> None:
    for name, quantizer in quantizers_at(owner):
        _look(owner, name, quantizer)


def _look(owner: nn.Module, name: str, quantizer: WeightQuantizer) -> None:
    chain = chain_at(owner, name)
    # What other parametrizations compute may change with each computation.
    if torch.compiler.is_compiling() or chain is None or list(chain) != [quantizer]:
        return
    weight = chain._parameters.get("original")
    if weight is not None and not weight.is_meta and not is_dtensor(weight):
        quantizer.look(weight.detach())

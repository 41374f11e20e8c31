"""Modules that read a weight several times in one forward: recurrent ones and attention."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from diffq.attach.chains import quantizers_at

_DEAD: Any = weakref.ref(nn.Module())


class TrainingHold:
    """Computes the weights of a module once for each of its training forwards.

    Only while the module trains: in eval mode hooks would keep attention from its
    fast path, and the weights are cached anyway.
    """

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner
        self.handles: list[RemovableHandle] = []

    def set_training(self, training: bool) -> None:
        """Follows the mode of the module's weight quantizers."""
        if training and not self.handles:
            self.handles = hold_in_forward(self.owner)
        elif not training:
            self.remove()

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


def hold_in_forward(owner: nn.Module) -> list[RemovableHandle]:
    """Hooks that compute the weights of a module once for each of its training forwards."""
    return [
        owner.register_forward_pre_hook(_hold_weights),
        owner.register_forward_hook(_release_weights, always_call=True),
    ]


def _hold_weights(owner: nn.Module, args: Any) -> None:
    for name, quantizer in quantizers_at(owner):
        if quantizer.training:
            quantizer.hold(getattr(owner, name))


def _release_weights(owner: nn.Module, args: Any, output: Any) -> None:
    for _, quantizer in quantizers_at(owner):
        quantizer.hold(None)
    if isinstance(owner, nn.RNNBase) and torch.is_grad_enabled():
        # Recurrent modules keep the last weights, which here belong to a graph, until
        # they see others; a dead reference makes them look at the next forward.
        owner._flat_weights = []
        owner._flat_weight_refs = [_DEAD] * len(owner._flat_weights_names)

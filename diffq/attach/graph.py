"""What the autograd graph of a forward is told about samples and learned extras."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from diffq.attach.sample import Sample
from diffq.attach.weight import WeightQuantizer


class _Zero(torch.autograd.Function):
    """A zero that depends on tensors in name only."""

    @staticmethod
    def forward(ctx: Any, like: Tensor, *tensors: Tensor) -> Tensor:
        """0-dim zero of the dtype and device of `like`."""
        ctx.count = len(tensors)
        return like.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        """No gradient for any."""
        count: int = ctx.count
        return (None,) * (1 + count)


def tie_to_output(output: Any, extras: list[nn.Parameter]) -> Any:
    """Makes every learned extra part of the graph of the outputs.

    The size penalty is computed outside of the forward, where DistributedDataParallel
    does not look: it would take the extras of a layer that is not used, or whose bits
    are frozen, for parameters that get no gradient, or wait for one in vain.
    """
    leaves, spec = tree_flatten(output)
    for place, leaf in enumerate(leaves):
        if extras and isinstance(leaf, Tensor) and leaf.requires_grad:
            leaves[place] = leaf + _Zero.apply(leaf.detach(), *extras)  # type: ignore[no-untyped-call]
            return tree_unflatten(leaves, spec)
    return output


def call_before_backward(output: Any, call: Callable[[], None]) -> bool:
    """Calls back when a backward starts at an output; False if it holds no tensor to tell.

    Activation checkpointing runs parts of the forward again in its backward. Another
    forward may have come in between: the backward of each starts at its own output, and
    is over before that of an earlier one begins.
    """
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    # Parameters among the outputs outlive this forward, and so would a hook on them.
    computed = [leaf for leaf in leaves if leaf.requires_grad and not leaf.is_leaf]
    for leaf in computed:
        leaf.register_hook(lambda grad: call())  # type: ignore[no-untyped-call]
    return bool(computed) or (bool(leaves) and not torch.is_grad_enabled())


def use_samples(samples: dict[WeightQuantizer, Sample]) -> None:
    """Gives weight quantizers the samples of an earlier forward, until the backward ends."""
    for quantizer, sample in samples.items():
        quantizer.current = sample
    engine = torch.autograd.Variable._execution_engine
    engine.queue_callback(lambda: take_samples_away(samples))


def take_samples_away(quantizers: Iterable[WeightQuantizer]) -> None:
    """Leaves weight quantizers without the sample of a forward."""
    for quantizer in quantizers:
        quantizer.current = None

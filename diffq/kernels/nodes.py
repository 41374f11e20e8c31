"""Autograd nodes of batches whose values kernels have computed. Imports no Triton."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffq.numerics.flat import Flat
from diffq.numerics.grid import BitsLaw
from diffq.numerics.noise import Drawn, halves, noise_twice
from diffq.numerics.scaled import Levels, scale_gradients
from diffq.torch_inside.graph import Kept


@dataclass(frozen=True, eq=False)
class Launched:
    """What kernels drew for a batch.

    Attributes:
        kernels: a `Noisy` or a `Scaled`.
        state: what its gradients need.
        given: the bitwidths that the values were computed with, where they are not learned.
    """

    kernels: Any
    state: Any = None
    given: Tensor | None = None


class KernelNoise(torch.autograd.Function):
    """`diffq.numerics.noise.PseudoNoise`, whose backward draws the noise again."""

    @staticmethod
    def forward(
        ctx: Any, launched: Launched, law: BitsLaw, flat: Flat, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Takes logits, weights, and their values; returns these in the weights' dtype."""
        logits, *others = tensors
        weights, values = halves(others)
        ctx.launched, ctx.law, ctx.flat, ctx.values = launched, law, flat, values
        ctx.kept = Kept((logits, *weights))
        ctx.set_materialize_grads(False)
        return tuple(value.detach() for value in values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the logits and the weights."""
        logits, *weights = ctx.kept.tensors()
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        if torch.is_grad_enabled():
            drawn = Drawn.of(ctx.flat, weights, ctx.values)
            found = noise_twice(drawn, ctx.law, logits, weights, grads)
        else:
            launched = ctx.launched
            given = launched.given if logits is None else logits.detach()
            for_weights, for_logits = launched.kernels.gradients(
                launched.state, weights, given, grads
            )
            found = [for_logits if logits is not None else None, *for_weights]
        return None, None, None, *found, *[None] * len(weights)


class KernelScale(torch.autograd.Function):
    """`diffq.numerics.scaled.LearnedScale`, by kernels."""

    @staticmethod
    def forward(
        ctx: Any, launched: Launched, levels: Levels, flat: Flat, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """Takes scales, weights, and their values; returns these."""
        scales, *others = tensors
        weights, values = halves(others)
        ctx.launched, ctx.levels, ctx.flat, ctx.values = launched, levels, flat, values
        ctx.kept = Kept((scales, *weights))
        ctx.set_materialize_grads(False)
        return tuple(value.detach() for value in values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the scales and the weights."""
        scales, *weights = ctx.kept.tensors()
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        if torch.is_grad_enabled():
            drawn = Drawn.of(ctx.flat, weights, ctx.values)
            for_scales, for_weights = scale_gradients(drawn, ctx.levels, scales, weights, grads)
        else:
            kernels = ctx.launched.kernels
            for_weights, for_scales = kernels.gradients(weights, scales.detach(), grads)
        return None, None, None, for_scales, *for_weights, *[None] * len(weights)


def pass_noise(
    launched: Launched,
    law: BitsLaw,
    flat: Flat,
    logits: Tensor | None,
    weights: Sequence[Tensor],
    values: Sequence[Tensor],
) -> list[Tensor]:
    """`diffq.numerics.noise.pass_noise` of values that `Noisy` computed."""
    tensors = logits, *weights, *values
    result: tuple[Tensor, ...] = KernelNoise.apply(launched, law, flat, *tensors)  # type: ignore[no-untyped-call]
    return list(result)


def pass_scale(
    launched: Launched,
    levels: Levels,
    flat: Flat,
    scales: Tensor,
    weights: Sequence[Tensor],
    values: Sequence[Tensor],
) -> list[Tensor]:
    """`diffq.numerics.scaled.pass_scale` of values that `Scaled` computed."""
    tensors = scales, *weights, *values
    result: tuple[Tensor, ...] = KernelScale.apply(launched, levels, flat, *tensors)  # type: ignore[no-untyped-call]
    return list(result)

"""Levels around zero times a learned scale, and the gradients of LSQ (arXiv:1902.08153)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from diffq.numerics.flat import Flat, Piece, rows_of
from diffq.numerics.grid import finite_levels, is_narrow, wide
from diffq.numerics.noise import constants, halves, row_sums
from diffq.torch_inside.graph import Kept

# The least positive scale.
_LEAST = torch.finfo(torch.float32).tiny


class Levels(NamedTuple):
    """Whole numbers from the lowest to the highest that a bitwidth can tell apart.

    Attributes:
        lowest: -2**(bits-1).
        highest: 2**(bits-1) - 1.
    """

    lowest: int
    highest: int

    def nearest(self, ratio: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Levels nearest to w / s, in place, of those whose values are finite in a dtype.

        Args:
            ratio: w / s in float32 at least, any shape.
            scale: s, to broadcast with it.
            dtype: of the weights.
        """
        ratio.clamp_(self.lowest, self.highest)
        if is_narrow(dtype):
            ratio.clamp_(*finite_levels(scale, torch.zeros_like(scale), dtype))
        # Adding zero turns -0.0, which no level stands for, into 0.0.
        return ratio.round_().add_(0.0)


def positive(scales: Tensor) -> Tensor:
    """Learned scales without sign or zero, in float32."""
    return scales.float().abs().clamp(min=_LEAST)


def mean_magnitude(weight: Tensor) -> Tensor:
    """Mean of the absolute values of a float32 tensor, without overflow of their sum.

    0.01 for zeros: a tensor that starts at zero, as some last layers do, must be able to leave it.
    """
    magnitudes = weight.abs()
    # A power of two, by which numbers are scaled without rounding.
    exponent = torch.frexp(magnitudes.amax()).exponent.clamp(1, 128) - 1
    # torch 2.6 gives powers of whole numbers the default dtype.
    exponent = exponent.to(magnitudes.dtype)
    mean = torch.ldexp(torch.ldexp(magnitudes, -exponent).mean(), exponent)
    return torch.where(mean > 0, mean, torch.full_like(mean, 0.01))


def scale_all(flat: Flat, weights: Sequence[Tensor], scales: Tensor, levels: Levels) -> Tensor:
    """Equation 1 of the LSQ paper: the nearest level times the scale; without graph.

    Args:
        flat: the tensors.
        weights: of one dtype and device, any strides.
        scales: positive ones of each row, float32 [rows]; or [1] for all.
        levels: those of all tensors.

    Returns:
        The values as `Flat.join` gives them, in float32 at least.
    """
    like = weights[0]
    of_rows = scales.to(wide(like.dtype))

    def scaled(piece: Piece, room: Tensor) -> tuple[()]:
        scale = rows_of(of_rows, piece)[:, None]
        torch.div(flat.join(weights, like, piece), scale, out=room)
        levels.nearest(room, scale, like.dtype).mul_(scale)
        return ()

    (values,) = flat.compute(like, scaled)
    return values


class Kernels(Protocol):
    """Computes the gradients of LSQ on a GPU; see `diffq.kernels.scaled.Scaled`."""

    def gradients(
        self, weights: Sequence[Tensor], scales: Tensor, grads: Sequence[Tensor | None]
    ) -> tuple[list[Tensor | None], Tensor]:
        """Gradients of weights and scales."""


class LearnedScale(torch.autograd.Function):
    """The gradients of LSQ: Equations 2 and 3 of the paper, for many tensors at once.

    Where w / s is within the levels, the weight gets the gradient unchanged and the scale
    (value - w) / s times it; outside, the weight gets none, and the scale value / s times
    it. The scale's sum is multiplied by 1 / sqrt(weights * highest level). A scale's sign does
    not count.
    """

    @staticmethod
    def forward(
        ctx: Any, flat: Flat, levels: Levels, kernels: Kernels | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """Takes scales, weights, and their values; returns these in the weights' dtype."""
        scales, *others = tensors
        weights, values = halves(others)
        ctx.flat, ctx.levels, ctx.kernels, ctx.values = flat, levels, kernels, values
        ctx.kept = Kept((scales, *weights))
        return constants(ctx, weights, values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the scales and the weights."""
        scales, *weights = ctx.kept.tensors()
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        if ctx.kernels is None or torch.is_grad_enabled():
            found = _gradients(ctx, scales, weights, grads)
        else:
            found = ctx.kernels.gradients(weights, scales.detach(), grads)
        for_weights, for_scales = found
        return None, None, None, for_scales, *for_weights, *[None] * len(weights)


def _gradients(
    ctx: Any, scales: Tensor, weights: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> tuple[list[Tensor | None], Tensor]:
    """The gradients of weights and scales; differentiable."""
    flat: Flat = ctx.flat
    levels: Levels = ctx.levels
    like = weights[0]
    divisors = positive(scales).to(wide(like.dtype))
    of_rows = flat.rows.spread(divisors)

    def passed(piece: Piece, room: Tensor) -> tuple[Tensor]:
        rows, upstream = flat.join(weights, like, piece), flat.join(grads, like, piece)
        ratio = rows.detach() / rows_of(of_rows, piece)[:, None].detach()
        # 1 where a clamp changes nothing, else 0: products with a mask of bool take longer.
        inside = ratio.clamp(levels.lowest, levels.highest).eq_(ratio)
        room.copy_(upstream * inside)
        error = torch.addcmul(flat.join(ctx.values, like, piece), rows, inside, value=-1)
        return (row_sums(error * upstream),)

    joined, sums = flat.compute(like, passed)
    numels = flat.constants.get("numels", flat.numels, sums.dtype, sums.device)
    shares = (numels * levels.highest).rsqrt()
    # What is below the least positive scale counts as that.
    signs = scales.sign() * (scales.abs() >= _LEAST)
    for_scales = flat.rows.sums(sums) * shares / divisors * signs
    each = zip(flat.split(joined), grads, strict=True)
    for_weights = [None if grad is None else part.to(like.dtype) for part, grad in each]
    return for_weights, for_scales.to(scales.dtype)


def pass_scale(
    flat: Flat,
    levels: Levels,
    scales: Tensor,
    weights: Sequence[Tensor],
    values: Sequence[Tensor],
    kernels: Kernels | None = None,
) -> list[Tensor]:
    """Constant values, with the gradients of `LearnedScale`.

    Args:
        flat: the tensors.
        levels: those of all tensors.
        scales: of each tensor, [tensors]; differentiable.
        weights: in place of which the values are.
        values: of each weight, in its shape and strides.
        kernels: compute the gradients, where there are some.

    Returns:
        The values in the weights' shapes and dtype.
    """
    inputs = flat, levels, kernels, scales, *weights, *values
    result: tuple[Tensor, ...] = LearnedScale.apply(*inputs)  # type: ignore[no-untyped-call]
    return list(result)

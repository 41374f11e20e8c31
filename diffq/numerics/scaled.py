"""Levels around zero times a learned scale, and the gradients of LSQ (arXiv:1902.08153)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffq.numerics.flat import Flat
from diffq.numerics.grid import finite_levels, is_narrow
from diffq.numerics.noise import Drawn, halves, row_sums
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
        return ratio.round_()


def positive(scales: Tensor) -> Tensor:
    """Learned scales without sign or zero, in float32."""
    return scales.float().abs().clamp(min=_LEAST)


def scale_all(flat: Flat, weights: Sequence[Tensor], scales: Tensor, levels: Levels) -> Drawn:
    """Equation 1 of the LSQ paper: the nearest level times the scale; without graph.

    Args:
        flat: the tensors.
        weights: of one dtype and device, any strides.
        scales: of each tensor, [tensors].
        levels: those of all tensors.
    """
    joined = flat.join(weights, weights[0])
    of_rows = flat.rows.spread(positive(scales).to(joined.dtype))
    for rows, scale in flat.pieces(joined, of_rows):
        rows.div_(scale[:, None])
        levels.nearest(rows, scale[:, None], weights[0].dtype).mul_(scale[:, None])
    return Drawn(flat, joined, None)


class LearnedScale(torch.autograd.Function):
    """The gradients of LSQ: Equations 2 and 3 of the paper, for many tensors at once.

    Where w / s is within the levels, the weight gets the gradient unchanged and the scale
    (value - w) / s times it; outside, the weight gets none, and the scale value / s times
    it. The scale's sum is multiplied by 1 / sqrt(weights * highest level). A scale's sign does
    not count.
    """

    @staticmethod
    def forward(ctx: Any, drawn: Drawn, levels: Levels, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Takes scales, weights, and their values; returns these in the weights' dtype."""
        scales, *others = tensors
        weights, values = halves(others)
        ctx.drawn, ctx.levels, ctx.kept = drawn, levels, Kept((scales, *weights))
        ctx.set_materialize_grads(False)
        each = zip(weights, values, strict=True)
        return tuple(value.to(weight.dtype).detach() for weight, value in each)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the scales and the weights."""
        scales, *weights = ctx.kept.tensors()
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        for_scales, for_weights = scale_gradients(ctx.drawn, ctx.levels, scales, weights, grads)
        return None, None, for_scales, *for_weights, *[None] * len(weights)


def scale_gradients(
    drawn: Drawn,
    levels: Levels,
    scales: Tensor,
    weights: Sequence[Tensor],
    grads: Sequence[Tensor | None],
) -> tuple[Tensor, list[Tensor | None]]:
    """The gradients of `LearnedScale`: of scales, [tensors], and weights; differentiable."""
    flat, like = drawn.flat, weights[0]
    upstream, joined = flat.join(grads, like), flat.join(weights, like)
    wide = positive(scales).to(joined.dtype)
    ratio = joined / flat.rows.spread(wide)[:, None]
    inside = (ratio >= levels.lowest) & (ratio <= levels.highest)
    error = (drawn.values - joined * inside) * upstream
    counts = [math.sqrt(shape.numel() * levels.highest) for shape in flat.shapes]
    divisor = flat.constants.get(levels, counts, error.dtype, error.device)
    totals = flat.rows.sums(row_sums(error)) / divisor
    # What is below the least positive scale counts as that.
    signs = scales.sign() * (scales.abs() >= _LEAST)
    for_scales = (totals / wide * signs).to(scales.dtype)
    each = zip(flat.split(upstream * inside), grads, strict=True)
    return for_scales, [None if grad is None else part.to(like.dtype) for part, grad in each]


def pass_scale(
    drawn: Drawn,
    levels: Levels,
    scales: Tensor,
    weights: Sequence[Tensor],
    values: Sequence[Tensor],
) -> list[Tensor]:
    """Constant values, with the gradients of `LearnedScale`.

    Args:
        drawn: what `scale_all` gave.
        levels: as there.
        scales: as there; differentiable.
        weights: in place of which the values are.
        values: of each weight, in its shape and strides.

    Returns:
        The values in the weights' shapes and dtype.
    """
    result: tuple[Tensor, ...] = LearnedScale.apply(drawn, levels, scales, *weights, *values)  # type: ignore[no-untyped-call]
    return list(result)

"""Levels around zero times a step that rows of weights learn, and its gradient.

Of a weight w in a row with step s, training computes with k * s, where k = round(w / s). A change
of the step moves the value by the rounding error: with k * s = w + s * e, and e held constant,
d value / d log2(s) = log(2) * s * e = log(2) * (value - w). The weight gets the gradient unchanged.
Steps are powers of two in quarter octaves, rounded from what is learned, which gets the gradient
all the same (a straight-through estimator). Levels have 15 bits, so the step of a row must not be
below a 16383rd of its largest weight: where steps begin and where they are fixed, none is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffq.format.records import FIRST_STEP, LAST_STEP, STEPS
from diffq.format.records import PER_OCTAVE as PER_OCTAVE
from diffq.numerics.flat import Flat, Piece
from diffq.numerics.noise import constants, differentiated, halves, row_sums
from diffq.numerics.scaled import Levels
from diffq.numerics.segments import Constants
from diffq.torch_inside.graph import Kept, is_transformed

#: Quarter octaves of the finest step and of the coarsest one.
FINEST, COARSEST = FIRST_STEP, LAST_STEP

#: What levels can be stored: those of 15 bits.
LEVELS = Levels(-(2**14), 2**14 - 1)

_LOG_2 = math.log(2)
# A table, because no power of torch is the same on all processors.
_STEPS = torch.from_numpy(STEPS)
_ELSEWHERE = Constants()


def numbers_of(learned: Tensor) -> Tensor:
    """Steps in whole quarter octaves, int64, of their learned binary logarithms."""
    # NaN, of a loss that was not finite, must be no index. Eval refuses it.
    numbers = (learned.detach() * PER_OCTAVE).nan_to_num(nan=0.0).round()
    return numbers.clamp(FINEST, COARSEST).to(torch.int64)


def steps_of(numbers: Tensor) -> Tensor:
    """The steps of numbers, float32 of the same shape."""
    device = numbers.device
    if device.type == "cpu" or torch.compiler.is_compiling():
        table = _STEPS.to(device)
    else:
        table = _ELSEWHERE.get("steps", _STEPS.tolist(), torch.float32, device)
    return table[numbers - FINEST]


def least_numbers(largest: Tensor) -> Tensor:
    """The finest steps of rows whose last level is at their largest magnitude or beyond, float32.

    Args:
        largest: magnitude of each row.
    """
    numbers = (torch.log2(largest.float() / LEVELS.highest) * PER_OCTAVE).ceil()
    return numbers.clamp(FINEST, COARSEST)


class LearnedStep(torch.autograd.Function):
    """Forward gives quantized weights, backward treats them as w + s * e; see the module."""

    @staticmethod
    def forward(ctx: Any, flat: Flat, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Takes logarithms of steps, weights, and their values; returns these."""
        learned, *others = tensors
        weights, values = halves(others)
        ctx.flat, ctx.values, ctx.kept = flat, values, Kept((learned, *weights))
        return constants(ctx, weights, values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the logarithms and the weights."""
        learned, *weights = ctx.kept.tensors()
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        flat: Flat = ctx.flat
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            found = _gradients_twice(flat, learned, weights, ctx.values, grads)
            return None, *found, *[None] * len(weights)
        like, for_steps = weights[0], None
        if ctx.needs_input_grad[1]:

            def summed(piece: Piece, room: Tensor) -> tuple[Tensor]:
                error = flat.join(ctx.values, like, piece) - flat.join(weights, like, piece)
                return (row_sums(error.mul_(flat.join(grads, like, piece))),)

            _, sums = flat.compute(like, summed)
            for_steps = sums.mul_(_LOG_2).to(learned.dtype)
        return None, for_steps, *grads, *[None] * len(weights)


def pass_steps(
    flat: Flat, learned: Tensor, weights: Sequence[Tensor], values: Sequence[Tensor]
) -> list[Tensor]:
    """Constant values, with the gradients of `LearnedStep`.

    Args:
        flat: the tensors, whose rows have a step each.
        learned: binary logarithms of steps, [rows].
        weights: in place of which the values are.
        values: of each weight, in its shape and strides.

    Returns:
        The values in the weights' shapes and dtype.
    """
    if is_transformed():
        parts = torch.split(learned, list(flat.rows.counts))
        each = zip(weights, values, parts, strict=True)
        return [_expression(*tensors, flat.width) for tensors in each]
    result: tuple[Tensor, ...] = LearnedStep.apply(flat, learned, *weights, *values)  # type: ignore[no-untyped-call]
    return list(result)


def _gradients_twice(
    flat: Flat,
    learned: Tensor,
    weights: Sequence[Tensor],
    values: Sequence[Tensor],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The same gradients as a differentiable expression, for `create_graph=True`."""
    with torch.enable_grad():
        parts = torch.split(learned, list(flat.rows.counts))
        each = zip(weights, values, parts, grads, strict=True)
        used = [(w, v, part, grad) for w, v, part, grad in each if grad is not None]
        stepped = [_expression(w, v, part, flat.width) for w, v, part, _ in used]
        upstream = [grad for *_, grad in used]
        return differentiated(stepped, upstream, (learned, *weights))


def _expression(weight: Tensor, value: Tensor, learned: Tensor, width: int) -> Tensor:
    """The value in torch's operations, which all transforms know."""
    growth = torch.exp2(learned - learned.detach()).repeat_interleave(width)[: weight.numel()]
    error = (value - weight).detach() * growth.view(weight.shape)
    return ((weight - weight.detach()) + (weight.detach() + error)).to(weight.dtype)

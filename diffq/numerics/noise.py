"""Pseudo quantization noise, and the gradient that it and rounding pass on.

In training a weight is `w + step * n` (Equation 6 of the DiffQ paper), where n
does not depend on the weight, the bits or the range. So the gradient reaches the
weight directly, and the bits and the range through the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from diffq.numerics import grid
from diffq.numerics.draws import draw_
from diffq.numerics.grid import BitsLaw, Extremes
from diffq.torch_inside.graph import is_transformed

#: "gaussian" and "uniform" are random; "rounding" is the true rounding error.
Noise = Literal["gaussian", "uniform", "rounding"]
NOISES: tuple[str, ...] = get_args(Noise)

#: The paper's strength: N(0, 1) or U(-1, 1) times half a step.
DEFAULT_SCALE = 0.5

# Numbers that tensors share a buffer for; larger tensors are freed on their own.
_SHARED = 2**18

# Weights of a group up to which a product with ones sums it fastest.
_SHORT = 64


def perturb(
    weights: Sequence[Tensor], steps: Sequence[Tensor], group_sizes: Sequence[int], kind: Noise
) -> list[Tensor]:
    """Equation 6 for many tensors at once: weight + step * noise, with fresh unit noise.

    Args:
        weights: of one dtype and device, any shapes.
        steps: for each weight, the noise per unit, [groups] in float32 at least.
        group_sizes: for each weight, the weights per step.
        kind: the distribution of the noise; not "rounding".

    Returns:
        The noisy weights in their shapes, in float32 at least; without graph.
    """
    counts = [len(step) * size for step, size in zip(steps, group_sizes, strict=True)]
    parts = _draw_parts(steps[0], counts, kind)
    return [_add_scaled(*each) for each in zip(weights, steps, group_sizes, parts, strict=True)]


def _add_scaled(weight: Tensor, step: Tensor, group_size: int, unit: Tensor) -> Tensor:
    """The weight plus its steps times the unit noise, in place of that."""
    groups = grid.to_groups(grid.widen(weight.detach()), group_size)
    unit = unit.view(groups.shape)
    torch.addcmul(groups, unit, step[:, None], out=unit)
    return grid.from_groups(unit, weight.shape)


def _draw_parts(like: Tensor, counts: Sequence[int], kind: Noise) -> list[Tensor]:
    """One sample for each count; small ones share a buffer, large ones are freed on their own."""
    # Where its graph breaks, compiled code cannot hand out several views of one tensor.
    most = 0 if torch.compiler.is_compiling() else _SHARED
    shared: list[list[int]] = []
    for count in counts:
        if not shared or sum(shared[-1]) + count > most:
            shared.append([])
        shared[-1].append(count)
    buffers = [like.new_empty(sum(together)) for together in shared]
    draw_(buffers, kind)
    return [
        part
        for buffer, together in zip(buffers, shared, strict=True)
        for part in (torch.split(buffer, together) if len(together) > 1 else [buffer])
    ]


class PseudoNoise(torch.autograd.Function):
    """Forward gives a perturbed or quantized weight, backward treats it as `w + step * n`.

    n = (value - w) / step is held constant. With e = grad * (value - w), which equals
    grad * step * n: the weight gets grad unchanged; each logit gets the sum of e over its
    group, times d log(step) / d logit; the maximum gets the sum of all e over the range,
    and the minimum minus that. Only the value is kept, which the layer keeps anyway.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        value: Tensor,
        logits: Tensor | None,
        law: BitsLaw,
        group_size: int,
        extremes: Extremes,
        index: int,
    ) -> Tensor:
        """Returns `value` in the weight's dtype."""
        ctx.law, ctx.group_size, ctx.extremes, ctx.index = law, group_size, extremes, index
        ctx.save_for_backward(weight, value, logits)
        return value.to(weight.dtype).detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the weight and the logits."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            for_weight, for_logits = _twice_differentiable(ctx, grad)
        else:
            for_weight, for_logits = _gradients(ctx, grad)
        return for_weight, None, for_logits, None, None, None, None


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    weight, value, logits = ctx.saved_tensors
    for_weight = for_logits = None
    error = (grid.widen(value) - weight).mul_(grad)
    sums = _group_sums(error, ctx.group_size)
    if ctx.needs_input_grad[0]:
        places = ctx.extremes.places(ctx.index, weight.detach())
        for_range = ctx.extremes.gradients(ctx.index, sums.sum()).to(grad.dtype)
        spare = ctx.group_size > 1 and not torch.compiler.is_compiling()
        for_weight = _copied(grad, error if spare else None)
        for_weight.view(-1).index_add_(0, places, for_range)
    if ctx.needs_input_grad[2]:
        for_logits = sums.mul_(ctx.law.log_step_slope(logits)).to(logits.dtype)
    return for_weight, for_logits


def pass_noise(
    weight: Tensor,
    value: Tensor,
    logits: Tensor | None,
    law: BitsLaw,
    group_size: int,
    extremes: Extremes | None = None,
    index: int = 0,
) -> Tensor:
    """A constant value, with the gradient of `weight + step * noise`; see `PseudoNoise`.

    Args:
        weight: any shape.
        value: the perturbed or quantized weight, in the weight's dtype or a wider one.
        logits: [groups], one for each group's bitwidth; None where that is fixed.
        law: how bitwidths come from logits.
        group_size: weights per group.
        extremes: those of the weight and of others, where they are known.
        index: which of them are the weight's.

    Returns:
        The value in the weight's shape and dtype.
    """
    if is_transformed():
        return _expression(weight, value, logits, law, group_size)
    if extremes is None:
        extremes = grid.extremes([grid.widen(weight.detach())])
    inputs = weight, value, logits, law, group_size, extremes, index
    result: Tensor = PseudoNoise.apply(*inputs)  # type: ignore[no-untyped-call]
    return result


def _group_sums(error: Tensor, group_size: int) -> Tensor:
    if group_size == 1:
        return error.reshape(-1)
    groups = grid.to_groups(error, group_size)
    # While torch 2.6 compiles, a backward may ask no tensor where or how it lies.
    if not torch.compiler.is_compiling() and groups.is_cpu and group_size <= _SHORT:
        # torch sums short rows at half the speed.
        return groups.mv(groups.new_ones(group_size))
    return groups.sum(1)


def _copied(grad: Tensor, scratch: Tensor | None) -> Tensor:
    """A contiguous copy, in memory that is at hand if it fits."""
    if scratch is None or scratch.dtype != grad.dtype or not scratch.is_contiguous():
        return grad.clone(memory_format=torch.contiguous_format)
    return scratch.copy_(grad)


def _twice_differentiable(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The same gradients as a differentiable expression, for `create_graph=True`."""
    weight, value, logits = ctx.saved_tensors
    with torch.enable_grad():
        noisy = _expression(weight, value, logits, ctx.law, ctx.group_size)
        inputs = [t for t in (weight, logits) if t is not None and t.requires_grad]
        grads = torch.autograd.grad(noisy, inputs, grad, create_graph=True)
    found = {id(t): gradient for t, gradient in zip(inputs, grads, strict=True)}
    return found.get(id(weight)), found.get(id(logits))


def _expression(
    weight: Tensor, value: Tensor, logits: Tensor | None, law: BitsLaw, group_size: int
) -> Tensor:
    """The perturbed weight in torch's operations, which all transforms know."""
    # amin and amax, because aminmax is not differentiable in every torch.
    span = grid.widen(weight).amax() - grid.widen(weight).amin()
    step = (span / torch.where(span > 0, span, 1).detach()).view(1)
    if logits is not None:
        count = torch.exp2(law.bits(logits)) - 1
        step = step * (count.detach() / count)
    error = grid.to_groups((value - weight).detach(), group_size)
    noisy = weight + grid.from_groups(error * step[:, None], weight.shape)
    return noisy.to(weight.dtype)


class StraightThrough(torch.autograd.Function):
    """Forward gives the quantized weight, backward is the identity to the weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, quantized: Tensor) -> Tensor:
        """Returns `quantized` in the weight's dtype."""
        return quantized.to(weight.dtype).detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The gradient, unchanged."""
        return grad, None


def straight_through(weight: Tensor, quantized: Tensor) -> Tensor:
    """A constant quantized weight, with the weight's own gradient."""
    if is_transformed():
        return (weight - weight.detach()) + quantized.to(weight.dtype)
    result: Tensor = StraightThrough.apply(weight, quantized)  # type: ignore[no-untyped-call]
    return result

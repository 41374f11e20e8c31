"""Pseudo quantization noise, and the gradient that rounding passes on.

In training a weight is `w + step * n` (Equation 6 of the DiffQ paper), where n
does not depend on the weight, the bits or the range. So the gradient reaches the
weight directly, and the bits and the range through the step.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from diffq import grid

#: "gaussian" and "uniform" are random; "rounding" is the true rounding error.
Noise = Literal["gaussian", "uniform", "rounding"]
NOISES: tuple[str, ...] = get_args(Noise)

#: The paper's strength: N(0, 1) or U(-1, 1) times half a step.
DEFAULT_SCALE = 0.5


def draw(kind: Noise, groups: int, group_size: int, weight: Tensor) -> Tensor | None:
    """One sample of unit noise for a tensor.

    Args:
        kind: the distribution.
        groups: number of groups.
        group_size: weights per group.
        weight: gives device and precision.

    Returns:
        [groups, group_size] of N(0, 1) or U(-1, 1); None for "rounding", which is
        known only together with the weight.
    """
    if kind == "rounding":
        return None
    sample = torch.empty(groups, group_size, device=weight.device, dtype=compute_dtype(weight))
    return sample.normal_() if kind == "gaussian" else sample.uniform_(-1, 1)


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype to compute noise and grids in: at least float32."""
    return torch.promote_types(weight.dtype, torch.float32)


def perturb(weight: Tensor, step: Tensor, noise: Tensor) -> Tensor:
    """Equation 6: weight + step * noise.

    Args:
        weight: any shape.
        step: noise per unit of `noise`, [1] or [groups]; differentiable.
        noise: [groups, group_size].

    Returns:
        The noisy weight, in the weight's shape and dtype.
    """
    added = grid.from_groups(noise * step[:, None], weight.shape)
    return (weight + added).to(weight.dtype)


class StraightThrough(torch.autograd.Function):
    """Forward gives the quantized weight, backward treats it as `w + step * n`.

    n = (quantized - weight) / step is held constant, so that the weight gets the
    gradient unchanged (the straight-through estimator) and the step, where given,
    gets the one it would get from random noise.
    """

    @staticmethod
    def forward(weight: Tensor, quantized: Tensor, step: Tensor | None, group_size: int) -> Tensor:
        """Returns `quantized`, which must have the weight's shape and dtype."""
        return quantized.view_as(quantized)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keeps what the step's gradient needs; both tensors are alive anyway."""
        weight, quantized, step, ctx.group_size = inputs
        if step is not None:
            ctx.save_for_backward(weight, quantized, step)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor | None, None]:
        """Identity to the weight; sum over each group of gradient times n to the step."""
        if not ctx.needs_input_grad[2]:
            return grad, None, None, None
        weight, quantized, step = ctx.saved_tensors
        error = (quantized.to(step.dtype) - weight) * grad
        total = grid.to_groups(error, ctx.group_size).sum(1)
        return grad, None, total / torch.where(step > 0, step, 1), None


def straight_through(
    weight: Tensor, quantized: Tensor, step: Tensor | None = None, group_size: int = 1
) -> Tensor:
    """The quantized weight, with the gradient of the noisy one.

    Args:
        weight: any shape.
        quantized: like `weight`; constant.
        step: the grid's step, [groups]; without it only the weight gets a gradient.
        group_size: weights per group of `step`.
    """
    result: Tensor = StraightThrough.apply(weight, quantized, step, group_size)  # type: ignore[no-untyped-call]
    return result

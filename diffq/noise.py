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

from diffq import grid
from diffq.format.threads import in_threads
from diffq.grid import BitsLaw

#: "gaussian" and "uniform" are random; "rounding" is the true rounding error.
Noise = Literal["gaussian", "uniform", "rounding"]
NOISES: tuple[str, ...] = get_args(Noise)

#: The paper's strength: N(0, 1) or U(-1, 1) times half a step.
DEFAULT_SCALE = 0.5

# Numbers that one generator draws. Fixed, so that they do not depend on the number of threads.
_PIECE = 2**18


def draw_(samples: Sequence[Tensor], kind: Noise) -> None:
    """Fills tensors with unit noise, N(0, 1) or U(-1, 1).

    On a CPU torch draws on one core only, and drawing is most of what noise costs. So
    large samples are drawn in pieces, each by a generator seeded from torch's own: the
    numbers depend on the seed alone, not on the cores.

    Args:
        samples: any shapes, contiguous, on one device; overwritten.
        kind: the distribution; not "rounding".
    """
    small = sum(sample.numel() for sample in samples) <= _PIECE
    if small or samples[0].device.type != "cpu" or torch.compiler.is_compiling():
        for sample in samples:
            _fill(sample, kind, None)
        return
    pieces = [piece for sample in samples for piece in torch.split(sample.view(-1), _PIECE)]
    seeds = torch.randint(2**63 - 1, (len(pieces),)).tolist()

    def _draw(task: tuple[Tensor, int]) -> None:
        piece, seed = task
        _fill(piece, kind, torch.Generator().manual_seed(seed))

    in_threads(_draw, list(zip(pieces, seeds, strict=True)), torch.get_num_threads())


def _fill(sample: Tensor, kind: Noise, generator: torch.Generator | None) -> None:
    if kind == "gaussian":
        sample.normal_(generator=generator)
    else:
        sample.uniform_(-1, 1, generator=generator)


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
    shapes = [(len(step), size) for step, size in zip(steps, group_sizes, strict=True)]
    parts = _draw_parts(steps[0], [groups * size for groups, size in shapes], kind)
    grouped = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
    torch._foreach_mul_(grouped, [step[:, None] for step in steps])
    noisy = [grid.from_groups(g, w.shape) for g, w in zip(grouped, weights, strict=True)]
    torch._foreach_add_(noisy, [weight.detach() for weight in weights])
    return [_strided_as(weight, value) for weight, value in zip(weights, noisy, strict=True)]


def _draw_parts(like: Tensor, counts: Sequence[int], kind: Noise) -> list[Tensor]:
    """One sample for each count; small ones share a buffer, large ones are freed on their own."""
    # Where its graph breaks, compiled code cannot hand out several views of one tensor.
    most = 0 if torch.compiler.is_compiling() else _PIECE
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


def _strided_as(weight: Tensor, value: Tensor) -> Tensor:
    """The value in the weight's memory format, which convolutions choose their kernels by."""
    if weight.is_contiguous():
        return value
    return torch.empty_like(weight, dtype=value.dtype).copy_(value)


class PseudoNoise(torch.autograd.Function):
    """Forward gives a perturbed or quantized weight, backward treats it as `w + step * n`.

    n = (value - w) / step is held constant. With e = grad * (value - w), which equals
    grad * step * n: the weight gets grad unchanged; each logit gets the sum of e over its
    group, times d log(step) / d logit; the maximum gets the sum of all e over the range,
    and the minimum minus that. Only the value is kept, which the layer keeps anyway.
    """

    @staticmethod
    def forward(
        weight: Tensor, value: Tensor, logits: Tensor | None, law: BitsLaw, group_size: int
    ) -> Tensor:
        """Returns `value` in the weight's dtype."""
        return value.to(weight.dtype).view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keeps the inputs."""
        weight, value, logits, ctx.law, ctx.group_size = inputs
        ctx.save_for_backward(weight, value, logits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the weight and the logits."""
        weight, value, logits = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _twice_differentiable(weight, value, logits, ctx.law, ctx.group_size, grad)
        sums = _group_sums((value - weight).mul_(grad), ctx.group_size)
        for_weight = _add_range_gradient(grad, weight, sums.sum())
        if logits is None:
            return for_weight, None, None, None, None
        for_logits = sums.mul_(ctx.law.log_step_slope(logits)).to(logits.dtype)
        return for_weight, None, for_logits, None, None


def pass_noise(
    weight: Tensor, value: Tensor, logits: Tensor | None, law: BitsLaw, group_size: int
) -> Tensor:
    """A constant value, with the gradient of `weight + step * noise`; see `PseudoNoise`.

    Args:
        weight: any shape.
        value: the perturbed or quantized weight, in the weight's dtype or a wider one.
        logits: [groups], one for each group's bitwidth; None where that is fixed.
        law: how bitwidths come from logits.
        group_size: weights per group.

    Returns:
        The value in the weight's shape and dtype.
    """
    result: Tensor = PseudoNoise.apply(weight, value, logits, law, group_size)  # type: ignore[no-untyped-call]
    return result


def _group_sums(error: Tensor, group_size: int) -> Tensor:
    return error.reshape(-1) if group_size == 1 else grid.to_groups(error, group_size).sum(1)


def _add_range_gradient(grad: Tensor, weight: Tensor, total: Tensor) -> Tensor:
    """The gradient of the weight, with that of its extremes through the range."""
    flat = weight.detach().reshape(-1)
    places = torch.stack(grid.extremes(weight.detach()))
    low, high = flat[places].to(total.dtype).unbind()
    share = torch.where(high > low, total / (high - low), 0)
    result = grad.clone(memory_format=torch.contiguous_format)
    result.view(-1).index_add_(0, places, torch.stack([-share, share]).to(grad.dtype))
    return result


def _twice_differentiable(
    weight: Tensor,
    value: Tensor,
    logits: Tensor | None,
    law: BitsLaw,
    group_size: int,
    grad: Tensor,
) -> tuple[Tensor | None, ...]:
    """The same gradients as a differentiable expression, for `create_graph=True`."""
    with torch.enable_grad():
        # amin and amax, because aminmax is not differentiable in every torch.
        span = grid.widen(weight).amax() - grid.widen(weight).amin()
        step = (span / torch.where(span > 0, span, 1).detach()).view(1)
        if logits is not None:
            count = torch.exp2(law.bits(logits)) - 1
            step = step * (count.detach() / count)
        error = grid.to_groups((value - weight).detach(), group_size)
        noisy = weight + grid.from_groups(error * step[:, None], weight.shape)
        inputs = [weight] if logits is None else [weight, logits]
        grads = torch.autograd.grad(noisy.to(weight.dtype), inputs, grad, create_graph=True)
    return grads[0], None, grads[1] if logits is not None else None, None, None


class StraightThrough(torch.autograd.Function):
    """Forward gives the quantized weight, backward is the identity to the weight."""

    @staticmethod
    def forward(weight: Tensor, quantized: Tensor) -> Tensor:
        """Returns `quantized` in the weight's dtype."""
        return quantized.to(weight.dtype).view_as(quantized)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keeps nothing."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The gradient, unchanged."""
        return grad, None


def straight_through(weight: Tensor, quantized: Tensor) -> Tensor:
    """A constant quantized weight, with the weight's own gradient."""
    result: Tensor = StraightThrough.apply(weight, quantized)  # type: ignore[no-untyped-call]
    return result

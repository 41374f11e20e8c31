"""Pseudo quantization noise, and the gradient that it and rounding pass on.

In training a weight is `w + step * n` (Equation 6 of the DiffQ paper), where n
does not depend on the weight, the bits or the range. So the gradient reaches the
weight directly, and the bits and the range through the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from diffq.numerics import draws, grid
from diffq.numerics.flat import Ends, Flat, Piece, rows_of
from diffq.numerics.grid import BitsLaw
from diffq.numerics.segments import in_numpy
from diffq.torch_inside.graph import Kept, is_transformed

#: "gaussian" and "uniform" are random; "rounding" is the true rounding error.
Noise = Literal["gaussian", "uniform", "rounding"]
NOISES: tuple[str, ...] = get_args(Noise)

#: The paper's strength: N(0, 1) or U(-1, 1) times half a step.
DEFAULT_SCALE = 0.5

# Weights of a group up to which a product with ones sums it fastest.
_SHORT = 64


class Passing(Protocol):
    """What some tensors compute with in a forward, and its gradients.

    Attributes:
        flat: the tensors.
    """

    @property
    def flat(self) -> Flat:
        """The tensors."""

    def gradients(
        self,
        law: BitsLaw,
        logits: Tensor | None,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        """Gradients of the logits, and of each weight.

        Args:
            law: how bitwidths come from logits.
            logits: [groups]; None where bitwidths are fixed.
            weights: as they were when this was drawn.
            grads: of the values; None for those that were not used.
            needs: which of the gradients are needed.
        """


@dataclass(frozen=True, eq=False)
class Drawn:
    """Values that torch's operations have computed.

    Attributes:
        flat: the tensors.
        values: perturbed or quantized, as `Flat.join` gives them.
        ends: minimum and maximum of the weights.
    """

    flat: Flat
    values: Tensor
    ends: Ends

    @classmethod
    def of(cls, flat: Flat, weights: Sequence[Tensor], values: Sequence[Tensor]) -> Drawn:
        """What some values are, where each is known and not what they were drawn with."""
        with torch.no_grad():
            return cls(flat, flat.join(values, values[0]), flat.ends(weights))

    def gradients(
        self,
        law: BitsLaw,
        logits: Tensor | None,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        """See `Passing`."""
        flat, like = self.flat, weights[0]

        def passed(piece: Piece, room: Tensor) -> tuple[Tensor]:
            # In memory of its own, because others may hold the gradient that came in.
            upstream = room.copy_(flat.join(grads, like, piece))
            error = self.values[piece.rows] - flat.join(weights, like, piece)
            return (row_sums(error.mul_(upstream)),)

        upstream, sums = flat.compute(like, passed)
        totals = flat.rows.sums(sums)
        for_logits = None
        if logits is not None and needs[0]:
            of_groups = sums if flat.grouped else totals
            for_logits = (of_groups * law.log_step_slope(logits)).to(logits.dtype)
        if not any(needs[1:]):
            return [for_logits, *[None] * len(weights)]
        self.ends.add_gradients(upstream, totals)
        each = zip(flat.split(upstream), grads, needs[1:], strict=True)
        used = [part if need and grad is not None else None for part, grad, need in each]
        return [for_logits, *(None if part is None else part.to(like.dtype) for part in used)]


def perturb(
    flat: Flat,
    weights: Sequence[Tensor],
    bits: Tensor,
    kind: Noise,
    scale: float,
    zeros: Sequence[bool],
) -> Drawn:
    """Equation 6 for many tensors at once: weight + step * noise, with fresh noise; without graph.

    Args:
        flat: the tensors.
        weights: of one dtype and device, any strides.
        bits: of each group, [groups] in float32 at least.
        kind: the distribution of the noise; not "rounding".
        scale: steps per unit of noise.
        zeros: for each tensor, whether weights that are exactly zero stay so.
    """
    ends, like = flat.ends(weights), weights[0]
    spans = (ends.high - ends.low).mul_(scale)
    shares = torch.exp2(bits).sub_(1).reciprocal_().to(spans.dtype)
    # Few tensors as long as the groups, whose memory is new in each step.
    steps = (
        shares.mul_(flat.rows.spread(spans)) if flat.grouped else flat.rows.spread(spans * shares)
    )
    marks = _marked(flat, zeros, like.device)
    fill = draws.source(kind, flat.rows.total * flat.width, like, grid.wide(like.dtype))
    largest = torch.finfo(torch.float16).max

    def perturbed(piece: Piece, room: Tensor) -> tuple[()]:
        rows, unit = flat.join(weights, like, piece), fill(room)
        torch.addcmul(rows, unit, rows_of(steps, piece)[:, None], out=room)
        if marks is not None:
            room.masked_fill_((rows == 0) & rows_of(marks, piece)[:, None], 0)
        if like.dtype == torch.float16:
            room.clamp_(-largest, largest)
        return ()

    (values,) = flat.compute(like, perturbed)
    return Drawn(flat, values, ends)


def _marked(flat: Flat, zeros: Sequence[bool], device: torch.device) -> Tensor | None:
    """Which rows are of tensors whose zeros stay, bool; None if none are."""
    if not any(zeros):
        return None
    return flat.rows.spread(flat.constants.get(("zeros", *zeros), zeros, torch.bool, device))


class PseudoNoise(torch.autograd.Function):
    """Forward gives perturbed or quantized weights, backward treats them as `w + step * n`.

    n = (value - w) / step is held constant. With e = grad * (value - w), which equals
    grad * step * n: the weight gets grad unchanged; each logit gets the sum of e over its
    group, times d log(step) / d logit; the maximum gets the sum of all e over the range,
    and the minimum minus that. One node serves all tensors of a batch.
    """

    @staticmethod
    def forward(
        ctx: Any, drawn: Passing, law: BitsLaw, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Takes logits, weights, and their values; returns these in the weights' dtype."""
        logits, *others = tensors
        weights, values = halves(others)
        ctx.drawn, ctx.law, ctx.values, ctx.kept = drawn, law, values, Kept((logits, *weights))
        return constants(ctx, weights, values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the logits and the weights."""
        logits, *weights = ctx.kept.tensors()
        needs = ctx.needs_input_grad[2 : 3 + len(weights)]
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            found = _gradients_twice(ctx, logits, weights, grads)
        else:
            found = ctx.drawn.gradients(ctx.law, logits, weights, grads, needs)
        return None, None, *found, *[None] * len(weights)


def pass_noise(
    drawn: Passing,
    law: BitsLaw,
    logits: Tensor | None,
    weights: Sequence[Tensor],
    values: Sequence[Tensor],
) -> list[Tensor]:
    """Constant values, with the gradients of `weight + step * noise`; see `PseudoNoise`.

    Args:
        drawn: what the values were drawn with.
        law: how bitwidths come from logits.
        logits: [groups], one for each group's bitwidth; None where they are fixed.
        weights: in place of which the values are.
        values: of each weight, in its shape and strides.

    Returns:
        The values in the weights' shapes and dtype.
    """
    if is_transformed():
        parts = _logits_of(drawn.flat, logits)
        each = zip(weights, values, parts, strict=True)
        return [_expression(*tensors, law, drawn.flat) for tensors in each]
    result: tuple[Tensor, ...] = PseudoNoise.apply(drawn, law, logits, *weights, *values)  # type: ignore[no-untyped-call]
    return list(result)


def halves(tensors: Sequence[Any]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The first half of a node's inputs, and the second."""
    count = len(tensors) // 2
    return tensors[:count], tensors[count:]


def constants(ctx: Any, weights: Sequence[Tensor], values: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What the forward of a node returns: values in the weights' dtype, some of no use."""
    ctx.set_materialize_grads(False)
    each = zip(weights, values, strict=True)
    return tuple(value.to(weight.dtype).detach() for weight, value in each)


def row_sums(error: Tensor) -> Tensor:
    """The sum of each row of a matrix."""
    width = error.shape[1]
    if width == 1:
        return error.view(-1)
    if width <= _SHORT and in_numpy(error):
        # torch sums short rows at a sixth of the speed.
        array = error.numpy()
        with np.errstate(all="ignore"):
            return torch.from_numpy(array.dot(np.ones(width, array.dtype)))
    return error.sum(1)


def _logits_of(flat: Flat, logits: Tensor | None) -> Sequence[Tensor | None]:
    if logits is None:
        return [None] * len(flat.shapes)
    return torch.split(logits, list(flat.groups.counts))


def _gradients_twice(
    ctx: Any, logits: Tensor | None, weights: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The same gradients as a differentiable expression, for `create_graph=True`."""
    flat: Flat = ctx.drawn.flat
    with torch.enable_grad():
        every = zip(weights, ctx.values, _logits_of(flat, logits), grads, strict=True)
        noisy, upstream = [], []
        for weight, value, part, grad in every:
            if grad is not None:
                noisy.append(_expression(weight, value, part, ctx.law, flat))
                upstream.append(grad)
        return differentiated(noisy, upstream, (logits, *weights))


def differentiated(
    outputs: Sequence[Tensor], upstream: Sequence[Tensor], inputs: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of inputs that are differentiable themselves; None for those that need none."""
    needing = [t for t in inputs if t is not None and t.requires_grad]
    found = torch.autograd.grad(outputs, needing, upstream, create_graph=True, allow_unused=True)
    by_tensor = {id(t): gradient for t, gradient in zip(needing, found, strict=True)}
    return [by_tensor.get(id(t)) for t in inputs]


def _expression(
    weight: Tensor, value: Tensor, logits: Tensor | None, law: BitsLaw, flat: Flat
) -> Tensor:
    """The perturbed weight in torch's operations, which all transforms know."""
    # amin and amax, because aminmax is not differentiable in every torch.
    span = grid.widen(weight).amax() - grid.widen(weight).amin()
    step = (span / torch.where(span > 0, span, 1).detach()).view(1)
    if logits is not None:
        count = torch.exp2(law.bits(logits)) - 1
        step = step * (count.detach() / count)
    group_size = flat.width if flat.grouped else weight.numel()
    error = grid.to_groups((value - weight).detach(), group_size)
    noisy = weight + grid.from_groups(error * step[:, None], weight.shape)
    return noisy.to(weight.dtype)


class StraightThrough(torch.autograd.Function):
    """Forward gives quantized weights, backward is the identity to the weights.

    A compiler that counts as many inputs as `forward` has parameters takes it for one without
    context, so a node for one tensor must have another number.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        """Takes their number, weights, and quantized ones; returns these in the weights' dtype."""
        return constants(ctx, *halves(inputs[1:]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients, unchanged."""
        return None, *grads, *[None] * len(grads)


def straight_through(weights: Sequence[Tensor], quantized: Sequence[Tensor]) -> list[Tensor]:
    """Constant quantized weights, with the weights' own gradients."""
    if is_transformed():
        each = zip(weights, quantized, strict=True)
        return [(weight - weight.detach()) + value.to(weight.dtype) for weight, value in each]
    result: tuple[Tensor, ...] = StraightThrough.apply(len(weights), *weights, *quantized)  # type: ignore[no-untyped-call]
    return list(result)

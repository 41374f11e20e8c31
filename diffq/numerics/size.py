"""Model sizes. MB is 2**20 bytes everywhere, as in the papers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffq.format.records import RANGE_BITS, WIDTH_BITS, group_count
from diffq.numerics import grid
from diffq.numerics.grid import BitsLaw
from diffq.torch_inside import functions
from diffq.torch_inside.sharding import (
    Layout,
    gather_from,
    holds_end,
    is_dtensor,
    layout_of,
    local_part,
)

MEGABYTE = 2**20
MEGABYTE_BITS = 8 * MEGABYTE


class Grouping(NamedTuple):
    """What the size of one tensor depends on besides its logits.

    Attributes:
        law: how bitwidths come from logits; the bit map counts from its lowest.
        group_size: weights per group; the last group may be short.
        numel: weights of the tensor.
    """

    law: BitsLaw
    group_size: int
    numel: int

    @property
    def groups(self) -> int:
        """Number of groups."""
        return group_count(self.numel, self.group_size)

    @property
    def missing(self) -> int:
        """Weights by which the last group is short."""
        return self.groups * self.group_size - self.numel


class LearnedBits(torch.autograd.Function):
    """Bits of all tensors with learned bitwidths, in one node and few operations.

    Equation 8 of the DiffQ paper, plus the ranges and bit maps as Equation 12 counts
    them. A bit map's width is that of the rounded bitwidths and has no gradient. Nothing
    is read back from the device, and nothing is kept but the logits.
    """

    @staticmethod
    def forward(
        groupings: Sequence[Grouping],
        wholes: Sequence[Grouping],
        ranks: Layout | None,
        active: Sequence[bool],
        *logits: Tensor,
    ) -> Tensor:
        """The sum over all tensors, 0-dim.

        Args:
            groupings: what this rank holds of each tensor.
            wholes: each tensor.
            ranks: how the tensors are sharded; None if this process holds them whole.
            active: for each tensor, whether its logits get a gradient.
            *logits: as `groupings`.
        """
        bits = grid.bits_of_all([g.law for g in groupings], logits)
        levels, most = _level_bits(bits, groupings), _largest(bits)
        if ranks is not None:
            gathered = gather_from(ranks, torch.cat([levels.view(1), most]))
            levels, most = gathered[:, 0].sum(), gathered[:, 1:].amax(0)
        return levels + _overhead_bits(most, wholes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keeps the logits."""
        ctx.groupings, _, _, ctx.active, *logits = inputs
        ctx.save_for_backward(*logits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The weights of each group, times what its bitwidth gains per logit."""
        grads = _gradients(ctx.groupings, ctx.saved_tensors, grad)
        each = zip(grads, ctx.active, ctx.needs_input_grad[4:], strict=True)
        found = (grad if active and needed else None for grad, active, needed in each)
        return None, None, None, None, *found


def learned_bits(
    groupings: Sequence[Grouping], logits: Sequence[Tensor], active: Sequence[bool] | None = None
) -> Tensor:
    """Bits of tensors with learned bitwidths; see `LearnedBits`.

    Args:
        groupings: one for each tensor.
        logits: one for each tensor, [groups]; all on one device, or all sharded alike.
            Then this is a collective.
        active: for each tensor, whether its logits get a gradient; None if all do.

    Returns:
        0-dim tensor in float32 at least, differentiable in the logits.
    """
    held, parts, ranks = groupings, logits, None
    active = [True] * len(logits) if active is None else active
    if is_dtensor(logits[0]):
        parts, ranks = [local_part(each) for each in logits], layout_of(logits[0])
        ends = map(holds_end, logits)
        held = [_held(*each) for each in zip(groupings, parts, ends, strict=True)]
    result: Tensor = functions.call(LearnedBits, held, groupings, ranks, active, *parts)
    return result


def _held(grouping: Grouping, logits: Tensor, end: bool) -> Grouping:
    """The part of a tensor that has these logits, and its last group if it is the end."""
    numel = logits.numel() * grouping.group_size
    return grouping._replace(numel=numel - grouping.missing if end else numel)


@torch.no_grad()
def total_bits(bits: list[Tensor], groupings: Sequence[Grouping]) -> Tensor:
    """Bits of tensors with given bitwidths, real or whole; without graph.

    Args:
        bits: for each tensor, the bitwidths of its groups; all on one device.
        groupings: one for each tensor.

    Returns:
        0-dim tensor.
    """
    return _level_bits(bits, groupings) + _overhead_bits(_largest(bits), groupings)


def _level_bits(bits: list[Tensor], groupings: Sequence[Grouping]) -> Tensor:
    sums = [part.sum() for part in bits]
    parts = list(torch._foreach_mul(sums, [float(g.group_size) for g in groupings]))
    parts += [b[-1] * -g.missing for b, g in zip(bits, groupings, strict=True) if g.missing]
    return torch.stack(parts).sum()


def _largest(bits: list[Tensor]) -> Tensor:
    """The largest bitwidth of each tensor, [tensors]; -inf for the empty part of a rank."""
    return torch.stack([b.max() if b.numel() else b.new_full((), -torch.inf) for b in bits])


def _overhead_bits(largest: Tensor, groupings: Sequence[Grouping]) -> Tensor:
    """Bit maps, ranges and bitwidths."""
    least = [grouping.law.min_bits for grouping in groupings]
    above = torch._foreach_sub(list(largest.round().unbind()), least)
    # frexp's exponent is the bit length of a whole number.
    widths = list(torch.frexp(torch.stack(above)).exponent.to(largest.dtype).unbind())
    maps = torch._foreach_mul(widths, [float(g.groups) for g in groupings])
    return torch.stack(maps).sum() + len(maps) * (RANGE_BITS + WIDTH_BITS)


def _gradients(
    groupings: Sequence[Grouping], logits: Sequence[Tensor], grad: Tensor
) -> list[Tensor]:
    sizes = [g.group_size for g in groupings]
    grads = grid.slopes_of_all([g.law for g in groupings], logits, sizes)
    torch._foreach_mul_(grads, grad)
    for grouping, gradient in zip(groupings, grads, strict=True):
        if grouping.missing:
            gradient[-1:].mul_((grouping.group_size - grouping.missing) / grouping.group_size)
    return [part.to(each.dtype) for part, each in zip(grads, logits, strict=True)]

"""Model sizes. MB is 2**20 bytes everywhere, as in the papers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffq.format.records import RANGE_BITS, WIDTH_BITS, group_count
from diffq.numerics import grid
from diffq.numerics.grid import BitsLaw
from diffq.torch_inside import foreach
from diffq.torch_inside.sharding import (
    Layout,
    gather_from,
    is_dtensor,
    layout_of,
    local_part,
    local_start,
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


class Sized(NamedTuple):
    """A tensor whose bitwidths are learned, and where its logits are in the flat parameter.

    Attributes:
        grouping: the tensor.
        start: the place of its first logit.
        active: whether its logits get a gradient.
    """

    grouping: Grouping
    start: int
    active: bool = True


class LearnedBits(torch.autograd.Function):
    """Bits of all tensors with learned bitwidths, in one node and few operations.

    Equation 8 of the DiffQ paper, plus the ranges and bit maps as Equation 12 counts
    them. A bit map's width is that of the rounded bitwidths and has no gradient. Nothing
    is read back from the device, and nothing is kept but the logits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        learned: Tensor,
        held: Sequence[Sized],
        wholes: Sequence[Sized],
        ranks: Layout | None,
    ) -> Tensor:
        """The sum over all tensors, 0-dim.

        Args:
            ctx: of the backward.
            learned: what this rank holds of the flat parameter, 1-dim.
            held: what this rank holds of each tensor; places count from its first logit.
            wholes: each tensor.
            ranks: how the flat parameter is sharded; None if this process holds it whole.
        """
        ctx.held = held
        ctx.save_for_backward(learned)
        groupings = [each.grouping for each in held]
        bits = grid.bits_of_all([g.law for g in groupings], _parts(learned, held))
        levels, most = _level_bits(bits, groupings), _largest(bits)
        if ranks is not None:
            gathered = gather_from(ranks, torch.cat([levels.view(1), most]))
            levels, most = gathered[:, 0].sum(), gathered[:, 1:].amax(0)
        return levels + _overhead_bits(most, [each.grouping for each in wholes])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The weights of each group, times what its bitwidth gains per logit."""
        (learned,) = ctx.saved_tensors
        active = [each for each in ctx.held if each.active]
        if not active:
            return torch.zeros_like(learned), None, None, None
        grads = _gradients([each.grouping for each in active], _parts(learned, active), grad)
        pieces, place = [], 0
        for each, gradient in zip(active, grads, strict=True):
            pieces += [learned.new_zeros(each.start - place), gradient]
            place = each.start + len(gradient)
        pieces.append(learned.new_zeros(len(learned) - place))
        return torch.cat(pieces).to(learned.dtype), None, None, None


def learned_bits(learned: Tensor, tensors: Sequence[Sized]) -> Tensor:
    """Bits of tensors with learned bitwidths; see `LearnedBits`.

    Args:
        learned: the flat parameter, 1-dim. If it is sharded, this is a collective.
        tensors: one or more, in the order of their places.

    Returns:
        0-dim tensor in float32 at least, differentiable in the logits.
    """
    held, part, ranks = tensors, learned, None
    if is_dtensor(learned):
        part, ranks = local_part(learned), layout_of(learned)
        held = [_held(each, local_start(learned), part.numel()) for each in tensors]
    result: Tensor = LearnedBits.apply(part, held, tensors, ranks)  # type: ignore[no-untyped-call]
    return result


def _parts(flat: Tensor, tensors: Sequence[Sized]) -> list[Tensor]:
    """The slices of a flat tensor that belong to each tensor."""
    return [flat.narrow(0, each.start, each.grouping.groups) for each in tensors]


def _held(tensor: Sized, start: int, length: int) -> Sized:
    """The part of a tensor whose logits are in a slice of the flat parameter; it may be empty."""
    grouping = tensor.grouping
    first = min(max(tensor.start, start), start + length)
    end = max(min(tensor.start + grouping.groups, start + length), first)
    numel = (end - first) * grouping.group_size
    if end > first and end == tensor.start + grouping.groups:
        numel -= grouping.missing
    return Sized(Grouping(grouping.law, grouping.group_size, numel), first - start, tensor.active)


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
    parts = list(foreach.mul(sums, [float(g.group_size) for g in groupings]))
    parts += [b[-1] * -g.missing for b, g in zip(bits, groupings, strict=True) if g.missing]
    return torch.stack(parts).sum()


def _largest(bits: list[Tensor]) -> Tensor:
    """The largest bitwidth of each tensor, [tensors]; -inf for the empty part of a rank."""
    return torch.stack([b.max() if b.numel() else b.new_full((), -torch.inf) for b in bits])


def _overhead_bits(largest: Tensor, groupings: Sequence[Grouping]) -> Tensor:
    """Bit maps, ranges and bitwidths."""
    least = [grouping.law.min_bits for grouping in groupings]
    above = foreach.sub(list(largest.round().unbind()), least)
    # frexp's exponent is the bit length of a whole number.
    widths = list(torch.frexp(torch.stack(above)).exponent.to(largest.dtype).unbind())
    maps = foreach.mul(widths, [float(g.groups) for g in groupings])
    return torch.stack(maps).sum() + len(maps) * (RANGE_BITS + WIDTH_BITS)


def _gradients(
    groupings: Sequence[Grouping], logits: Sequence[Tensor], grad: Tensor
) -> list[Tensor]:
    sizes = [g.group_size for g in groupings]
    grads = grid.slopes_of_all([g.law for g in groupings], logits, sizes)
    foreach.mul_(grads, grad)
    for grouping, gradient in zip(groupings, grads, strict=True):
        if grouping.missing:
            gradient[-1:].mul_((grouping.group_size - grouping.missing) / grouping.group_size)
    return grads

"""Model sizes. MB is 2**20 bytes everywhere, as in the papers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffq import grid
from diffq.format.records import RANGE_BITS, WIDTH_BITS, group_count
from diffq.grid import BitsLaw

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
    def forward(groupings: Sequence[Grouping], *logits: Tensor) -> Tensor:
        """The sum over all tensors, 0-dim."""
        return total_bits(grid.bits_of_all([g.law for g in groupings], logits), groupings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keeps the logits."""
        ctx.groupings = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The weights of each group, times what its bitwidth gains per logit."""
        each = zip(ctx.groupings, ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        grads = [
            _gradient(grouping, logits, grad) if needed else None
            for grouping, logits, needed in each
        ]
        return None, *grads


def learned_bits(groupings: Sequence[Grouping], logits: Sequence[Tensor]) -> Tensor:
    """Bits of tensors with learned bitwidths; see `LearnedBits`.

    Args:
        groupings: one for each tensor.
        logits: one for each tensor, [groups]; all on one device.

    Returns:
        0-dim tensor in float32 at least, differentiable in the logits.
    """
    result: Tensor = LearnedBits.apply(groupings, *logits)  # type: ignore[no-untyped-call]
    return result


@torch.no_grad()
def total_bits(bits: list[Tensor], groupings: Sequence[Grouping]) -> Tensor:
    """Bits of tensors with given bitwidths, real or whole; without graph.

    Args:
        bits: for each tensor, the bitwidths of its groups; all on one device.
        groupings: one for each tensor.

    Returns:
        0-dim tensor.
    """
    sums = [part.sum() for part in bits]
    parts = list(torch._foreach_mul(sums, [float(g.group_size) for g in groupings]))
    parts += [b[-1] * -g.missing for b, g in zip(bits, groupings, strict=True) if g.missing]
    parts += torch._foreach_mul(_map_widths(bits, groupings), [float(g.groups) for g in groupings])
    return torch.stack(parts).sum() + len(bits) * (RANGE_BITS + WIDTH_BITS)


def _map_widths(bits: list[Tensor], groupings: Sequence[Grouping]) -> list[Tensor]:
    most = torch.stack([part.max() for part in bits]).round()
    least = [grouping.law.min_bits for grouping in groupings]
    above = torch._foreach_sub(list(most.unbind()), least)
    # frexp's exponent is the bit length of a whole number.
    return list(torch.frexp(torch.stack(above)).exponent.to(most.dtype).unbind())


def _gradient(grouping: Grouping, logits: Tensor, grad: Tensor) -> Tensor:
    gradient = grouping.law.slope(logits) * (grad * grouping.group_size)
    if grouping.missing:
        short = (grouping.group_size - grouping.missing) / grouping.group_size
        gradient = torch.cat([gradient[:-1], gradient[-1:] * short])
    return gradient.to(logits.dtype)

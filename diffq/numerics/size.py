"""Model sizes. MB is 2**20 bytes everywhere, as in the papers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from diffq.format.records import RANGE_BITS, SCALE_BITS, WIDTH_BITS, group_count
from diffq.numerics.grid import BitsLaw, widen
from diffq.numerics.segments import Constants, Segments, joined_slices
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


def scaled_bits(numel: int, bits: int) -> int:
    """Equation 12 for a tensor of one bitwidth and one scale."""
    return numel * bits + SCALE_BITS + WIDTH_BITS


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
    """

    grouping: Grouping
    start: int


class Sizes:
    """Bits of many tensors, in few operations, whatever their number.

    Equation 8 of the DiffQ paper, plus the ranges and bit maps as Equation 12 counts
    them. A bit map's width is that of the rounded bitwidths.

    Args:
        tensors: in the order of their places; parts of tensors may have no group.
    """

    def __init__(self, tensors: Sequence[Sized]) -> None:
        self.tensors = tuple(tensors)
        groupings = [grouping for grouping, _ in tensors]
        self._segments = Segments([grouping.groups for grouping in groupings])
        ends = [(start, start + grouping.groups) for grouping, start in tensors]
        self._slices = joined_slices(ends)
        self._laws = list(dict.fromkeys(grouping.law for grouping in groupings))
        short = [grouping for grouping in groupings if grouping.missing]
        each = zip(self._segments.starts, groupings, strict=True)
        # Numbers of each tensor, and below of each whose last group is short.
        self._numbers: dict[str, list[float]] = {
            "least": [grouping.law.min_bits for grouping in groupings],
            "interval": [g.law.max_bits - g.law.min_bits for g in groupings],
            "size": [grouping.group_size for grouping in groupings],
            "groups": list(self._segments.counts),
            "missing": [grouping.missing for grouping in short],
            "filled": [1 - grouping.missing / grouping.group_size for grouping in short],
        }
        self._last = [start + g.groups - 1 for start, g in each if g.missing]
        self._constants = Constants()
        self._held: dict[tuple[int, int], Sizes] = {}

    def held(self, start: int, length: int) -> Sizes:
        """The sizes of what a rank holds in a slice of the flat parameter."""
        if (start, length) not in self._held:
            parts = [_held(each, start, length) for each in self.tensors]
            self._held[start, length] = Sizes(parts)
        return self._held[start, length]

    def gather(self, flat: Tensor) -> Tensor:
        """The logits of all tensors, one after the other, of the flat parameter."""
        parts = [flat[start:end] for start, end in self._slices]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def scatter(self, gathered: Tensor, like: Tensor) -> Tensor:
        """A gradient of what `gather` gave as one of the flat parameter."""
        if gathered.numel() == like.numel():
            return gathered.to(like.dtype)
        result, parts = torch.zeros_like(like), torch.split(gathered, list(self._segments.counts))
        for each, part in zip(self.tensors, parts, strict=True):
            result[each.start : each.start + part.numel()] = part
        return result

    def bits(self, logits: Tensor) -> Tensor:
        """Bitwidths of logits, as each law's `bits` gives them; without graph."""
        if len(self._laws) == 1:
            return self._laws[0].bits_now(logits)
        share = torch.sigmoid(widen(logits))
        bits = self._of_groups("interval", share) * share + self._of_groups("least", share)
        return bits.round_() if self._laws[0].whole else bits

    def level_bits(self, bits: Tensor) -> Tensor:
        """Bits of all levels, 0-dim."""
        total = torch.dot(self._segments.sums(bits), self._of_tensors("size", bits))
        if not self._last:
            return total
        return total - torch.dot(
            bits.index_select(0, self._last_groups(bits)), self._of_tensors("missing", bits)
        )

    def largest(self, bits: Tensor) -> Tensor:
        """The largest bitwidth of each tensor, [tensors]; -inf for the empty part of a rank."""
        return self._segments.largest(bits)

    def overhead_bits(self, largest: Tensor) -> Tensor:
        """Bit maps, ranges and bitwidths, 0-dim, by the largest bitwidth of each tensor."""
        # frexp's exponent is the bit length of a whole number.
        above = largest.round() - self._of_tensors("least", largest)
        widths = torch.frexp(above).exponent.to(largest.dtype)
        maps = torch.dot(widths, self._of_tensors("groups", largest))
        return maps + len(self.tensors) * (RANGE_BITS + WIDTH_BITS)

    def slopes(self, logits: Tensor, active: Sequence[bool]) -> Tensor:
        """What the bits of all levels gain per logit; nothing where a tensor is not active."""
        share = torch.sigmoid(widen(logits))
        slopes = torch.addcmul(share, share, share, value=-1)
        slopes.mul_(self._of_groups("interval", share)).mul_(self._of_groups("size", share))
        if not all(active):
            slopes.mul_(self._segments.spread(torch.tensor(active, device="cpu").to(share)))
        if self._last:
            last = self._last_groups(share)
            short = slopes.index_select(0, last) * self._of_tensors("filled", share)
            slopes.index_copy_(0, last, short)
        return slopes

    def _of_groups(self, name: str, like: Tensor) -> Tensor | float:
        """One number for all groups, or a number for each, if tensors differ."""
        numbers = self._numbers[name]
        if numbers.count(numbers[0]) == len(numbers):
            return numbers[0]
        return self._segments.spread(self._of_tensors(name, like))

    def _of_tensors(self, name: str, like: Tensor) -> Tensor:
        return self._constants.get(name, self._numbers[name], like.dtype, like.device)

    def _last_groups(self, like: Tensor) -> Tensor:
        return self._constants.get("last", self._last, torch.int64, like.device)


class LearnedBits(torch.autograd.Function):
    """Bits of all tensors with learned bitwidths, in one node.

    A bit map's width has no gradient. Nothing is read back from the device, and nothing is
    kept but the logits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        learned: Tensor,
        held: Sizes,
        wholes: Sizes,
        active: Sequence[bool],
        ranks: Layout | None,
    ) -> Tensor:
        """The sum over all tensors, 0-dim.

        Args:
            ctx: of the backward.
            learned: what this rank holds of the flat parameter, 1-dim.
            held: what this rank holds of each tensor.
            wholes: each tensor.
            active: whether the logits of a tensor get a gradient.
            ranks: how the flat parameter is sharded; None if this process holds it whole.
        """
        ctx.held, ctx.active = held, active
        ctx.save_for_backward(learned)
        bits = held.bits(held.gather(learned))
        levels, most = held.level_bits(bits), held.largest(bits)
        if ranks is not None:
            gathered = gather_from(ranks, torch.cat([levels.view(1), most]))
            levels, most = gathered[:, 0].sum(), gathered[:, 1:].amax(0)
        return levels + wholes.overhead_bits(most)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The weights of each group, times what its bitwidth gains per logit."""
        (learned,) = ctx.saved_tensors
        slopes = ctx.held.slopes(ctx.held.gather(learned), ctx.active).mul_(grad)
        return ctx.held.scatter(slopes, learned), None, None, None, None


class LearnedSize(Protocol):
    """The size of what a model's quantizer learns, and its gradient.

    Attributes:
        learns: whether the gradient is not zero.
    """

    @property
    def learns(self) -> bool:
        """Whether the gradient is not zero."""

    def bits(self, learned: Tensor) -> Tensor:
        """0-dim tensor in float32 at least, differentiable in the flat parameter.

        Args:
            learned: the flat parameter, 1-dim. If it is sharded, this is a collective.
        """

    def slopes(self, learned: Tensor) -> Tensor:
        """The gradient of `bits`, of the numbers that this rank holds; no collective."""


class BitsSize(NamedTuple):
    """The size of bitwidths, which follows from what is learned; see `LearnedBits`.

    Attributes:
        sizes: one tensor or more.
        active: for each tensor, whether its logits get a gradient.
    """

    sizes: Sizes
    active: Sequence[bool]

    @property
    def learns(self) -> bool:
        """Whether some logits get a gradient."""
        return any(self.active)

    def bits(self, learned: Tensor) -> Tensor:
        """See `LearnedSize`."""
        part, held = _of_rank(learned, self.sizes)
        ranks = layout_of(learned) if is_dtensor(learned) else None
        result: Tensor = LearnedBits.apply(part, held, *self, ranks)  # type: ignore[no-untyped-call]
        return result

    @torch.no_grad()
    def slopes(self, learned: Tensor) -> Tensor:
        """See `LearnedSize`."""
        part, held = _of_rank(learned, self.sizes)
        return held.scatter(held.slopes(held.gather(part), self.active), part)


class MeasuredSize(NamedTuple):
    """The size of levels, which were measured with their gradient; see `diffq.numerics.lengths`.

    Attributes:
        total: bits of all tensors, 0-dim.
        gradient: what the total gains for each number of the flat parameter, [numbers].
        learns: whether the gradient is not zero.
    """

    total: Tensor
    gradient: Tensor
    learns: bool

    def bits(self, learned: Tensor) -> Tensor:
        """See `LearnedSize`."""
        part = local_part(learned) if is_dtensor(learned) else learned
        result: Tensor = Measured.apply(part, self.total, self.slopes(learned))  # type: ignore[no-untyped-call]
        return result

    def slopes(self, learned: Tensor) -> Tensor:
        """See `LearnedSize`."""
        if not is_dtensor(learned):
            return self.gradient.to(learned)
        start, part = local_start(learned), local_part(learned).detach()
        return self.gradient[start : start + part.numel()].to(part)


class Measured(torch.autograd.Function):
    """A size that was measured, with a gradient that was measured with it."""

    @staticmethod
    def forward(ctx: Any, learned: Tensor, total: Tensor, slopes: Tensor) -> Tensor:
        """The total, 0-dim."""
        ctx.save_for_backward(slopes)
        return total.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The slopes, times what comes in."""
        (slopes,) = ctx.saved_tensors
        return grad.to(slopes) * slopes, None, None


def _of_rank(learned: Tensor, sizes: Sizes) -> tuple[Tensor, Sizes]:
    """What this rank holds of the flat parameter, and of each tensor."""
    if not is_dtensor(learned):
        return learned, sizes
    part, start = local_part(learned), local_start(learned)
    return part, sizes.held(start, part.numel())


def _held(tensor: Sized, start: int, length: int) -> Sized:
    """The part of a tensor whose logits are in a slice of the flat parameter; it may be empty."""
    grouping = tensor.grouping
    first = min(max(tensor.start, start), start + length)
    end = max(min(tensor.start + grouping.groups, start + length), first)
    numel = (end - first) * grouping.group_size
    if end > first and end == tensor.start + grouping.groups:
        numel -= grouping.missing
    return Sized(Grouping(grouping.law, grouping.group_size, numel), first - start)


@torch.no_grad()
def total_bits(bits: Tensor, grouping: Grouping) -> Tensor:
    """Bits of a tensor with given bitwidths [groups], real or whole, 0-dim; without graph."""
    sizes = Sizes([Sized(grouping, 0)])
    return sizes.level_bits(bits) + sizes.overhead_bits(sizes.largest(bits))

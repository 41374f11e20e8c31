"""Pure math of the quantization grid: groups, range, step, levels and values.

Every function takes weights in groups: [groups, group_size], the last group
padded. Ranges and bitwidths are [groups] or, for one that all share, [1].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_WIDE = (torch.float32, torch.float64)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The precision that grids and noise of a dtype are computed in: at least float32."""
    return dtype if dtype in _WIDE else torch.float32


def widen(tensor: Tensor) -> Tensor:
    """The tensor in the precision that grids and noise are computed in."""
    return tensor.to(wide(tensor.dtype))


def is_narrow(dtype: torch.dtype) -> bool:
    """True for float dtypes in which finite float32 numbers may be infinite: the half types."""
    return dtype not in _WIDE


def to_groups(tensor: Tensor, group_size: int) -> Tensor:
    """Cuts a tensor in groups of consecutive weights, in C order.

    Args:
        tensor: any shape, at least one element.
        group_size: weights per group.

    Returns:
        [groups, group_size]; the last group is padded with zeros. A view where possible.
    """
    missing = -tensor.numel() % group_size
    if missing:
        return F.pad(tensor.reshape(-1), (0, missing)).view(-1, group_size)
    return tensor.reshape(-1, group_size)


def from_groups(groups: Tensor, shape: torch.Size) -> Tensor:
    """Inverse of `to_groups`."""
    if groups.numel() == shape.numel():
        return groups.reshape(shape)
    return groups.reshape(-1)[: shape.numel()].view(shape)


def laid_out_as(weight: Tensor, value: Tensor) -> Tensor:
    """A value in the strides of its weight, by which torch chooses the kernels of a layer.

    Args:
        weight: any strides; where its elements overlap or leave gaps, the strides of
            `torch.empty_like`.
        value: of the weight's shape.
    """
    if value.stride() == weight.stride():
        return value
    return torch.empty_like(weight, dtype=value.dtype).copy_(value)


def bounds(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of a tensor, each [1]."""
    if torch.compiler.is_compiling():
        # Without a dimension, exporters cannot translate what it is decomposed into.
        low, high = torch.aminmax(tensor.reshape(-1), dim=0)
    else:
        low, high = torch.aminmax(tensor)
    return low.view(1), high.view(1)


def group_bounds(tensor: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of each group of a tensor, each [groups]."""
    groups = to_groups(tensor, group_size)
    return torch.amin(groups, dim=1), torch.amax(groups, dim=1)


def step_size(low: Tensor, high: Tensor, bits: Tensor) -> Tensor:
    """Distance of two levels: (high - low) / (2**bits - 1), for real bitwidths too.

    Args:
        low: minimum, [1] or [groups].
        high: maximum, like `low`.
        bits: bitwidths, [1] or [groups]; differentiable.

    Returns:
        [1] or [groups], in the ranges' units.
    """
    return (high - low) / (torch.exp2(bits) - 1)


def zero_points(low: Tensor, high: Tensor, bits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The level that stands for zero, and what is added to all values, of grids with a zero point.

    Where low <= 0 <= high, the level is round(-low / step) and nothing is added, so that
    zero is a level at every bitwidth. Elsewhere they are level 0 and low, as without.

    Args:
        low: float32 minimum, [1] or [groups].
        high: float32 maximum, like `low`.
        bits: whole bitwidths as float32, [1] or [groups].
        wanted: bool 0-dim, false for grids without a zero point.

    Returns:
        float32, each [1] or [groups].
    """
    step = step_size(low, high, bits)
    level = torch.round(-low / torch.where(step > 0, step, 1))
    # Steps near the smallest float32 may be rounded so far down that low is farther away.
    level = torch.minimum(level, torch.exp2(bits) - 1)
    inside = (low <= 0) & (high >= 0) & wanted
    return torch.where(inside, level, 0), torch.where(inside, 0, low)


def finite_levels(step: Tensor, added: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Lowest and highest whole number n for which n * step + added is finite in a half type.

    Args:
        step: float32, any shape.
        added: float32, like `step`.
        dtype: float16 or bfloat16.

    Returns:
        float32 like `step`, each a whole number or infinite.
    """
    kind = torch.finfo(dtype)
    # Half a unit in the last place above the largest number, rounding gives infinity. This
    # is below that by more than the roundings of n * step + added, and by less than a step.
    limit = kind.max * (1 + kind.eps / 4) * (1 - 2**-20)
    divisor = torch.where(step > 0, step, 1)
    lowest, highest = torch.ceil((-limit - added) / divisor), torch.floor((limit - added) / divisor)
    below, above = lowest - 1, highest + 1
    lowest = torch.where(torch.isfinite((below * step + added).to(dtype)), below, lowest)
    return lowest, torch.where(torch.isfinite((above * step + added).to(dtype)), above, highest)


def to_levels(
    groups: Tensor,
    low: Tensor,
    high: Tensor,
    bits: Tensor,
    zero_point: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Nearest level of each weight (Equation 1 of the DiffQ paper), half to even.

    Args:
        groups: float32 weights, [groups, group_size].
        low: float32 minimum, [1] or [groups].
        high: float32 maximum, like `low`.
        bits: whole bitwidths as float32, [1] or [groups].
        zero_point: bool 0-dim, whether weights that are 0.0 stay 0.0, see `zero_points`;
            None if they need not.
        dtype: the dtype of the weights, in which their values stay finite.

    Returns:
        float32 [groups, group_size] of whole numbers from 0 to 2**bits - 1;
        zeros where low equals high.
    """
    step = step_size(low, high, bits)
    divisor, top = torch.where(step > 0, step, 1)[:, None], torch.exp2(bits) - 1
    if zero_point is None:
        levels = (groups - low[:, None]).div_(divisor).round_()
        return levels.clamp_(min=0).clamp_(max=top[:, None])
    zero, added = zero_points(low, high, bits, zero_point)
    levels = (groups - added[:, None]).div_(divisor).round_().add_(zero[:, None])
    lowest = torch.zeros_like(top)
    # A grid with a zero point reaches up to half a step beyond low or high. Grids without stay
    # within, and float32 holds all of both: `MAX_RANGE` of diffq.format.records sees to that.
    if is_narrow(dtype):
        least, most = finite_levels(step, added, dtype)
        lowest, top = torch.maximum(least + zero, lowest), torch.minimum(most + zero, top)
    return levels.clamp_(min=lowest[:, None]).clamp_(max=top[:, None])


def from_levels(
    levels: Tensor, low: Tensor, high: Tensor, bits: Tensor, zero_point: Tensor | None = None
) -> Tensor:
    """Value of each level: level * step + low, each operation rounded to float32.

    With a zero point, it is (level - zero) * step + added, see `zero_points`.

    Takes and returns float32 [groups, group_size]; the other arguments are those
    of `to_levels`.
    """
    step = step_size(low, high, bits)[:, None]
    if zero_point is None:
        return (levels * step).add_(low[:, None])
    zero, added = zero_points(low, high, bits, zero_point)
    return (levels - zero[:, None]).mul_(step).add_(added[:, None])


@dataclass(frozen=True)
class BitsLaw:
    """Equation 11: how bitwidths come from logits, b = b_min + sigmoid(l) * (b_max - b_min).

    Attributes:
        min_bits: b_min.
        max_bits: b_max.
        whole: bitwidths are rounded, and pass the gradient of the real ones.
    """

    min_bits: int
    max_bits: int
    whole: bool = False

    def bits(self, logits: Tensor) -> Tensor:
        """Bitwidths in float32 at least, of the logits' shape; differentiable."""
        share = torch.sigmoid(widen(logits))
        bits = self.min_bits + share * (self.max_bits - self.min_bits)
        return bits + (torch.round(bits) - bits).detach() if self.whole else bits

    @torch.no_grad()
    def bits_now(self, logits: Tensor) -> Tensor:
        """The same without graph, in fresh memory; rounded if bitwidths are."""
        bits = torch.sigmoid(widen(logits))
        bits.mul_(self.max_bits - self.min_bits).add_(self.min_bits)
        return bits.round_() if self.whole else bits

    def log_step_slope(self, logits: Tensor) -> Tensor:
        """The slope of log(step) = log(range / (2**b - 1)): -log(2) / (1 - 2**-b) * db/dl."""
        share = torch.sigmoid(widen(logits))
        slope = torch.addcmul(share, share, share, value=-1)
        interval = self.max_bits - self.min_bits
        factor = interval * math.log(2)
        # 2**-b / factor, so that the factor takes no pass of its own.
        power, shift = share.mul_(-interval), math.log2(factor)
        if self.whole:
            power.sub_(self.min_bits).round_().sub_(shift).exp2_()
        else:
            power.sub_(self.min_bits + shift).exp2_()
        return slope.div_(power.sub_(1 / factor))

    def logit(self, bits: float) -> float:
        """The logit of a bitwidth, kept finite at the ends by 1% of the interval."""
        share = (bits - self.min_bits) / (self.max_bits - self.min_bits)
        share = min(max(share, 0.01), 0.99)
        return math.log(share / (1 - share))

    def logits(self, bits: Tensor) -> Tensor:
        """`logit` of many bitwidths."""
        share = (bits - self.min_bits) / (self.max_bits - self.min_bits)
        return torch.logit(share.clamp(0.01, 0.99))

"""Pure math of the quantization grid: groups, range, step, levels and values.

Every function takes weights in groups: [groups, group_size], the last group
padded. Ranges and bitwidths are [groups] or, for one that all share, [1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Weights below which a plain search is as fast.
_SMALL = 2**16


def widen(tensor: Tensor) -> Tensor:
    """The tensor in the precision that grids and noise are computed in: at least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def to_groups(tensor: Tensor, group_size: int) -> Tensor:
    """Cuts a tensor in groups of consecutive weights, in C order.

    Args:
        tensor: any shape, at least one element.
        group_size: weights per group.

    Returns:
        [groups, group_size]; the last group is padded with zeros. A view where possible.
    """
    flat = tensor.reshape(-1)
    missing = -flat.numel() % group_size
    if missing:
        flat = F.pad(flat, (0, missing))
    return flat.view(-1, group_size)


def from_groups(groups: Tensor, shape: torch.Size) -> Tensor:
    """Inverse of `to_groups`."""
    return groups.reshape(-1)[: shape.numel()].view(shape)


def bounds(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of a tensor, each [1]."""
    low, high = torch.aminmax(tensor)
    return low.view(1), high.view(1)


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


def to_levels(groups: Tensor, low: Tensor, high: Tensor, bits: Tensor) -> Tensor:
    """Nearest level of each weight (Equation 1 of the DiffQ paper), half to even.

    Args:
        groups: float32 weights, [groups, group_size].
        low: float32 minimum, [1] or [groups].
        high: float32 maximum, like `low`.
        bits: whole bitwidths as float32, [1] or [groups].

    Returns:
        float32 [groups, group_size] of whole numbers from 0 to 2**bits - 1;
        zeros where low equals high.
    """
    step = step_size(low, high, bits)[:, None]
    levels = (groups - low[:, None]).div_(torch.where(step > 0, step, 1)).round_().clamp_(min=0)
    return levels.clamp_(max=torch.exp2(bits)[:, None] - 1)


def from_levels(levels: Tensor, low: Tensor, high: Tensor, bits: Tensor) -> Tensor:
    """Value of each level: level * step + low, each operation rounded to float32.

    Takes and returns float32 [groups, group_size]; the other arguments are those
    of `to_levels`.
    """
    return (levels * step_size(low, high, bits)[:, None]).add_(low[:, None])


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

    def slope(self, logits: Tensor) -> Tensor:
        """db/dl."""
        share = torch.sigmoid(widen(logits))
        return torch.addcmul(share, share, share, value=-1).mul_(self.max_bits - self.min_bits)

    def log_step_slope(self, logits: Tensor) -> Tensor:
        """The slope of log(step) = log(range / (2**b - 1)): -log(2) / (1 - 2**-b) * db/dl."""
        rate = torch.exp2(-self.bits(logits)).sub_(1).div_(math.log(2))
        return self.slope(logits).div_(rate)

    def logit(self, bits: float) -> float:
        """The logit of a bitwidth, kept finite at the ends by 1% of the interval."""
        share = (bits - self.min_bits) / (self.max_bits - self.min_bits)
        share = min(max(share, 0.01), 0.99)
        return math.log(share / (1 - share))


@torch.no_grad()
def bits_of_all(laws: Sequence[BitsLaw], logits: Sequence[Tensor]) -> list[Tensor]:
    """Bitwidths of many tensors at once, as each law's `bits` gives them; without graph."""
    bits = list(torch._foreach_sigmoid([widen(part) for part in logits]))
    torch._foreach_mul_(bits, [law.max_bits - law.min_bits for law in laws])
    torch._foreach_add_(bits, [law.min_bits for law in laws])
    whole = [part for part, law in zip(bits, laws, strict=True) if law.whole]
    if whole:
        torch._foreach_round_(whole)
    return bits


def extremes(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Places of a minimum and a maximum in the flattened tensor, each 0-dim int64.

    Finding a value's place is some ten times as slow as finding the value, so large
    tensors are searched for the row first.
    """
    if tensor.dim() < 2 or tensor.numel() < _SMALL:
        return tensor.argmin(), tensor.argmax()
    rows = tensor.reshape(tensor.shape[0], -1)
    return _place(rows, rows.amin(1).argmin(), largest=False), _place(
        rows, rows.amax(1).argmax(), largest=True
    )


def _place(rows: Tensor, row: Tensor, largest: bool) -> Tensor:
    # index_select, because rows[row] would wait for the device.
    chosen = rows.index_select(0, row.view(1))
    return row * rows.shape[1] + (chosen.argmax() if largest else chosen.argmin())

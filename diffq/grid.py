"""Pure math of the quantization grid: groups, range, step, levels and values.

Every function takes weights in groups: [groups, group_size], the last group
padded. Ranges and bitwidths are [groups] or, for one that all share, [1].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
    """Minimum and maximum of a tensor, each [1]; differentiable."""
    return torch.amin(tensor).view(1), torch.amax(tensor).view(1)


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
    levels = torch.round((groups - low[:, None]) / torch.where(step > 0, step, 1))
    return torch.minimum(levels.clamp_(min=0), torch.exp2(bits)[:, None] - 1)


def from_levels(levels: Tensor, low: Tensor, high: Tensor, bits: Tensor) -> Tensor:
    """Value of each level: level * step + low, each operation rounded to float32.

    Takes and returns float32 [groups, group_size]; the other arguments are those
    of `to_levels`.
    """
    return levels * step_size(low, high, bits)[:, None] + low[:, None]


def bits_of_logits(logits: Tensor, min_bits: float, max_bits: float) -> Tensor:
    """Equation 11: b = b_min + sigmoid(l) * (b_max - b_min), of any shape."""
    return min_bits + torch.sigmoid(logits) * (max_bits - min_bits)


def logit_of_bits(bits: float, min_bits: float, max_bits: float) -> float:
    """Inverse of `bits_of_logits`, kept finite at the ends by 1% of the interval."""
    ratio = min(max((bits - min_bits) / (max_bits - min_bits), 0.01), 0.99)
    return float(torch.logit(torch.tensor(ratio, dtype=torch.float64)))

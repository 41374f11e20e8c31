"""Which weights a noise operator touches (Equation 6 of the Quant-Noise paper)."""

from __future__ import annotations

import torch
from torch import Tensor

from diffq.format.records import group_count
from diffq.numerics import grid


def block_mask(weight: Tensor, rate: float, block_size: int) -> Tensor:
    """Picks blocks of consecutive weights at random.

    Args:
        weight: any shape; gives the device.
        rate: probability that a block is picked.
        block_size: weights of the flattened tensor per block; the last may be short.

    Returns:
        bool, in the weight's shape: True in the picked blocks. At a rate of 0 or 1 no
        random number is drawn.
    """
    if rate in (0, 1):
        return torch.full_like(weight, bool(rate), dtype=torch.bool)
    blocks = group_count(weight.numel(), block_size)
    picked = torch.rand(blocks, 1, dtype=torch.float32, device=weight.device) < rate
    return grid.from_groups(picked.expand(-1, block_size), weight.shape)

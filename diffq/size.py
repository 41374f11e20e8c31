"""Model sizes. MB is 2**20 bytes everywhere, as in the papers."""

from __future__ import annotations

import torch
from torch import Tensor

from diffq.format.records import RANGE_BITS, WIDTH_BITS
from diffq.sharding import whole

MEGABYTE = 2**20
MEGABYTE_BITS = 8 * MEGABYTE


def differentiable_bits(bits: Tensor, group_size: int, numel: int, min_bits: int) -> Tensor:
    """Size of one tensor with real bitwidths, in bits.

    Equation 8 of the DiffQ paper, plus the range and the bit map as Equation 12
    counts them. The bit map's width is that of the rounded bitwidths and carries
    no gradient. Nothing is read back from the device.

    Args:
        bits: bitwidths, [groups].
        group_size: weights per group; the last group may be short.
        numel: weights of the tensor.
        min_bits: the bitwidth that the bit map counts from.

    Returns:
        0-dim tensor.
    """
    missing = bits.numel() * group_size - numel
    levels = whole(bits.sum()) * group_size
    if missing:
        levels = levels - whole(bits[-1]) * missing
    with torch.no_grad():
        # frexp's exponent is the bit length of a whole number.
        map_width = torch.frexp(torch.round(whole(bits.max())) - min_bits).exponent
    return levels + map_width * bits.numel() + (RANGE_BITS + WIDTH_BITS)

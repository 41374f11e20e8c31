"""Model sizes. MB is 2**20 bytes everywhere, as in the papers."""

from __future__ import annotations

import torch
from torch import Tensor

from diffq.format.records import RANGE_BITS, WIDTH_BITS

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
    levels = bits.sum() * group_size - bits[-1] * missing
    return levels + _overhead_bits(bits.max(), bits.numel(), min_bits)


def summarize_part(bits: Tensor) -> Tensor:
    """What the size of a tensor depends on, of some of its bitwidths: sum, last and largest.

    Args:
        bits: consecutive bitwidths, [n], or [0] for those behind the last.

    Returns:
        [3], differentiable in the first two.
    """
    if not bits.numel():
        return bits.new_tensor([0, 0, -torch.inf])
    return torch.stack([bits.sum(), bits[-1], bits.detach().max()])


def joined_bits(parts: Tensor, groups: int, group_size: int, numel: int, min_bits: int) -> Tensor:
    """`differentiable_bits` of bitwidths that were summarized in parts.

    Args:
        parts: results of `summarize_part` in the order of the bitwidths, [parts, 3].
        groups: number of all bitwidths.
        group_size: weights per group; the last group may be short.
        numel: weights of the tensor.
        min_bits: the bitwidth that the bit map counts from.

    Returns:
        0-dim tensor.
    """
    total, last, largest = parts.unbind(1)
    end = (largest > -torch.inf).sum() - 1
    missing = groups * group_size - numel
    levels = total.sum() * group_size - last.gather(0, end.view(1)).sum() * missing
    return levels + _overhead_bits(largest.max(), groups, min_bits)


@torch.no_grad()
def _overhead_bits(largest: Tensor, groups: int, min_bits: int) -> Tensor:
    """Bit map, range and bitwidth."""
    # frexp's exponent is the bit length of a whole number.
    map_width = torch.frexp(torch.round(largest) - min_bits).exponent
    return map_width * groups + (RANGE_BITS + WIDTH_BITS)

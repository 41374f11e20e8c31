"""Bitwidths of groups, and how steps and sizes follow a logit (Equations 8, 11 and 12)."""

import math

import triton
import triton.language as tl

from diffq.kernels.device.columns import (
    COLUMNS,
    GROUP_COUNT,
    GROUP_PIECE,
    GROUP_PIECES,
)
from diffq.kernels.device.exact import add, mul, rint, sigmoid

_LN2 = tl.constexpr(math.log(2))
_PER_BIT = tl.constexpr(1 / 8 / 2**20)


@triton.jit
def megabytes(bits):
    """Bits in MB."""
    return bits * _PER_BIT


@triton.jit
def of_logit(logit, least, interval, WHOLE_BITS: tl.constexpr):
    """Equation 11: least + sigmoid(logit) * interval."""
    share = sigmoid(logit)
    bits = add(
        mul(share, tl.full(share.shape, 0.0, tl.float32) + interval),
        tl.full(share.shape, 0.0, tl.float32) + least,
    )
    if WHOLE_BITS:
        return rint(bits)
    return bits


@triton.jit
def load(given, at, mask, least, interval, LEARNED: tl.constexpr, WHOLE_BITS: tl.constexpr):
    """Bitwidths at places of a flat tensor of logits or, if they are fixed, of bitwidths."""
    read = tl.load(given + at, mask=mask, other=1.0)
    if LEARNED:
        return of_logit(read, least, interval, WHOLE_BITS)
    return read


@triton.jit
def top(bits):
    """The highest level, 2**bits - 1, of whole bitwidths; NaN for NaN."""
    levels = ((1 << bits.to(tl.int32)) - 1).to(tl.float32)
    return tl.where(bits == bits, levels, bits)


@triton.jit
def slopes(logit, least, interval, WHOLE_BITS: tl.constexpr):
    """The slopes of log(step) and of the bitwidth by the logit."""
    share = sigmoid(logit)
    slope = share * (1.0 - share) * interval
    bits = of_logit(logit, least, interval, WHOLE_BITS)
    return -_LN2 / (1.0 - tl.exp2(-bits)) * slope, slope


@triton.jit
def total(table, sums, group_pieces, tensors, least, PARTS: tl.constexpr):
    """Equation 8 with the bit maps of Equation 12: bits of all tensors.

    Args:
        table: as everywhere.
        sums: bits of each piece of the groups, then the largest bitwidth in each.
        group_pieces: how many pieces there are.
        tensors: how many tensors there are.
        least: the bitwidth that bit maps count from.
        PARTS: at least the pieces of any tensor, a power of two.
    """
    lane = tl.arange(0, 16)
    part = tl.arange(0, PARTS)
    found = tl.zeros([16], tl.float32)
    for at in range(0, tensors, 16):
        inside = at + lane < tensors
        row = table + (at + lane).to(tl.int64) * COLUMNS
        first = tl.load(row + GROUP_PIECE, mask=inside, other=0)
        count = tl.load(row + GROUP_PIECES, mask=inside, other=0)
        groups = tl.load(row + GROUP_COUNT, mask=inside, other=0).to(tl.float32)
        mask = part[None, :] < count[:, None]
        where = sums + first[:, None] + part[None, :]
        levels = tl.sum(tl.load(where, mask=mask, other=0.0), 1)
        above = rint(tl.max(tl.load(where + group_pieces, mask=mask, other=0.0), 1)) - least
        # The bit length of a whole number below 16.
        width = (above >= 1.0).to(tl.float32) + (above >= 2.0).to(tl.float32)
        width += (above >= 4.0).to(tl.float32) + (above >= 8.0).to(tl.float32)
        found += tl.where(inside, levels + groups * width, 0.0)
    return tl.sum(found, 0)

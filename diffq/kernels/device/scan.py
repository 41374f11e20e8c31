"""Extremes of weights with their first places, of pieces of tensors."""

import triton
import triton.language as tl

from diffq.kernels.device.columns import ADDRESS_COLUMNS, PIECE, PIECES

_NOWHERE = tl.constexpr(2147483647)


@triton.jit(do_not_specialize=["weight_pieces"])
def scan_kernel(
    addresses,
    pieces,
    ends,
    places,
    weight_pieces,
    WTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for each piece of weights.

    Args:
        ends: float32 [2, weight_pieces], gets minimum and maximum.
        places: int32 [3, weight_pieces], gets their first places, and whether a weight is zero.
    """
    piece = tl.program_id(0)
    tensor = tl.load(pieces + piece * 3).to(tl.int64)
    start = tl.multiple_of(tl.load(pieces + piece * 3 + 1), 16)
    end = tl.load(pieces + piece * 3 + 2)
    weight = tl.load(addresses + tensor * ADDRESS_COLUMNS).to(tl.pointer_type(WTYPE))
    if ALIGNED:
        weight = tl.multiple_of(weight, 16)
        end = tl.multiple_of(end, 16)
    low = tl.full([BLOCK], float("inf"), tl.float32)
    high = tl.full([BLOCK], float("-inf"), tl.float32)
    low_at = tl.zeros([BLOCK], tl.int32)
    high_at = tl.zeros([BLOCK], tl.int32)
    zero = tl.zeros([BLOCK], tl.int32)
    for first in range(start, end, BLOCK):
        i = first + tl.arange(0, BLOCK)
        inside = i < end
        x = tl.load(weight + i, mask=inside, other=1.0).to(tl.float32)
        # NaN enters, and stays because nothing is less or greater.
        lower = inside & ((x < low) | (x != x))
        higher = inside & ((x > high) | (x != x))
        low = tl.where(lower, x, low)
        low_at = tl.where(lower, i, low_at)
        high = tl.where(higher, x, high)
        high_at = tl.where(higher, i, high_at)
        zero |= (x == 0.0).to(tl.int32)
    least, most = _join(low, high)
    tl.store(ends + piece, least)
    tl.store(ends + weight_pieces + piece, most)
    tl.store(places + piece, _first(low, least, low_at))
    tl.store(places + weight_pieces + piece, _first(high, most, high_at))
    tl.store(places + 2 * weight_pieces + piece, tl.max(zero, 0))


@triton.jit
def _join(lows, highs):
    """The least and the largest; NaN if there is one, which Triton's reductions would lose."""
    nan = tl.max((lows != lows).to(tl.int32), 0) > 0
    low = tl.where(nan, float("nan"), tl.min(lows, 0))
    high = tl.where(nan, float("nan"), tl.max(highs, 0))
    return low, high


@triton.jit
def _first(values, value, places):
    """The first place of a value."""
    return tl.min(tl.where(values == value, places, _NOWHERE), 0)


@triton.jit
def load_ends(row, ends, stride, PARTS: tl.constexpr):
    """Minimum and maximum of a tensor, from those of its pieces."""
    first = tl.load(row + PIECE)
    part = tl.arange(0, PARTS)
    mask = part < tl.load(row + PIECES)
    lows = tl.load(ends + first + part, mask=mask, other=float("inf"))
    highs = tl.load(ends + stride + first + part, mask=mask, other=float("-inf"))
    return _join(lows, highs)


@triton.jit
def load_places(row, ends, places, stride, low, high, PARTS: tl.constexpr):
    """The first places of a tensor's minimum and maximum."""
    first = tl.load(row + PIECE)
    part = tl.arange(0, PARTS)
    mask = part < tl.load(row + PIECES)
    lows = tl.load(ends + first + part, mask=mask, other=float("inf"))
    highs = tl.load(ends + stride + first + part, mask=mask, other=float("-inf"))
    low_at = tl.load(places + first + part, mask=mask, other=_NOWHERE)
    high_at = tl.load(places + stride + first + part, mask=mask, other=_NOWHERE)
    return _first(lows, low, low_at), _first(highs, high, high_at)


@triton.jit
def load_zero(row, places, stride, PARTS: tl.constexpr):
    """Whether a weight of the tensor is exactly zero."""
    first = tl.load(row + PIECE)
    part = tl.arange(0, PARTS)
    mask = part < tl.load(row + PIECES)
    found = tl.load(places + 2 * stride + first + part, mask=mask, other=0)
    return tl.max(found, 0) > 0

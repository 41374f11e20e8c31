"""Integers of 1 to 16 bits in bytes, laid out to be unpacked by few operations on any device.

A bitwidth is cut into fields of 8, 4, 2 and 1 bits, as in files (`format.bitpack`). In a byte of a
field of 4 bits, the low half is of a value in the first half of all values, the high half of one in
the second half. So a field is unpacked by shifts of the whole array, each of which gives
neighbouring values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffq.format.bitpack import fields


def pack(values: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Packs unsigned integers below `2**bits` into the bytes that `_planes` reads."""
    return np.concatenate([_squeeze(values, width, shift) for width, shift in fields(bits)])


def unpack(planes: Tensor, count: int, bits: int) -> Tensor:
    """Inverse of `pack`: uint8 [count], or int32 above 8 bits.

    Args:
        planes: uint8, what `pack` gave.
        count: number of values.
        bits: bitwidth of every value.
    """
    values: Tensor | None = None
    for width, shift, plane in _planes(planes, count, bits):
        field = _spread(plane, width)[:count]
        field = (field if bits <= 8 else field.int()) << shift if shift else field
        values = field if values is None else values | field
    return torch.empty(0, dtype=torch.uint8) if values is None else values


def unpack_at(planes: Tensor, count: int, bits: int, places: Tensor) -> Tensor:
    """The values at some places, int64 of any shape; see `unpack`."""
    values = torch.zeros_like(places)
    for width, shift, plane in _planes(planes, count, bits):
        rows = len(plane)
        field = plane[places % rows].long() >> (places // rows * width) & ((1 << width) - 1)
        values |= field << shift
    return values


def _planes(planes: Tensor, count: int, bits: int) -> Iterator[tuple[int, int, Tensor]]:
    """Width, shift and bytes of each field."""
    start = 0
    for width, shift in fields(bits):
        stop = start + (count * width + 7) // 8
        yield width, shift, planes[start:stop]
        start = stop


def _squeeze(values: NDArray[Any], width: int, shift: int) -> NDArray[np.uint8]:
    """A field of each value, 8/width of them a byte."""
    rows = 8 // width
    size = -(-values.size // rows)
    packed = np.zeros(size, np.uint8)
    for row in range(rows):
        part = values[row * size : (row + 1) * size]
        field = (part >> shift & ((1 << width) - 1)).astype(np.uint8)
        packed[: part.size] |= field << np.uint8(row * width)
    return packed


def _spread(plane: Tensor, width: int) -> Tensor:
    """Inverse of `_squeeze`, with the padding."""
    if width == 8:
        return plane
    mask = (1 << width) - 1
    return torch.cat([plane >> shift & mask for shift in range(0, 8, width)])

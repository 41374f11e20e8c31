"""Pack integers of 1 to 16 bits into bytes and back, vectorised with NumPy.

Layout. The binary digits of the bitwidth cut each value into fields of 8, 4, 2
and 1 bits, most significant field first: 7 bits are a field of 4, one of 2 and
one of 1; 16 bits are two fields of 8. Each field of all values is a stream of its
own, one after the other. Within a byte the first value sits in the lowest bits, and
each stream ends on a whole byte, padded with zeros. A count that divides by 8 is
packed without loss.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffq.errors import FormatError

MAX_BITS = 16

# Values are handled in blocks that stay in a core's cache; a multiple of 8.
_BLOCK = 1 << 16

# For each field width: the word that holds the 8/width values of one byte, and
# the (shift, mask) steps that spread the byte's fields over the word's bytes.
_SPREAD: dict[int, tuple[str, tuple[tuple[int, int], ...]]] = {
    4: ("<u2", ((4, 0x0F0F),)),
    2: ("<u4", ((12, 0x000F000F), (6, 0x03030303))),
    1: ("<u8", ((28, 0x0000000F0000000F), (14, 0x0003000300030003), (7, 0x0101010101010101))),
}


def fields(bits: int) -> list[tuple[int, int]]:
    """Cuts a bitwidth into `(width, shift)` fields, most significant first.

    Raises:
        FormatError: `bits` is not an integer from 1 to 16.
    """
    if not 1 <= bits <= MAX_BITS:
        raise FormatError(f"A bitwidth must be between 1 and {MAX_BITS}, got {bits}.")
    cut, shift = [], bits
    for width in (8, 8, 4, 2, 1):
        if shift >= width:
            shift -= width
            cut.append((width, shift))
    return cut


def packed_size(count: int, bits: int) -> int:
    """Bytes that `pack` makes of `count` values of `bits` bits."""
    return sum((count * width + 7) // 8 for width, _ in fields(bits))


def pack(values: NDArray[np.unsignedinteger], bits: int) -> NDArray[np.uint8]:
    """Packs unsigned integers below `2**bits`.

    Args:
        values: one-dimensional array of any unsigned dtype.
        bits: bitwidth of every value, 1 to 16.

    Returns:
        `packed_size(len(values), bits)` bytes.

    Raises:
        FormatError: a bitwidth outside 1 to 16, or a value that needs more bits.
    """
    streams = fields(bits)
    if values.size and int(values.max()) >> bits:
        raise FormatError(
            f"Values packed in {bits} bits must be below {1 << bits}, got {int(values.max())}."
        )
    packed = np.empty(packed_size(values.size, bits), np.uint8)
    offset = 0
    for width, shift in streams:
        per_block = _BLOCK * width // 8
        for block, start in enumerate(range(0, values.size, _BLOCK)):
            field = values[start : start + _BLOCK] >> shift & ((1 << width) - 1)
            squeezed = _squeeze(field.astype(np.uint8), width)
            place = offset + block * per_block
            packed[place : place + squeezed.size] = squeezed
        offset += (values.size * width + 7) // 8
    return packed


def unpack(packed: NDArray[np.uint8], count: int, bits: int) -> NDArray[np.uint16]:
    """Inverse of `pack`.

    Args:
        packed: exactly `packed_size(count, bits)` bytes.
        count: number of values.
        bits: bitwidth of every value, 1 to 16.

    Raises:
        FormatError: the number of bytes differs from what `count` and `bits` need, or
            the padding is not zero.
    """
    if packed.size != packed_size(count, bits):
        raise FormatError(
            f"{count} values of {bits} bits need {packed_size(count, bits)} bytes, "
            f"got {packed.size}."
        )
    values = np.empty(count, np.uint16)
    unpack_into(packed, values, bits)
    return values


def unpack_into(packed: NDArray[np.uint8], values: NDArray[Any], bits: int) -> None:
    """Writes what `unpack` returns to `values`: uint16, or uint8 for up to 8 bits."""
    offset = 0
    for index, (width, shift) in enumerate(fields(bits)):
        per_block = _BLOCK * width // 8
        size = (values.size * width + 7) // 8
        used = values.size * width % 8
        if used and packed[offset + size - 1] >> used:
            raise FormatError("The padding bits after packed values must be zero, got ones.")
        for block, start in enumerate(range(0, values.size, _BLOCK)):
            place = offset + block * per_block
            squeezed = packed[place : min(place + per_block, offset + size)]
            part = values[start : start + _BLOCK]
            field = _spread(squeezed, width)[: part.size]
            # NumPy multiplies bytes several times faster than it shifts them.
            if index:
                part |= np.multiply(field, 1 << shift, dtype=part.dtype)
            else:
                np.multiply(field, 1 << shift, out=part, dtype=part.dtype)
        offset += size


def _squeeze(field: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """One field of each value, a byte each, to `8/width` values a byte."""
    if width == 8:
        return field
    word, steps = _SPREAD[width]
    missing = -field.size % (8 // width)
    if missing:
        field = np.concatenate([field, np.zeros(missing, np.uint8)])
    words = field.view(word)
    for shift, _ in reversed(steps):
        words = words | words >> shift
    return words.astype(np.uint8)


def _spread(packed: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """Inverse of `_squeeze`, without cutting the padding off."""
    if width == 8:
        return packed
    word, steps = _SPREAD[width]
    words = packed.astype(word)
    for shift, mask in steps:
        words |= words << shift
        words &= mask
    return words.view(np.uint8)

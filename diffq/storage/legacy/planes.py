"""Bit planes of the earlier package to integers, vectorised with NumPy.

Plane k holds bit k of every element, least significant plane first, and pads with
zeros. Two packings exist; docs/legacy.md specifies both.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffq.errors import FormatError

#: Words of one plane in a line, and the elements that they hold.
WORDS = 32
LINE = 64 * WORDS


def unpack_words(words: NDArray[Any], count: int) -> NDArray[np.uint16]:
    """Unpacks 64-bit words [lines, planes, 32].

    Element `line * 2048 + bit * 32 + i` is at bit `bit` of word [line, k, i].

    Args:
        words: int64 or uint64.
        count: number of elements.

    Raises:
        FormatError: another shape than `count` elements need, or more elements.
    """
    lines = -(-count // LINE)
    if words.ndim != 3 or words.shape[0] != lines or words.shape[2] != WORDS:
        raise FormatError(
            f"{count} packed elements take words of shape [{lines}, planes, {WORDS}], "
            f"got {list(words.shape)}."
        )
    values = np.zeros((lines, 64, WORDS), np.uint16)
    for plane in range(_planes(words.shape[1])):
        data = np.ascontiguousarray(words[:, plane]).astype("<u8", copy=False).view(np.uint8)
        bits = np.unpackbits(data.reshape(lines, WORDS, 8), axis=2, bitorder="little")
        values |= bits.transpose(0, 2, 1).astype(np.uint16) << np.uint16(plane)
    return _without_padding(values.reshape(-1), count)


def unpack_shorts(words: NDArray[Any], count: int) -> NDArray[np.uint16]:
    """Unpacks 16-bit words [planes, width], with width = ceil(count / 16).

    Element `bit * width + j` is at bit `bit` of word [k, j].

    Args:
        words: int16.
        count: number of elements.

    Raises:
        FormatError: another shape than `count` elements need, or more elements.
    """
    width = -(-count // 16)
    if words.ndim != 2 or words.shape[1] != width:
        raise FormatError(
            f"{count} packed elements take words of shape [planes, {width}], "
            f"got {list(words.shape)}."
        )
    values = np.zeros((16, width), np.uint16)
    for plane in range(_planes(words.shape[0])):
        data = np.ascontiguousarray(words[plane]).astype("<i2", copy=False).view(np.uint8)
        bits = np.unpackbits(data.reshape(width, 2), axis=1, bitorder="little")
        values |= bits.T.astype(np.uint16) << np.uint16(plane)
    return _without_padding(values.reshape(-1), count)


def _without_padding(values: NDArray[np.uint16], count: int) -> NDArray[np.uint16]:
    if values[count:].any():
        raise FormatError(f"There are more packed elements than {count}.")
    return values[:count]


def _planes(count: int) -> int:
    if count > 15:
        raise FormatError(f"Packed elements have at most 15 bits, got {count} planes.")
    return count

"""Whole elements to few bytes and back (docs/format.md, section 8).

The bytes of floats compress when those of equal rank stand together: signs and
exponents repeat, mantissas do not.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from diffq.format import frames

# Above this many bytes, a thorough search for repetitions takes too long.
_SHORT = 1 << 18


def encode(data: NDArray[np.uint8], item: int, compress: bool) -> bytes:
    """Stores elements of `item` bytes: as they are, or as a zstd frame of their byte planes.

    Args:
        data: the elements' bytes, little-endian.
        item: bytes per element.
        compress: use zstd where that is smaller.
    """
    plain = data.tobytes()
    if not compress:
        return plain
    planes = list(np.ascontiguousarray(data.reshape(-1, item).T))
    search = frames.SHORT if data.size <= _SHORT else frames.LONG
    tried = (frames.compress(planes, parameters) for parameters in (frames.LEVELS, search))
    # The first of equals: a frame as long as its content would be taken for it.
    return min(plain, *tried, key=len)


def decode(stored: memoryview, item: int, size: int, where: str) -> NDArray[np.uint8]:
    """Inverse of `encode`.

    Args:
        stored: the stored bytes.
        item: bytes per element.
        size: bytes of all elements.
        where: the segment, for errors.

    Returns:
        uint8 [elements, item], a view of the stored or decompressed bytes. The caller puts
        them in order, so that they are not held twice.

    Raises:
        FormatError: `stored` is no sound frame of `size` bytes.
    """
    content = np.frombuffer(frames.expand(stored, size, where), np.uint8)
    return content.reshape(-1, item) if len(stored) == size else content.reshape(item, -1).T

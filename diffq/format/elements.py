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


def decode(stored: memoryview, item: int, size: int, where: str) -> bytes | memoryview:
    """Inverse of `encode`.

    Args:
        stored: the stored bytes.
        item: bytes per element.
        size: bytes of all elements.
        where: the segment, for errors.

    Returns:
        the elements' bytes: `stored` itself where they are not compressed.

    Raises:
        FormatError: `stored` is no sound frame of `size` bytes.
    """
    content = frames.expand(stored, size, where)
    if len(stored) == size:
        return content
    planes = np.frombuffer(content, np.uint8).reshape(item, -1)
    data = np.empty(planes.shape[::-1], np.uint8)
    for rank, plane in enumerate(planes):
        data[:, rank] = plane
    return data.reshape(-1).data

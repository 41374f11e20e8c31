"""A tensor kept as it is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffq.errors import FormatError
from diffq.format.dtypes import FLOAT_DTYPES, ITEM_SIZES


@dataclass(frozen=True, eq=False)
class RawRecord:
    """A tensor kept as it is, bit for bit, or as float16.

    Attributes:
        shape: the tensor's shape.
        dtype: the dtype to restore, by its torch name.
        stored_dtype: the dtype of the bytes: `dtype`, or "float16".
        data: uint8, the elements in C order, little-endian.

    Raises:
        FormatError: an unknown dtype, another number of bytes than the shape needs, or a
            bool that is neither 0 nor 1.
    """

    shape: tuple[int, ...]
    dtype: str
    stored_dtype: str
    data: NDArray[np.uint8]

    def __post_init__(self) -> None:
        halved = self.stored_dtype == "float16" and self.dtype in FLOAT_DTYPES
        if self.dtype not in ITEM_SIZES or not (self.stored_dtype == self.dtype or halved):
            raise FormatError(f"Cannot store dtype {self.dtype} as {self.stored_dtype}.")
        needed = math.prod(self.shape) * ITEM_SIZES[self.stored_dtype]
        if self.data.shape != (needed,):
            raise FormatError(
                f"A {self.stored_dtype} tensor of shape {self.shape} has {needed} bytes, "
                f"got {self.data.size}."
            )
        if self.dtype == "bool" and self.data.max(initial=0) > 1:
            raise FormatError(f"A bool is stored as 0 or 1, got {self.data.max()}.")

    def stored_bits(self) -> int:
        """Bits of the stored elements."""
        return 8 * self.data.size

"""The dtypes that a tensor can have, by their torch names."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: Bytes per element. docs/format.md, section 4: a dtype's code is its place in this list.
ITEM_SIZES = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "uint16": 2,
    "int16": 2,
    "uint32": 4,
    "int32": 4,
    "uint64": 8,
    "int64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex64": 8,
    "complex128": 16,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}

#: The dtypes in the order of their codes.
DTYPES = tuple(ITEM_SIZES)

#: dtypes that a quantized tensor, or one of elements stored as float16, can have.
FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True, eq=False)
class TypedBytes:
    """An array of any of the dtypes: NumPy has no bfloat16 and no float8.

    Attributes:
        shape: the shape.
        dtype: the dtype of the elements, by its torch name.
        data: uint8, the elements in C order, little-endian.
    """

    shape: tuple[int, ...]
    dtype: str
    data: NDArray[np.uint8]


def little_endian(array: NDArray[np.generic]) -> NDArray[np.uint8]:
    """The bytes of an array in C order, little-endian; no copy where they are in memory."""
    ordered = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return ordered.reshape(-1).view(np.uint8)

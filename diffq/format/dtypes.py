"""The dtypes that a tensor can have, by their torch names."""

from __future__ import annotations

#: Bytes per element of each dtype that a tensor can be stored in, by torch name.
ITEM_SIZES = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "uint16": 2,
    "int16": 2,
    "float16": 2,
    "bfloat16": 2,
    "uint32": 4,
    "int32": 4,
    "float32": 4,
    "uint64": 8,
    "int64": 8,
    "float64": 8,
    "complex64": 8,
    "complex128": 16,
}


#: dtypes that a tensor of levels, or of elements stored as float16, can have.
FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float64")

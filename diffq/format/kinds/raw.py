"""A tensor kept as it is, bit for bit, or as float16."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from diffq.errors import FormatError
from diffq.format.dtypes import DTYPES, FLOAT_DTYPES, ITEM_SIZES, TypedBytes
from diffq.format.kinds.base import Bytes, Entry, Fields, Levels, Record
from diffq.format.layout import Part
from diffq.format.wire import Cursor


@dataclass(frozen=True, eq=False)
class RawRecord(Record):
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

    state_kinds = ("raw",)

    stored_dtype: str
    data: Bytes

    def __post_init__(self) -> None:
        check_stored_dtype(self.dtype, self.stored_dtype)
        needed = math.prod(self.shape) * ITEM_SIZES[self.stored_dtype]
        if self.data.shape != (needed,):
            raise FormatError(
                f"A {self.stored_dtype} tensor of shape {self.shape} has {needed} bytes, "
                f"got {self.data.size}."
            )
        if self.dtype == "bool" and self.data.max(initial=0) > 1:
            raise FormatError(f"A bool is stored as 0 or 1, got {self.data.max()}.")

    @property
    def elements(self) -> Bytes:
        """The tensor's bytes."""
        return self.data

    def decoded(self) -> TypedBytes:
        """The stored elements."""
        return TypedBytes(self.shape, self.stored_dtype, self.data.copy())

    def entry(self, name: str) -> RawEntry:
        """Describes the record for the index; raises FormatError if a file cannot hold it."""
        return RawEntry(name, self.shape, self.dtype, self.stored_dtype)

    def fields(self, packed: bool) -> dict[str, Any]:
        """The elements."""
        return {"kind": "raw", "data": TypedBytes(self.shape, self.stored_dtype, self.data)}

    @classmethod
    def from_fields(cls, fields: Fields) -> RawRecord:
        """Inverse of `fields`."""
        data = fields.typed("data")
        if data.shape != fields.shape:
            raise FormatError(f"The data has shape {list(fields.shape)}, got {list(data.shape)}.")
        return cls(fields.shape, fields.dtype, data.dtype, data.data)


@dataclass(frozen=True)
class RawEntry(Entry):
    """What the index says about a raw tensor.

    Attributes:
        stored_dtype: the dtype of the bytes: `dtype`, or "float16".
    """

    kind = "raw"
    record_type = RawRecord

    stored_dtype: str

    @classmethod
    def read(cls, cursor: Cursor, where: str) -> dict[str, Any]:
        """Reads the dtype of the bytes."""
        return {"stored_dtype": DTYPES[cursor.code(len(DTYPES), "stored dtype", where)]}

    def write(self) -> bytes:
        """Inverse of `read`."""
        return bytes([DTYPES.index(self.stored_dtype)])

    def check(self) -> None:
        """Raises FormatError if the description alone breaks a rule."""
        super().check()
        check_stored_dtype(self.dtype, self.stored_dtype)

    @property
    def arrays(self) -> list[Part]:
        """The elements."""
        return [Part(ITEM_SIZES[self.stored_dtype], self.numel)]

    def record(self, elements: Bytes, levels: Levels, bits: Bytes) -> RawRecord:
        """The record, which has no integers."""
        return RawRecord(self.shape, self.dtype, self.stored_dtype, elements)


def check_stored_dtype(dtype: str, stored: str) -> None:
    """Raises FormatError for an unknown dtype, or one that is not stored as `stored`."""
    halved = stored == "float16" and dtype in FLOAT_DTYPES
    if dtype not in ITEM_SIZES or not (stored == dtype or halved):
        raise FormatError(
            f"Cannot store dtype {dtype} as {stored}: known dtypes are stored as they are, and "
            "only floats may be stored as float16."
        )

"""One tensor of a file as its index describes it (docs/format.md, section 4)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NoReturn

from diffq.errors import FormatError
from diffq.format import layout
from diffq.format.kinds.product import (
    CODEBOOK_DTYPES,
    ProductRecord,
    check_codebook_shape,
    check_scale_and_zero,
)
from diffq.format.layout import Part
from diffq.format.records import (
    FLOAT_DTYPES,
    ITEM_SIZES,
    MAX_BITS,
    GridRecord,
    RawRecord,
    Record,
    group_count,
)

MAX_NAME_BYTES = 1024
MAX_RANK = 32
#: The product of all sizes other than 0: what NumPy, torch and 63-bit byte counts can address.
MAX_ELEMENTS = 1 << 48

#: docs/format.md, section 4: a dtype's code is its place in this list.
DTYPES = (
    "bool",
    "uint8",
    "int8",
    "uint16",
    "int16",
    "uint32",
    "int32",
    "uint64",
    "int64",
    "float16",
    "bfloat16",
    "float32",
    "float64",
    "complex64",
    "complex128",
    "float8_e4m3fn",
    "float8_e5m2",
)

#: A kind's code is its place in this list.
KINDS = ("raw", "grid", "scaled", "product")


@dataclass(frozen=True)
class Entry:
    """What the index says about one tensor.

    Attributes:
        name: the tensor's name.
        kind: "raw", "grid", "scaled" or "product", after the record it decodes to.
        shape: the tensor's shape.
        dtype: the dtype to restore, by its torch name.
        stored_dtype: the dtype of a raw tensor's bytes, or of a codebook; "" for levels.
        group_size: weights per group; 0 for tensors without levels.
        min_bits: the bitwidth that the bit map counts from; 0 for tensors without levels.
        ranges: low and high of a grid are stored once (1) or for each group; 0 otherwise.
        constant: a grid whose parameters alone give the values; no level is stored.
        zero_point: a grid on which some level stands for exactly 0.0.
        block_size: weights per codeword; 0 without a codebook.
        codewords: number of codewords; 0 without a codebook.
        scale: of uint8 codewords.
        zero: the uint8 codeword that stands for 0.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    stored_dtype: str = ""
    group_size: int = 0
    min_bits: int = 0
    ranges: int = 0
    constant: bool = False
    zero_point: bool = False
    block_size: int = 0
    codewords: int = 0
    scale: float = 1.0
    zero: int = 0

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)

    @property
    def groups(self) -> int:
        """Groups that have a bitwidth; 0 for tensors without levels."""
        return group_count(self.numel, self.group_size) if self.group_size else 0

    @property
    def parameters(self) -> int:
        """Number of float32 parameters: the ranges or the scale."""
        return 1 if self.kind == "scaled" else 2 * self.ranges

    @property
    def blocks(self) -> int:
        """Blocks of weights that have an index; 0 without a codebook."""
        return self.numel // self.block_size if self.block_size else 0

    @property
    def element_bytes(self) -> int:
        """Bytes of the elements: a raw tensor, float parameters or a codebook."""
        return sum(part.item * part.count for part in self.parts.values())

    @property
    def decoded_bytes(self) -> int:
        """Memory that the decoded tensor needs (section 11)."""
        if self.kind == "raw":
            return self.element_bytes
        if self.kind == "product":
            words = self.codewords * self.block_size
            return 4 * (self.numel + words) + self.element_bytes + 2 * self.blocks
        return 4 * (self.numel + self.parameters) + self.groups

    @property
    def parts(self) -> dict[str, Part]:
        """The arrays that are stored, in the order of the file; empty ones are not."""
        if self.kind == "raw":
            parts = {"elements": Part(ITEM_SIZES[self.stored_dtype], self.numel)}
        elif self.kind == "product":
            words = self.codewords * self.block_size
            parts = {"codebook": Part(ITEM_SIZES[self.stored_dtype], words)}
            if self.codewords > 1:
                parts["indices"] = Part(layout.LEVELS, self.blocks, self.blocks)
        else:
            parts = {"parameters": Part(4, self.parameters)}
            if not self.constant:
                parts["levels"] = Part(layout.LEVELS, self.numel, self.group_size)
        return {name: part for name, part in parts.items() if part.count}

    def check(self) -> None:
        """Checks what does not depend on how the entry is stored (section 4).

        Raises:
            FormatError: a rule is broken.
        """
        if len(self.shape) > MAX_RANK:
            self._refuse(f"a tensor has at most {MAX_RANK} dimensions", len(self.shape))
        if math.prod(size for size in self.shape if size) > MAX_ELEMENTS:
            rule = "the product of all sizes other than 0 is at most 2**48"
            self._refuse(rule, list(self.shape))
        if self.kind == "raw":
            halved = self.stored_dtype == "float16" and self.dtype in FLOAT_DTYPES
            if self.stored_dtype != self.dtype and not halved:
                self._refuse("only floats may be stored as float16", self.stored_dtype)
            return
        if self.dtype not in FLOAT_DTYPES:
            self._refuse(f"levels decode to one of {', '.join(FLOAT_DTYPES)}", self.dtype)
        if self.kind == "product":
            self._check_codebook()
            return
        if not 1 <= self.group_size <= max(self.numel, 1):
            self._refuse(f"a group has from 1 to {max(self.numel, 1)} weights", self.group_size)
        if not 1 <= self.min_bits <= MAX_BITS:
            self._refuse(f"min_bits is from 1 to {MAX_BITS}", self.min_bits)

    def _check_codebook(self) -> None:
        if self.stored_dtype not in CODEBOOK_DTYPES:
            self._refuse(f"codewords are {', '.join(CODEBOOK_DTYPES)}", self.stored_dtype)
        try:
            check_codebook_shape(self.numel, self.block_size, self.codewords)
            check_scale_and_zero(self.stored_dtype, self.scale, self.zero)
        except FormatError as error:
            raise FormatError(f"tensor {self.name!r}: {error}") from error

    def _refuse(self, rule: str, got: object) -> NoReturn:
        raise FormatError(f"tensor {self.name!r}: {rule}, got {got}.")


def check_name(name: str) -> bytes:
    """The UTF-8 bytes of a name that a file can hold (section 4).

    Control characters are refused because names end up on terminals and in paths.

    Raises:
        FormatError: the name is empty, too long, no valid text or has control characters.
    """
    try:
        encoded = name.encode()
    except UnicodeEncodeError as error:
        raise FormatError(f"A name must be valid Unicode, got {name!r}.") from error
    if not 1 <= len(encoded) <= MAX_NAME_BYTES:
        raise FormatError(
            f"A name has from 1 to {MAX_NAME_BYTES} bytes in UTF-8, got {len(encoded)}."
        )
    if any(character < " " or character == "\x7f" for character in name):
        raise FormatError(f"A name has no control characters, got {name!r}.")
    return encoded


def entry_of(name: str, record: Record) -> Entry:
    """Describes a record.

    Raises:
        FormatError: a file cannot hold it.
    """
    if isinstance(record, RawRecord):
        entry = Entry(name, "raw", record.shape, record.dtype, record.stored_dtype)
    elif isinstance(record, ProductRecord):
        codewords, block_size = record.codebook.shape
        entry = Entry(
            name,
            "product",
            record.shape,
            record.dtype,
            record.stored_dtype,
            block_size=block_size,
            codewords=codewords,
            scale=record.scale,
            zero=record.zero,
        )
    else:
        entry = Entry(
            name,
            "scaled",
            record.shape,
            record.dtype,
            group_size=record.group_size,
            min_bits=record.min_bits,
        )
        if isinstance(record, GridRecord):
            entry = replace(
                entry,
                kind="grid",
                ranges=len(record.ranges),
                constant=record.constant,
                zero_point=record.zero_point,
            )
    entry.check()
    return entry

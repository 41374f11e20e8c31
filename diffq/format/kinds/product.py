"""A tensor as indices into a codebook: product quantization (arXiv:2004.07320, Section 3.2)."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffq.errors import FormatError
from diffq.format import bitpack
from diffq.format.dtypes import DTYPES, ITEM_SIZES, little_endian
from diffq.format.entropy import DecodedPiece
from diffq.format.kinds.base import (
    Bytes,
    Coded,
    Fields,
    Floats,
    Levels,
    QuantizedEntry,
    QuantizedRecord,
    check_quantized_dtype,
)
from diffq.format.layout import LEVELS, Part, Piece
from diffq.format.wire import Cursor, varint

#: Most codewords: an index has at most 16 bits.
MAX_CODEWORDS = 1 << 16

#: Dtypes that codewords are stored in; uint8 comes with a scale and a zero point.
CODEBOOK_DTYPES = ("uint8", "float16", "float32")

#: Bits of the scale, a float32, and the zero point of a uint8 codebook.
SCALE_BITS = 32 + 8


@dataclass(frozen=True, eq=False)
class ProductRecord(QuantizedRecord):
    """Blocks of consecutive weights, in C order, each the codeword that its index names.

    weight block = codebook[index], in float32; uint8 codewords stand for
    (codeword - zero) * scale, rounded to float32 once.

    Attributes:
        shape: the tensor's shape.
        dtype: the tensor's dtype by its torch name, such as "float32".
        codebook: uint8, float16 or float32 [codewords, block_size].
        indices: uint16 [blocks], each below the number of codewords.
        scale: of uint8 codewords, a float32; 1 for others.
        zero: the uint8 codeword that stands for 0; 0 for others.

    Raises:
        FormatError: the sizes or values contradict each other, or a weight would not be finite.
    """

    state_kinds = ("product",)

    codebook: NDArray[np.generic]
    indices: Levels
    scale: float = 1.0
    zero: int = 0

    def __post_init__(self) -> None:
        check_quantized_dtype(self.dtype)
        if self.codebook.ndim != 2:
            raise FormatError(f"A codebook has two dimensions, got {self.codebook.shape}.")
        codewords, block_size = self.codebook.shape
        check_codebook_head(self.stored_dtype, self.numel, block_size, codewords)
        check_scale_and_zero(self.stored_dtype, self.scale, self.zero)
        if self.indices.shape != (self.numel // block_size,):
            raise FormatError(
                f"A tensor of shape {self.shape} in blocks of {block_size} has one index for "
                f"each block, got {self.indices.shape}."
            )
        check_indices(self.indices, codewords)
        check_codewords(self.codebook)

    @property
    def stored_dtype(self) -> str:
        """Dtype of the codebook."""
        name: str = self.codebook.dtype.name
        return name

    @property
    def coded(self) -> Coded:
        """The indices, which share one bitwidth."""
        bits = np.full(1, index_bits(len(self.codebook)), np.uint8)
        return Coded(self.indices, bits, self.indices.size)

    @property
    def elements(self) -> Bytes:
        """The bytes of the codebook."""
        return little_endian(self.codebook)

    @property
    def parameter_bits(self) -> int:
        """Bits of the codebook, and of its scale and zero point if it has them."""
        scale = SCALE_BITS if self.stored_dtype == "uint8" else 0
        return super().parameter_bits + scale

    def stored_bits(self) -> int:
        """Equation 5 of arXiv:2004.07320 for the weights of this tensor, in bits.

        Codewords at their dtype and ceil(log2 K) bits for each block; a uint8 codebook
        takes its scale and zero point besides.
        """
        return self.parameter_bits + index_bits(len(self.codebook)) * self.indices.size

    def values(self) -> Floats:
        """The decoded weights: float32, in the tensor's shape."""
        words = codeword_values(self.codebook, self.scale, self.zero)
        return words[self.indices].reshape(self.shape)

    def entry(self, name: str) -> ProductEntry:
        """Describes the record for the index; raises FormatError if a file cannot hold it."""
        codewords, block_size = self.codebook.shape
        head = name, self.shape, self.dtype, self.stored_dtype
        return ProductEntry(*head, block_size, codewords, self.scale, self.zero)

    def fields(self, packed: bool) -> dict[str, Any]:
        """Codebook and indices."""
        width = index_bits(len(self.codebook))
        if packed:
            indices = bitpack.pack(self.indices, width) if width else np.empty(0, np.uint8)
        else:
            indices = self.indices.astype(np.int32)
        head = {"kind": "product", "packed": packed, "codebook": self.codebook, "indices": indices}
        if self.stored_dtype != "uint8":
            return head
        return {**head, "scale": np.array([self.scale], np.float32), "zero": self.zero}

    @classmethod
    def from_fields(cls, fields: Fields) -> ProductRecord:
        """Inverse of `fields`."""
        codebook, numel = fields.array("codebook", 2, *CODEBOOK_DTYPES), math.prod(fields.shape)
        codewords, block_size = codebook.shape
        check_codebook_head(codebook.dtype.name, numel, block_size, codewords)
        indices = _read_indices(fields, numel // block_size, codewords)
        if codebook.dtype != np.uint8:
            return cls(fields.shape, fields.dtype, codebook, indices)
        scale = fields.array("scale", 1, "float32")
        if scale.size != 1:
            raise FormatError(f"uint8 codewords have one scale, got {scale.size}.")
        zero = fields.number("zero")
        return cls(fields.shape, fields.dtype, codebook, indices, float(scale[0]), zero)


@dataclass(frozen=True)
class ProductEntry(QuantizedEntry):
    """What the index says about a tensor of indices into a codebook.

    Attributes:
        stored_dtype: the dtype of the codebook.
        block_size: weights per codeword.
        codewords: number of codewords.
        scale: of uint8 codewords.
        zero: the uint8 codeword that stands for 0.
    """

    kind = "product"
    record_type = ProductRecord

    stored_dtype: str
    block_size: int
    codewords: int
    scale: float = 1.0
    zero: int = 0

    @classmethod
    def read(cls, cursor: Cursor, where: str) -> dict[str, Any]:
        """Reads dtype, block size, codewords and, of uint8 codewords, scale and zero point."""
        fields: dict[str, Any] = {
            "stored_dtype": DTYPES[cursor.code(len(DTYPES), "stored dtype", where)],
            "block_size": cursor.varint("the block size"),
            "codewords": cursor.varint("the codewords"),
        }
        if fields["stored_dtype"] == "uint8":
            scale = struct.unpack("<fB", cursor.take(5, "a scale and a zero point"))
            fields |= dict(zip(("scale", "zero"), scale, strict=True))
        return fields

    def write(self) -> bytes:
        """Inverse of `read`."""
        scale = struct.pack("<fB", self.scale, self.zero) if self.stored_dtype == "uint8" else b""
        head = bytes([DTYPES.index(self.stored_dtype)])
        return head + varint(self.block_size) + varint(self.codewords) + scale

    def check(self) -> None:
        """Raises FormatError if the description alone breaks a rule."""
        super().check()
        check_codebook_head(self.stored_dtype, self.numel, self.block_size, self.codewords)
        check_scale_and_zero(self.stored_dtype, self.scale, self.zero)

    @property
    def integers(self) -> int:
        """One index for each block of weights."""
        return self.numel // self.block_size

    @property
    def arrays(self) -> list[Part]:
        """The codebook and, of more than one codeword, the indices."""
        words = Part(ITEM_SIZES[self.stored_dtype], self.codewords * self.block_size)
        indices = Part(LEVELS, self.integers, self.integers)
        return [words, *([indices] if self.codewords > 1 else [])]

    @property
    def decoded_bytes(self) -> int:
        """Memory that the decoded tensor needs (section 11)."""
        words = self.codewords * self.block_size
        return super().decoded_bytes + 4 * words + 2 * self.integers

    def check_elements(self, elements: Bytes) -> None:
        """Raises FormatError for codewords that are not finite."""
        check_codewords(self._codebook(elements))

    def check_piece(self, decoded: DecodedPiece, elements: Bytes) -> None:
        """Raises FormatError for indices of another bitwidth, or that name no codeword."""
        width = index_bits(self.codewords)
        if list(decoded.streams) != [width]:
            raise FormatError(
                f"indices of {self.codewords} codewords have {width} bits, "
                f"got {max(decoded.streams)}."
            )
        check_indices(decoded.streams[width], self.codewords)

    def decode(self, elements: Bytes, piece: Piece, decoded: DecodedPiece, out: Floats) -> None:
        """Writes the codewords that the indices name."""
        (indices,) = decoded.streams.values()
        blocks = out.reshape(-1, self.block_size)
        # With a mode other than "raise", NumPy writes to `out` without a copy.
        np.take(self._words(elements), indices, axis=0, out=blocks, mode="clip")

    def fill(self, elements: Bytes, out: Floats) -> None:
        """Writes the only codeword to every block."""
        out.reshape(-1, self.block_size)[:] = self._words(elements)

    def record(self, elements: Bytes, levels: Levels, bits: Bytes) -> ProductRecord:
        """The record."""
        codebook = self._codebook(elements)
        return ProductRecord(self.shape, self.dtype, codebook, levels, self.scale, self.zero)

    def _codebook(self, elements: Bytes) -> NDArray[Any]:
        """The codewords as they are stored, [codewords, block_size]."""
        stored = np.dtype(self.stored_dtype)
        words: NDArray[Any] = elements.view(stored.newbyteorder("<")).astype(stored, copy=False)
        return words.reshape(-1, self.block_size)

    def _words(self, elements: Bytes) -> Floats:
        """The codewords that the stored ones stand for."""
        return codeword_values(self._codebook(elements), self.scale, self.zero)


def _read_indices(fields: Fields, blocks: int, codewords: int) -> Levels:
    if not fields.flag("packed"):
        # As unsigned numbers, those below zero are too large.
        spelled = fields.array("indices", 1, "int32").view(np.uint32)
        check_indices(spelled, codewords)
        return spelled.astype(np.uint16)
    packed, width = fields.array("indices", 1, "uint8"), index_bits(codewords)
    if width:
        return bitpack.unpack(packed, blocks, width)
    if packed.size:
        raise FormatError(f"A single codeword needs no indices, got {packed.size} bytes.")
    return np.zeros(blocks, np.uint16)


def index_bits(codewords: int) -> int:
    """Bits of an index among so many codewords: log2, rounded up."""
    return (codewords - 1).bit_length()


def codeword_values(codebook: NDArray[np.generic], scale: float, zero: int) -> Floats:
    """The codewords that a stored codebook stands for, float32 of the same shape."""
    words = codebook.astype(np.float32)
    if codebook.dtype == np.uint8:
        words -= np.float32(zero)
        words *= np.float32(scale)
    return words


def check_codebook_head(stored_dtype: str, numel: int, block_size: int, codewords: int) -> None:
    """Checks that blocks fill a tensor, and that it has as many as codewords.

    Raises:
        FormatError: a rule of docs/format.md, section 4, is broken.
    """
    if stored_dtype not in CODEBOOK_DTYPES:
        raise FormatError(f"Stored codewords are {', '.join(CODEBOOK_DTYPES)}, got {stored_dtype}.")
    if block_size < 1 or numel % block_size:
        raise FormatError(
            f"Blocks must divide a tensor's {numel} weights, got blocks of {block_size}."
        )
    most = min(numel // block_size, MAX_CODEWORDS)
    if not 1 <= codewords <= most:
        raise FormatError(f"The tensor has from 1 to {most} codewords, got {codewords}.")


def check_scale_and_zero(stored_dtype: str, scale: float, zero: int) -> None:
    """Checks that every uint8 codeword decodes to a finite number.

    Raises:
        FormatError: a scale that is not finite, negative or too large, or a zero point
            beyond 0 to 255.
    """
    if stored_dtype != "uint8":
        if (scale, zero) != (1.0, 0):
            raise FormatError(
                f"Only uint8 codewords have a scale and a zero point, got {scale} and {zero}."
            )
        return
    largest = float(np.finfo(np.float32).max) / 256
    sound = 0 <= scale <= largest and float(np.float32(scale)) == scale
    if not sound or not 0 <= zero <= 255:
        raise FormatError(
            f"uint8 codewords have a float32 scale from 0 to {largest:.8g} and a zero point from "
            f"0 to 255, got {scale} and {zero}."
        )


def check_indices(indices: NDArray[np.generic], codewords: int) -> None:
    """Raises FormatError for an index that names no codeword."""
    if int(indices.max(initial=0)) >= codewords:
        raise FormatError(f"Indices must be below {codewords}, got {indices.max()}.")


def check_codewords(codebook: NDArray[np.generic]) -> None:
    """Raises FormatError for codewords that are not finite."""
    if not np.isfinite(codebook).all():
        raise FormatError("Codewords must be finite, got NaN or Inf.")

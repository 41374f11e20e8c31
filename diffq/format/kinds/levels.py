"""Integer levels with one bitwidth per group: what grids and scaled tensors share."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from diffq.errors import FormatError
from diffq.format import bitpack
from diffq.format.dtypes import little_endian
from diffq.format.entropy import DecodedPiece
from diffq.format.groups import (
    group_count,
    merge_levels,
    stream_counts,
)
from diffq.format.kinds.affine import Affine
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
from diffq.format.layout import LEVELS, Part
from diffq.format.wire import Cursor, varint

#: Largest magnitude of a grid's low, high and high - low. Below the largest float32 by
#: more than the roundings of `level * step + low`, so that no level decodes to infinity.
MAX_RANGE = float(np.finfo(np.float32).max) * (1 - 2**-20)

#: Bits that Equation 12 of the DiffQ paper (arXiv:2104.09987) gives to the width of a bit map.
WIDTH_BITS = 8

#: Largest bitwidth of a level.
MAX_BITS = 15

#: A bit map tells the bitwidths 1 to 15 apart.
MAX_MAP_WIDTH = 4


def map_width(bits: Bytes, min_bits: int) -> int:
    """Bits per group of the bit map: max(C) of Equation 12, in whole bits.

    C = log2(1 + b - b_min); the width is rounded up so that `b - b_min` fits.
    """
    return int(bits.max() - min_bits).bit_length() if bits.size else 0


def level_bits(bits: Bytes, group_size: int, numel: int, min_bits: int) -> int:
    """Bits of a tensor's levels and bit map: Equation 12 without its constants.

    Args:
        bits: uint8 [groups], the bitwidth of each group.
        group_size: weights per group; the last group may be short.
        numel: weights of the tensor.
        min_bits: the bitwidth that the bit map counts from.
    """
    counts = stream_counts(bits, group_size, numel)
    levels = sum(width * count for width, count in counts.items())
    return bits.size * map_width(bits, min_bits) + levels


def check_level_head(numel: int, dtype: str, group_size: int, min_bits: int) -> None:
    """Checks what a tensor of levels says before any of them is there.

    Raises:
        FormatError: it has no such dtype, groups or bitwidths.
    """
    check_quantized_dtype(dtype)
    if not 1 <= group_size <= max(numel, 1):
        raise FormatError(f"The group size is from 1 to {max(numel, 1)} weights, got {group_size}.")
    if not 1 <= min_bits <= MAX_BITS:
        raise FormatError(f"min_bits is from 1 to {MAX_BITS}, got {min_bits}.")


def check_level_sizes(numel: int, group_size: int, bits: Bytes, levels: Levels) -> None:
    """Raises FormatError unless each group has a bitwidth and each weight a level."""
    groups = group_count(numel, group_size)
    if bits.shape != (groups,) or levels.shape != (numel,):
        raise FormatError(
            f"{numel} weights in groups of {group_size} have {groups} bitwidths and {numel} "
            f"levels, got {bits.shape} and {levels.shape}."
        )


@dataclass(frozen=True, eq=False)
class LevelRecord(QuantizedRecord):
    """Integer levels with one bitwidth per group of consecutive weights.

    Attributes:
        shape: the tensor's shape.
        dtype: the tensor's dtype by its torch name, such as "float32".
        group_size: weights per group of the flattened tensor.
        min_bits: the bitwidth that the bit map counts from.
        bits: uint8 [groups], from `min_bits` to 15.
        levels: uint16 [weights] in C order, each below 2**bits of its group.

    Raises:
        FormatError: the sizes, bitwidths or values contradict each other.
    """

    #: Whether a level is worth its entropy, because no bitwidth was chosen for it.
    by_entropy: ClassVar[bool] = False

    group_size: int
    min_bits: int
    bits: Bytes
    levels: Levels

    def __post_init__(self) -> None:
        check_level_head(self.numel, self.dtype, self.group_size, self.min_bits)
        check_level_sizes(self.numel, self.group_size, self.bits, self.levels)
        if self.bits.size and not self.min_bits <= self.bits.min() <= self.bits.max() <= MAX_BITS:
            raise FormatError(
                f"Bitwidths must be from {self.min_bits} to {MAX_BITS}, "
                f"got {self.bits.min()} to {self.bits.max()}."
            )

    @property
    @abstractmethod
    def parameters(self) -> NDArray[Any]:
        """Ranges, scales or steps, in the dtype that files hold."""

    @property
    def constant(self) -> bool:
        """Whether the parameters alone give the values, so that no level is stored."""
        return False

    @property
    def per_group(self) -> bool:
        """Whether groups of one bitwidth have parameters of their own."""
        return False

    @abstractmethod
    def affine(self, bits: Bytes) -> Affine:
        """How levels are decoded.

        Args:
            bits: uint8, the bitwidth of each group; if not `per_group`, any bitwidths.
        """

    def values(self) -> Floats:
        """The decoded weights: float32, in the tensor's shape."""
        values = self.levels.astype(np.float32)
        self.affine(self.bits).apply(values, self.group_size)
        return values.reshape(self.shape)

    @property
    def elements(self) -> Bytes:
        """The bytes of the parameters."""
        return little_endian(self.parameters)

    @property
    def coded(self) -> Coded | None:
        """The levels; None for a constant."""
        if self.constant:
            return None
        columns = self.numel // self.shape[0] if len(self.shape) > 1 and self.numel else 0
        return Coded(self.levels, self.bits, self.group_size, columns)

    def stored_bits(self) -> int:
        """Equation 12 of the DiffQ paper for this tensor, in bits."""
        overhead = self.parameter_bits + WIDTH_BITS
        if self.constant:
            return overhead
        return overhead + level_bits(self.bits, self.group_size, self.numel, self.min_bits)

    def fields(self, packed: bool) -> dict[str, Any]:
        """Group size, bitwidths and levels."""
        head = {"group_size": self.group_size, "min_bits": self.min_bits, "packed": packed}
        return head | (self._packed() if packed else self._spelled())

    def _packed(self) -> dict[str, Any]:
        streams = self.coded.streams() if self.coded else {}
        packed = [bitpack.pack(levels, width) for width, levels in streams.items()]
        width = 0 if self.constant else map_width(self.bits, self.min_bits)
        offsets = self.bits - np.uint8(self.min_bits)
        return {
            "map_width": width,
            "bit_map": bitpack.pack(offsets, width) if width else offsets[:0],
            # Without a map, all groups share one bitwidth.
            "bits": int(self.bits[0]) if self.bits.size else self.min_bits,
            "levels": np.concatenate([*packed, np.empty(0, np.uint8)]),
        }

    def _spelled(self) -> dict[str, Any]:
        return {"bit_map": self.bits, "levels": self.levels.astype(np.int16)}


def read_levels(fields: Fields, constant: bool) -> dict[str, Any]:
    """Inverse of `LevelRecord.fields`: the arguments of the record.

    Args:
        fields: the fields of the state.
        constant: the parameters alone give the values.

    Raises:
        StateError: a field is missing or of another type.
        FormatError: the fields contradict each other.
    """
    group_size, min_bits = fields.number("group_size"), fields.number("min_bits")
    numel = math.prod(fields.shape)
    check_level_head(numel, fields.dtype, group_size, min_bits)
    if fields.flag("packed"):
        packed = fields.array("levels", 1, "uint8")
        if not constant and 8 * packed.size < numel:
            raise FormatError(f"{numel} weights need more bytes of levels, got {packed.size}.")
        bits = _unpack_bits(fields, group_count(numel, group_size), min_bits)
        counts = {} if constant else stream_counts(bits, group_size, numel)
        levels = merge_levels(_unpack_levels(packed, counts), bits, group_size, numel)
    else:
        bits = fields.array("bit_map", 1, "uint8")
        levels = fields.array("levels", 1, "int16").view(np.uint16)
        check_level_sizes(numel, group_size, bits, levels)
        limits = np.repeat(np.uint32(1) << bits.astype(np.uint32), group_size)[:numel]
        if (levels >= limits).any():
            raise FormatError(f"Each level is below 2**bits of its group, got {levels.max()}.")
    head = {"group_size": group_size, "min_bits": min_bits}
    return {"shape": fields.shape, "dtype": fields.dtype, **head, "bits": bits, "levels": levels}


def _unpack_bits(fields: Fields, groups: int, min_bits: int) -> Bytes:
    width, shared = fields.number("map_width"), fields.number("bits")
    bit_map = fields.array("bit_map", 1, "uint8")
    if not (0 <= width <= MAX_MAP_WIDTH and 1 <= shared <= MAX_BITS):
        raise FormatError(
            f"A map_width is from 0 to {MAX_MAP_WIDTH} and bits from 1 to {MAX_BITS}, "
            f"got {width} and {shared}."
        )
    if not width:
        return np.full(groups, shared, np.uint8)
    return (bitpack.unpack(bit_map, groups, width) + min_bits).astype(np.uint8)


def _unpack_levels(packed: Bytes, counts: Mapping[int, int]) -> dict[int, Levels]:
    streams, offset = {}, 0
    for width, count in counts.items():
        size = bitpack.packed_size(count, width)
        streams[width] = bitpack.unpack(packed[offset : offset + size], count, width)
        offset += size
    if offset != packed.size:
        raise FormatError(f"The levels need {offset} bytes, got {packed.size}.")
    return streams


@dataclass(frozen=True)
class LevelEntry(QuantizedEntry):
    """What the index says about a tensor of levels.

    Attributes:
        group_size: weights per group.
        min_bits: the bitwidth that the bit map counts from.
        constant: the parameters alone give the values; no level is stored.
        parameter_bytes: size of one parameter.
    """

    parameter_bytes: ClassVar[int] = 4

    group_size: int
    min_bits: int
    constant: bool = False

    @classmethod
    def read(cls, cursor: Cursor, where: str) -> dict[str, Any]:
        """Reads group size and lowest bitwidth."""
        group_size, min_bits = cursor.varint("a group size"), cursor.fixed(1, "min_bits")
        return {"group_size": group_size, "min_bits": min_bits}

    def write(self) -> bytes:
        """Inverse of `read`."""
        return varint(self.group_size) + bytes([self.min_bits])

    def check(self) -> None:
        """Raises FormatError if the description alone breaks a rule."""
        super().check()
        check_level_head(self.numel, self.dtype, self.group_size, self.min_bits)

    @property
    def groups(self) -> int:
        """Groups that have a bitwidth."""
        return group_count(self.numel, self.group_size)

    @property
    @abstractmethod
    def parameters(self) -> int:
        """Number of parameters."""

    @property
    def arrays(self) -> list[Part]:
        """The parameters and, unless constant, the levels."""
        levels = Part(LEVELS, self.numel, self.group_size)
        return [Part(self.parameter_bytes, self.parameters), *([] if self.constant else [levels])]

    @property
    def integers(self) -> int:
        """One level for each weight."""
        return self.numel

    @property
    def decoded_bytes(self) -> int:
        """Memory that the decoded tensor needs (section 11)."""
        return super().decoded_bytes + self.groups

    def check_piece(self, decoded: DecodedPiece, elements: Bytes) -> None:
        """Raises FormatError for a bitwidth below the tensor's minimum or above 15."""
        if min(decoded.streams) < self.min_bits:
            raise FormatError(
                f"bitwidths are at least {self.min_bits}, got {min(decoded.streams)}."
            )
        if max(decoded.streams) > MAX_BITS:
            raise FormatError(
                f"bitwidths of levels are at most {MAX_BITS}, got {max(decoded.streams)}."
            )

    def head(self, levels: Levels, bits: Bytes) -> dict[str, Any]:
        """What the records of all kinds of levels have; `min_bits` where no level is stored."""
        return {
            "shape": self.shape,
            "dtype": self.dtype,
            "group_size": self.group_size,
            "min_bits": self.min_bits,
            "bits": bits if bits.size else np.full(self.groups, self.min_bits, np.uint8),
            "levels": levels,
        }


def float_parameters(elements: Bytes) -> Floats:
    """The float32 parameters whose bytes are stored."""
    parameters: Floats = elements.view("<f4").astype(np.float32, copy=False)
    return parameters

"""One stored tensor as integers: what a quantized state and a file are made of.

A record is frozen NumPy data that says everything about one tensor, without the
module that made it. It decodes itself with `values()`, and counts its own bits
with `stored_bits()`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffq.errors import FormatError
from diffq.format.groups import merge_groups, split_groups
from diffq.format.groups import stream_counts as stream_counts
from diffq.format.product import ProductRecord

#: Bits that Equation 12 of the DiffQ paper (arXiv:2104.09987) gives to a tensor's
#: minimum and maximum, and to the width of its bit map.
RANGE_BITS = 2 * 32

#: Largest magnitude of a grid's low, high and high - low. Below the largest float32 by
#: more than the roundings of `level * step + low`, so that no level decodes to infinity.
MAX_RANGE = float(np.finfo(np.float32).max) * (1 - 2**-20)
WIDTH_BITS = 8

#: Largest bitwidth of a level.
MAX_BITS = 15


def group_count(numel: int, group_size: int) -> int:
    """Number of groups of `group_size` consecutive weights; the last may be short."""
    return -(-numel // group_size)


def map_width(bits: NDArray[np.uint8], min_bits: int) -> int:
    """Bits per group of the bit map: max(C) of Equation 12, in whole bits.

    C = log2(1 + b - b_min); the width is rounded up so that `b - b_min` fits.
    """
    return int(bits.max() - min_bits).bit_length() if bits.size else 0


def level_bits(bits: NDArray[np.uint8], group_size: int, numel: int, min_bits: int) -> int:
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


@dataclass(frozen=True, eq=False)
class LevelRecord(ABC):
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

    shape: tuple[int, ...]
    dtype: str
    group_size: int
    min_bits: int
    bits: NDArray[np.uint8]
    levels: NDArray[np.uint16]

    def __post_init__(self) -> None:
        if not 1 <= self.group_size <= max(self.numel, 1):
            raise FormatError(
                f"The group size must be from 1 to the tensor's {self.numel} weights, "
                f"got {self.group_size}."
            )
        if not 1 <= self.min_bits <= MAX_BITS:
            raise FormatError(f"min_bits must be from 1 to 15, got {self.min_bits}.")
        groups = group_count(self.numel, self.group_size)
        if self.bits.shape != (groups,) or self.levels.shape != (self.numel,):
            raise FormatError(
                f"A tensor of shape {self.shape} in groups of {self.group_size} has {groups} "
                f"bitwidths and {self.numel} levels, got {self.bits.shape} and {self.levels.shape}."
            )
        if groups and not self.min_bits <= self.bits.min() <= self.bits.max() <= MAX_BITS:
            raise FormatError(
                f"Bitwidths must be from {self.min_bits} to {MAX_BITS}, "
                f"got {self.bits.min()} to {self.bits.max()}."
            )

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def constant(self) -> bool:
        """Whether the parameters alone give the values, so that no level is stored."""
        return False

    @property
    @abstractmethod
    def parameter_bits(self) -> int:
        """Bits of the float parameters of the grid."""

    @abstractmethod
    def values(self) -> NDArray[np.float32]:
        """The decoded weights: float32, in the tensor's shape."""

    def stored_bits(self) -> int:
        """Equation 12 of the DiffQ paper for this tensor, in bits."""
        overhead = self.parameter_bits + WIDTH_BITS
        if self.constant:
            return overhead
        return overhead + level_bits(self.bits, self.group_size, self.numel, self.min_bits)

    def per_weight(self, per_group: NDArray[np.float32]) -> NDArray[np.float32]:
        """Repeats one value per group (or one for all) for each of its weights."""
        if per_group.size == 1:
            return per_group
        return np.repeat(per_group, self.group_size)[: self.numel]


@dataclass(frozen=True, eq=False)
class GridRecord(LevelRecord):
    """Levels on an even grid from a minimum to a maximum (Equation 1 of the DiffQ paper).

    value = level * step + low, with step = (high - low) / (2**bits - 1), each
    operation rounded to float32. With a zero point see `zero_points`.

    Attributes:
        ranges: float32 [1, 2] or [groups, 2], low and high of the tensor or of each group.
        zero_point: some level stands for exactly 0.0, wherever low <= 0 <= high.
    """

    ranges: NDArray[np.float32]
    zero_point: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if (
            self.ranges.ndim != 2
            or self.ranges.shape[1] != 2
            or len(self.ranges) not in (1, self.bits.size)
        ):
            raise FormatError(
                f"A grid has 1 or {self.bits.size} ranges of low and high, "
                f"got shape {self.ranges.shape}."
            )
        check_ranges(self.ranges)
        if self.zero_point and self.constant:
            raise FormatError("A constant tensor has no levels, and no zero point among them.")

    @property
    def constant(self) -> bool:
        """Whether low equals high everywhere."""
        return bool((self.ranges[:, 0] == self.ranges[:, 1]).all())

    @property
    def parameter_bits(self) -> int:
        """Two float32 for each range."""
        return RANGE_BITS * len(self.ranges)

    def values(self) -> NDArray[np.float32]:
        """The decoded weights: float32, in the tensor's shape."""
        low, high = self.ranges.T
        top = ((np.uint32(1) << self.bits.astype(np.uint32)) - np.uint32(1)).astype(np.float32)
        step = ((high - low) / top).astype(np.float32)
        values = self.levels.astype(np.float32)
        if self.zero_point:
            zero, low = zero_points(low, high, top)
            values -= self.per_weight(zero)
        values *= self.per_weight(step)
        values += self.per_weight(low)
        return values.reshape(self.shape)


@dataclass(frozen=True, eq=False)
class ScaledRecord(LevelRecord):
    """Levels around zero times a scale (LSQ, arXiv:1902.08153).

    value = (level - 2**(bits - 1)) * scale in float32.

    Attributes:
        scale: float32 [1].
    """

    scale: NDArray[np.float32]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scale(self.scale, int(self.bits.max(initial=1)))

    @property
    def parameter_bits(self) -> int:
        """One float32."""
        return 32

    def values(self) -> NDArray[np.float32]:
        """The decoded weights: float32, in the tensor's shape."""
        zero = (np.uint32(1) << (self.bits.astype(np.uint32) - np.uint32(1))).astype(np.float32)
        values = self.levels.astype(np.float32)
        values -= self.per_weight(zero)
        values *= self.scale
        return values.reshape(self.shape)


def zero_points(
    low: NDArray[np.float32], high: NDArray[np.float32], top: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The level that stands for zero, and what is added to all values (docs/format.md, section 10).

    value = (level - zero) * step + added. Where 0 is outside of the range, the level is 0, and
    low is added.

    Args:
        low: minimum, [1] or [groups].
        high: maximum, like `low`.
        top: the highest level, 2**bits - 1, [1] or [groups].
    """
    one, none = np.float32(1), np.float32(0)
    step = (high - low) / top
    level = np.minimum(np.rint(-low / np.where(step > 0, step, one)), top)
    inside = (low <= 0) & (high >= 0)
    return np.where(inside, level, none), np.where(inside, none, low)


def check_ranges(ranges: NDArray[np.float32]) -> None:
    """Checks that every level of a grid decodes to a finite number.

    Args:
        ranges: low and high, [..., 2].

    Raises:
        FormatError: low above high, or a number that is not finite or too large.
    """
    # Before any arithmetic: NumPy warns when it converts a signaling NaN.
    if not np.isfinite(ranges).all() or (ranges[..., 0] > ranges[..., 1]).any():
        raise FormatError("A grid's ranges must be finite, with low at most high.")
    low, high = ranges[..., 0].astype(np.float64), ranges[..., 1].astype(np.float64)
    largest = np.maximum(high - low, np.maximum(abs(low), abs(high))).max(initial=0)
    if largest > MAX_RANGE:
        raise FormatError(
            f"A grid's low, high and high - low must be at most {MAX_RANGE:.8g} in magnitude, "
            f"got {largest:.8g}: decoding could overflow float32."
        )


def check_scale(scale: NDArray[np.float32], bits: int) -> None:
    """Checks that every level of up to `bits` bits decodes to a finite number.

    Raises:
        FormatError: not one scale, or one that is not finite or too large.
    """
    largest = MAX_RANGE / 2 ** (bits - 1)
    if scale.shape != (1,) or not abs(float(scale[0])) <= largest:
        raise FormatError(f"A scaled tensor has one scale of at most {largest:.8g}, got {scale}.")


def split_levels(record: Coded) -> dict[int, NDArray[np.uint16]]:
    """The levels or indices of each bitwidth in use, in the order of their weights.

    Returns:
        bitwidth -> uint16 levels, by rising bitwidth; empty for a constant tensor.
    """
    if record.constant:
        return {}
    return split_groups(record.levels, record.bits, record.group_size)


def merge_levels(
    streams: dict[int, NDArray[np.uint16]], bits: NDArray[np.uint8], group_size: int, numel: int
) -> NDArray[np.uint16]:
    """Inverse of `split_levels`; zeros where there are no streams."""
    levels = np.zeros(numel, np.uint16)
    if streams:
        counts = stream_counts(bits, group_size, numel)
        merge_groups(
            bits, counts, group_size, levels, lambda width, part: np.copyto(part, streams[width])
        )
    return levels


#: Records whose integers are entropy-coded: levels, or indices of codewords.
Coded = LevelRecord | ProductRecord

#: Everything that a state or a file can hold under one name.
Record = RawRecord | GridRecord | ScaledRecord | ProductRecord

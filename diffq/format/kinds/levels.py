"""Records of integer levels: what grids and scaled tensors share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffq.errors import FormatError
from diffq.format.groups import group_count, stream_counts

#: Largest magnitude of a grid's low, high and high - low. Below the largest float32 by
#: more than the roundings of `level * step + low`, so that no level decodes to infinity.
MAX_RANGE = float(np.finfo(np.float32).max) * (1 - 2**-20)

#: Bits that Equation 12 of the DiffQ paper (arXiv:2104.09987) gives to the width of a bit map.
WIDTH_BITS = 8

#: Largest bitwidth of a level.
MAX_BITS = 15


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

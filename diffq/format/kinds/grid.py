"""Levels on an even grid from a minimum to a maximum."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffq.errors import FormatError
from diffq.format.kinds.levels import MAX_RANGE, LevelRecord

#: Bits that Equation 12 of the DiffQ paper gives to a minimum and a maximum.
RANGE_BITS = 2 * 32


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

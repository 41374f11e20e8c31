"""Levels around zero times a scale."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffq.errors import FormatError
from diffq.format.kinds.levels import MAX_RANGE, LevelRecord


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


def check_scale(scale: NDArray[np.float32], bits: int) -> None:
    """Checks that every level of up to `bits` bits decodes to a finite number.

    Raises:
        FormatError: not one scale, or one that is not finite or too large.
    """
    largest = MAX_RANGE / 2 ** (bits - 1)
    if scale.shape != (1,) or not abs(float(scale[0])) <= largest:
        raise FormatError(f"A scaled tensor has one scale of at most {largest:.8g}, got {scale}.")

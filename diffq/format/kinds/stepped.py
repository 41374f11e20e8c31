"""Levels around zero times a step for each group of weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffq.errors import FormatError
from diffq.format.dtypes import little_endian
from diffq.format.entropy import DecodedPiece
from diffq.format.kinds.base import Bytes, Fields, Floats, Levels
from diffq.format.kinds.levels import LevelEntry, LevelRecord, read_levels, repeat
from diffq.format.layout import Part, Piece

Steps = NDArray[np.int16]

#: A step is 2**(number / 4), in quarter octaves.
PER_OCTAVE = 4

#: Lowest and highest number of a step: from the least normal float32 to steps of which even the
#: farthest level of 15 bits decodes to a finite float32.
FIRST_STEP, LAST_STEP = -126 * PER_OCTAVE, 113 * PER_OCTAVE - 1

# 2**(i / 4) for i from 0 to 3, rounded to float32.
_ROOTS = np.array([0x3F800000, 0x3F9837F0, 0x3FB504F3, 0x3FD744FD], np.uint32).view(np.float32)

#: The step of each number from `FIRST_STEP` on, float32. Exact products: powers of two.
STEPS: Floats = np.ldexp(
    np.tile(_ROOTS, (LAST_STEP - FIRST_STEP + 1) // PER_OCTAVE),
    np.arange(FIRST_STEP, LAST_STEP + 1) // PER_OCTAVE,
).astype(np.float32)

# Bits of the number of a step.
_STEP_BYTES = 2


@dataclass(frozen=True, eq=False)
class SteppedRecord(LevelRecord):
    """Levels around zero, times a step that a group of weights shares.

    value = (level - 2**(bits - 1)) * 2**(step / 4) in float32.

    Attributes:
        steps: int16 [groups], from `FIRST_STEP` to `LAST_STEP`.
    """

    state_kinds = ("stepped",)

    steps: Steps

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps.shape != self.bits.shape:
            raise FormatError(
                f"{self.bits.size} groups have as many steps, got shape {self.steps.shape}."
            )
        check_steps(self.steps)

    @property
    def parameters(self) -> Floats:
        """The steps themselves."""
        return step_values(self.steps)

    @property
    def elements(self) -> Bytes:
        """The bytes of the numbers of the steps."""
        return little_endian(self.steps)

    def values(self) -> Floats:
        """The decoded weights: float32, in the tensor's shape."""
        values = self.levels.astype(np.float32)
        _scale(values, self.steps, self.bits, self.group_size)
        return values.reshape(self.shape)

    def entry(self, name: str) -> SteppedEntry:
        """Describes the record for the index; raises FormatError if a file cannot hold it."""
        return SteppedEntry(name, self.shape, self.dtype, self.group_size, self.min_bits)

    def fields(self, packed: bool) -> dict[str, Any]:
        """Levels and steps."""
        return {**super().fields(packed), "kind": "stepped", "steps": self.steps}

    @classmethod
    def from_fields(cls, fields: Fields) -> SteppedRecord:
        """Inverse of `fields`."""
        steps = fields.array("steps", 1, "int16")
        return cls(**read_levels(fields, constant=False), steps=steps)


@dataclass(frozen=True)
class SteppedEntry(LevelEntry):
    """What the index says about a tensor with a step for each group."""

    kind = "stepped"
    record_type = SteppedRecord
    minor = 1

    @property
    def parameters(self) -> int:
        """One step for each group."""
        return self.groups

    @property
    def arrays(self) -> list[Part]:
        """The steps and the levels."""
        _, *levels = super().arrays
        return [Part(_STEP_BYTES, self.parameters), *levels]

    def check_elements(self, elements: Bytes) -> None:
        """Raises FormatError for a step out of range."""
        check_steps(_steps(elements))

    def decode(self, elements: Bytes, piece: Piece, decoded: DecodedPiece, out: Floats) -> None:
        """Writes what `SteppedRecord.values` computes."""
        decoded.merge(piece.group_size, out)
        _scale(out, _steps(elements)[piece.groups], decoded.bits, piece.group_size)

    def fill(self, elements: Bytes, out: Floats) -> None:
        """Writes nothing: only a tensor without weights has no levels."""

    def record(self, elements: Bytes, levels: Levels, bits: Bytes) -> SteppedRecord:
        """The record."""
        return SteppedRecord(**self.head(levels, bits), steps=_steps(elements))


def step_values(steps: Steps) -> Floats:
    """The steps of some numbers, float32 of the same shape."""
    values: Floats = STEPS[steps.astype(np.int64) - FIRST_STEP]
    return values


def check_steps(steps: Steps) -> None:
    """Raises FormatError for a number of a step that is out of range."""
    if steps.size and not FIRST_STEP <= steps.min() <= steps.max() <= LAST_STEP:
        raise FormatError(
            f"Steps have the numbers {FIRST_STEP} to {LAST_STEP}, "
            f"got {steps.min()} to {steps.max()}."
        )


def _steps(elements: Bytes) -> Steps:
    steps: Steps = elements.view("<i2").astype(np.int16, copy=False)
    return steps


def _scale(levels: Floats, steps: Steps, bits: Bytes, group_size: int) -> None:
    """Turns levels into the values that they stand for, in place."""
    zero = (np.uint32(1) << (bits.astype(np.uint32) - np.uint32(1))).astype(np.float32)
    levels -= repeat(zero, group_size, levels.size)
    levels *= repeat(step_values(steps), group_size, levels.size)

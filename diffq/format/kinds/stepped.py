"""Levels around zero times a step for each group of weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffq.errors import FormatError
from diffq.format.entropy import DecodedPiece, entropy_bits
from diffq.format.groups import merge_groups
from diffq.format.kinds.affine import Affine
from diffq.format.kinds.base import Bytes, Fields, Floats, Levels
from diffq.format.kinds.levels import LevelEntry, LevelRecord, read_levels
from diffq.format.layout import Piece

Steps = NDArray[np.int16]

#: A step is 2**(number / 4), in quarter octaves.
PER_OCTAVE = 4

#: Lowest and highest number of a step: the least normal float32, and a step with which even the
#: farthest level of 15 bits decodes to a finite float32.
FIRST_STEP, LAST_STEP = -126 * PER_OCTAVE, 113 * PER_OCTAVE - 1

# 2**(i / 4) for i from 0 to 3, rounded to float32 (docs/format.md, section 10).
_ROOTS = np.array([0x3F800000, 0x3F9837F0, 0x3FB504F3, 0x3FD744FD], np.uint32).view(np.float32)

#: The step of each number from `FIRST_STEP` on, float32. Exact products: powers of two.
STEPS: Floats = np.ldexp(
    np.tile(_ROOTS, (LAST_STEP - FIRST_STEP + 1) // PER_OCTAVE),
    np.arange(FIRST_STEP, LAST_STEP + 1) // PER_OCTAVE,
)

# Groups that are scaled at a time: groups may have one weight, which a hostile file must not
# make more memory of.
_BLOCK = 1 << 14


@dataclass(frozen=True, eq=False)
class SteppedRecord(LevelRecord):
    """Levels around zero, times a step that a group of weights shares.

    value = (level - 2**(bits - 1)) * 2**(step / 4) in float32.

    Attributes:
        steps: int16 [groups], from `FIRST_STEP` to `LAST_STEP`.
    """

    state_kinds = ("stepped",)
    by_entropy = True

    steps: Steps

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps.shape != self.bits.shape:
            raise FormatError(
                f"{self.bits.size} groups have as many steps, got shape {self.steps.shape}."
            )
        check_steps(self.steps)

    @property
    def parameters(self) -> Steps:
        """The numbers of the steps."""
        return self.steps

    @property
    def least_parameter_bits(self) -> float:
        """Entropy of the steps, few of which differ."""
        return entropy_bits(np.bincount(self.steps - FIRST_STEP))

    @property
    def per_group(self) -> bool:
        """Each group has a step of its own."""
        return True

    def affine(self, bits: Bytes) -> Affine:
        """How levels are decoded; see `LevelRecord.affine`."""
        zero = (np.uint32(1) << (bits.astype(np.uint32) - np.uint32(1))).astype(np.float32)
        return Affine(STEPS[self.steps - FIRST_STEP], zero)

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
    parameter_bytes = 2

    @property
    def parameters(self) -> int:
        """One step for each group."""
        return self.groups

    def check_elements(self, elements: Bytes) -> None:
        """Raises FormatError for a step out of range."""
        check_steps(_steps(elements))

    def decode(self, elements: Bytes, piece: Piece, decoded: DecodedPiece, out: Floats) -> None:
        """Writes what `SteppedRecord.values` computes, with the levels of a bitwidth at a time."""

        def fill(width: int, part: Floats) -> None:
            np.subtract(decoded.streams[width], 1 << (width - 1), out=part, dtype=np.float32)

        merge_groups(decoded.bits, decoded.counts, piece.group_size, out, fill)
        _scale(out, _steps(elements)[piece.groups], piece.group_size)

    def fill(self, elements: Bytes, out: Floats) -> None:
        """Writes nothing: only a tensor without weights has no levels."""

    def record(self, elements: Bytes, levels: Levels, bits: Bytes) -> SteppedRecord:
        """The record."""
        return SteppedRecord(**self.head(levels, bits), steps=_steps(elements))


def check_steps(steps: Steps) -> None:
    """Raises FormatError for the number of a step that is out of range."""
    if steps.size and not FIRST_STEP <= steps.min() <= steps.max() <= LAST_STEP:
        raise FormatError(
            f"The steps of a tensor are numbers from {FIRST_STEP} to {LAST_STEP}, "
            f"got {steps.min()} to {steps.max()}."
        )


def _steps(elements: Bytes) -> Steps:
    steps: Steps = elements.view("<i2").astype(np.int16, copy=False)
    return steps


def _scale(values: Floats, steps: Steps, group_size: int) -> None:
    """Multiplies each group by its step, in place."""
    for start in range(0, steps.size, _BLOCK):
        factors = STEPS[steps[start : start + _BLOCK] - FIRST_STEP]
        part = values[start * group_size : (start + _BLOCK) * group_size]
        whole = part.size // group_size
        part[: whole * group_size].reshape(whole, group_size)[:] *= factors[:whole, None]
        # The last group may be short.
        part[whole * group_size :] *= factors[whole:]

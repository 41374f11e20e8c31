"""Levels around zero times a scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from diffq.errors import FormatError
from diffq.format.entropy import DecodedPiece
from diffq.format.groups import merge_groups
from diffq.format.kinds.affine import Affine
from diffq.format.kinds.base import Bytes, Fields, Floats, Levels
from diffq.format.kinds.levels import (
    MAX_RANGE,
    LevelEntry,
    LevelRecord,
    float_parameters,
    read_levels,
)
from diffq.format.layout import Piece

#: Bits of the scale.
SCALE_BITS = 32


@dataclass(frozen=True, eq=False)
class ScaledRecord(LevelRecord):
    """Levels around zero times a scale (LSQ, arXiv:1902.08153).

    value = (level - 2**(bits - 1)) * scale in float32.

    Attributes:
        scale: float32 [1].
    """

    state_kinds = ("scaled",)

    scale: Floats

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scale(self.scale, int(self.bits.max(initial=1)))

    @property
    def parameters(self) -> Floats:
        """The scale."""
        return self.scale

    def affine(self, bits: Bytes) -> Affine:
        """How levels are decoded; see `LevelRecord.affine`."""
        zero = (np.uint32(1) << (bits.astype(np.uint32) - np.uint32(1))).astype(np.float32)
        return Affine(self.scale, zero)

    def entry(self, name: str) -> ScaledEntry:
        """Describes the record for the index; raises FormatError if a file cannot hold it."""
        return ScaledEntry(name, self.shape, self.dtype, self.group_size, self.min_bits)

    def fields(self, packed: bool) -> dict[str, Any]:
        """Levels and scale."""
        return {**super().fields(packed), "kind": "scaled", "scale": self.scale}

    @classmethod
    def from_fields(cls, fields: Fields) -> ScaledRecord:
        """Inverse of `fields`."""
        scale = fields.array("scale", 1, "float32")
        return cls(**read_levels(fields, constant=False), scale=scale)


@dataclass(frozen=True)
class ScaledEntry(LevelEntry):
    """What the index says about a scaled tensor."""

    kind = "scaled"
    record_type = ScaledRecord

    @property
    def parameters(self) -> int:
        """The scale alone."""
        return 1

    def check_elements(self, elements: Bytes) -> None:
        """Raises FormatError for a scale that is not finite."""
        check_scale(float_parameters(elements), bits=1)

    def check_piece(self, decoded: DecodedPiece, elements: Bytes) -> None:
        """Raises FormatError for a bitwidth out of range, or too high for the scale."""
        super().check_piece(decoded, elements)
        check_scale(float_parameters(elements), max(decoded.streams))

    def decode(self, elements: Bytes, piece: Piece, decoded: DecodedPiece, out: Floats) -> None:
        """Writes what `ScaledRecord.values` computes, with the levels of a bitwidth at a time."""
        scale = float_parameters(elements)

        def fill(width: int, part: Floats) -> None:
            np.subtract(decoded.streams[width], 1 << (width - 1), out=part, dtype=np.float32)
            part *= scale

        merge_groups(decoded.bits, decoded.counts, piece.group_size, out, fill)

    def fill(self, elements: Bytes, out: Floats) -> None:
        """Writes nothing: only a tensor without weights has no levels."""

    def record(self, elements: Bytes, levels: Levels, bits: Bytes) -> ScaledRecord:
        """The record."""
        return ScaledRecord(**self.head(levels, bits), scale=float_parameters(elements))


def check_scale(scale: Floats, bits: int) -> None:
    """Checks that every level of up to `bits` bits decodes to a finite number.

    Raises:
        FormatError: not one scale, or one that is not finite or too large.
    """
    largest = MAX_RANGE / 2 ** (bits - 1)
    if scale.shape != (1,) or not abs(float(scale[0])) <= largest:
        raise FormatError(f"A scaled tensor has one scale of at most {largest:.8g}, got {scale}.")

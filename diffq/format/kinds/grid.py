"""Levels on an even grid from a minimum to a maximum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from diffq.errors import FormatError
from diffq.format.entropy import DecodedPiece
from diffq.format.groups import merge_groups
from diffq.format.kinds.affine import Affine, repeat
from diffq.format.kinds.base import Bytes, Fields, Floats, Levels
from diffq.format.kinds.levels import (
    MAX_RANGE,
    LevelEntry,
    LevelRecord,
    float_parameters,
    read_levels,
)
from diffq.format.layout import Piece
from diffq.format.wire import Cursor, unknown

#: Bits that Equation 12 of the DiffQ paper gives to a minimum and a maximum.
RANGE_BITS = 2 * 32

# What the bits of an entry's flags stand for, the lowest first (docs/format.md, section 4).
_FLAGS = ("per_group", "constant", "zero_point")


@dataclass(frozen=True, eq=False)
class GridRecord(LevelRecord):
    """Levels on an even grid from a minimum to a maximum (Equation 1 of the DiffQ paper).

    value = level * step + low, with step = (high - low) / (2**bits - 1), each
    operation rounded to float32. With a zero point see `zero_points`.

    Attributes:
        ranges: float32 [1, 2] or [groups, 2], low and high of the tensor or of each group.
        zero_point: some level stands for exactly 0.0, wherever low <= 0 <= high.
    """

    # Readers that do not know zero points must not decode such a grid without one.
    state_kinds = ("grid", "grid with zero point")

    ranges: Floats
    zero_point: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ranges.ndim != 2 or len(self.ranges) not in (1, self.bits.size):
            raise FormatError(
                f"A grid has 1 or {self.bits.size} ranges of low and high, "
                f"got shape {self.ranges.shape}."
            )
        check_ranges(self.ranges)
        if self.zero_point and self.constant:
            raise FormatError("A constant tensor has no levels, and no zero point among them.")

    @property
    def parameters(self) -> Floats:
        """The ranges."""
        return self.ranges

    @property
    def constant(self) -> bool:
        """Whether low equals high everywhere."""
        return is_constant(self.ranges)

    @property
    def per_group(self) -> bool:
        """Whether groups of one bitwidth have parameters of their own."""
        return len(self.ranges) != 1

    def affine(self, bits: Bytes) -> Affine:
        """How levels are decoded; see `LevelRecord.affine`."""
        return _affine(self.ranges, bits, self.zero_point)

    def entry(self, name: str) -> GridEntry:
        """Describes the record for the index; raises FormatError if a file cannot hold it."""
        return GridEntry(
            name,
            self.shape,
            self.dtype,
            self.group_size,
            self.min_bits,
            constant=self.constant,
            per_group=self.per_group,
            zero_point=self.zero_point,
        )

    def fields(self, packed: bool) -> dict[str, Any]:
        """Levels and ranges."""
        kind = self.state_kinds[self.zero_point]
        return {**super().fields(packed), "kind": kind, "ranges": self.ranges}

    @classmethod
    def from_fields(cls, fields: Fields) -> GridRecord:
        """Inverse of `fields`."""
        ranges = fields.array("ranges", 2, "float32")
        # The record refuses ranges of another shape.
        constant = ranges.shape[1] == 2 and is_constant(ranges)
        levels = read_levels(fields, constant)
        return cls(**levels, ranges=ranges, zero_point=fields.kind == cls.state_kinds[True])


@dataclass(frozen=True)
class GridEntry(LevelEntry):
    """What the index says about a grid.

    Attributes:
        per_group: low and high are stored for each group, not once.
        zero_point: some level stands for exactly 0.0.
    """

    kind = "grid"
    record_type = GridRecord

    per_group: bool = False
    zero_point: bool = False

    @classmethod
    def read(cls, cursor: Cursor, where: str) -> dict[str, Any]:
        """Reads group size, lowest bitwidth and flags."""
        fields, flags = super().read(cursor, where), cursor.fixed(1, "the flags")
        if flags >= 1 << len(_FLAGS):
            raise unknown(where, "the flags 1, 2 and 4", flags)
        return fields | {name: bool(flags >> bit & 1) for bit, name in enumerate(_FLAGS)}

    def write(self) -> bytes:
        """Inverse of `read`."""
        flags = sum(getattr(self, name) << bit for bit, name in enumerate(_FLAGS))
        return super().write() + bytes([flags])

    def check(self) -> None:
        """Raises FormatError if the description alone breaks a rule."""
        super().check()
        if self.per_group and self.groups == 1:
            raise FormatError("One group has one range and no flag 1, got flag 1.")
        if self.constant and self.zero_point:
            raise FormatError("A constant tensor has no flag 4, got flags 2 and 4.")

    @property
    def ranges(self) -> int:
        """Number of pairs of low and high."""
        return self.groups if self.per_group else 1

    @property
    def parameters(self) -> int:
        """Low and high of each range."""
        return 2 * self.ranges

    def check_elements(self, elements: Bytes) -> None:
        """Raises FormatError for a range that is none, or if flag 2 is wrong."""
        ranges = _ranges(elements)
        check_ranges(ranges)
        constant = is_constant(ranges)
        if constant != self.constant:
            raise FormatError(f"flag 2 must be {int(constant)}, got {int(not constant)}.")

    def decode(self, elements: Bytes, piece: Piece, decoded: DecodedPiece, out: Floats) -> None:
        """Writes what `GridRecord.values` computes, with the levels of a bitwidth at a time."""
        ranges = _ranges(elements)
        if len(ranges) > 1:
            decoded.merge(piece.group_size, out)
            affine = _affine(ranges[piece.groups], decoded.bits, self.zero_point)
            affine.apply(out, piece.group_size)
            return

        def fill(width: int, part: Floats) -> None:
            levels: NDArray[Any] = decoded.streams[width]
            affine = _affine(ranges, np.array([width], np.uint8), self.zero_point)
            if affine.zero is not None:
                levels = np.subtract(levels, affine.zero, out=part, dtype=np.float32)
            np.multiply(levels, affine.step, out=part, dtype=np.float32)
            # Grids add their minimum.
            part += cast(Floats, affine.added)

        merge_groups(decoded.bits, decoded.counts, piece.group_size, out, fill)

    def fill(self, elements: Bytes, out: Floats) -> None:
        """Writes the value of each group of a constant."""
        # As everywhere, low is added to level * step, which makes 0.0 of -0.0.
        low = _ranges(elements)[:, 0] + np.float32(0)
        out[:] = repeat(low, self.group_size, out.size)

    def record(self, elements: Bytes, levels: Levels, bits: Bytes) -> GridRecord:
        """The record."""
        head = self.head(levels, bits)
        return GridRecord(**head, ranges=_ranges(elements), zero_point=self.zero_point)


def zero_points(low: Floats, high: Floats, top: Floats) -> tuple[Floats, Floats]:
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


def _ranges(elements: Bytes) -> Floats:
    """Low and high, [ranges, 2]."""
    return float_parameters(elements).reshape(-1, 2)


def _affine(ranges: Floats, bits: Bytes, zero_point: bool) -> Affine:
    """How levels are decoded, for one range or one of each group."""
    low, high = ranges.T
    top = ((np.uint32(1) << bits.astype(np.uint32)) - np.uint32(1)).astype(np.float32)
    step = (high - low) / top
    if not zero_point:
        return Affine(step, added=low)
    zero, added = zero_points(low, high, top)
    return Affine(step, zero, added)


def is_constant(ranges: Floats) -> bool:
    """Whether low equals high in every range, [ranges, 2]."""
    return bool((ranges[:, 0] == ranges[:, 1]).all())


def check_ranges(ranges: Floats) -> None:
    """Checks that every level of a grid decodes to a finite number.

    Args:
        ranges: low and high, [ranges, 2].

    Raises:
        FormatError: another shape, low above high, or a number that is not finite or too large.
    """
    if ranges.shape[1:] != (2,):
        raise FormatError(f"A grid's ranges are pairs of low and high, got shape {ranges.shape}.")
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

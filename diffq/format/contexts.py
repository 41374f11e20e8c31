"""Classes of levels by the rows and columns that they stand in (docs/format.md, section 14).

The rows and columns of a weight differ in how large their levels are. Each has a mark, in
half octaves, and the sum of the two is a level's class, known before the level is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt

import numpy as np
from numpy.typing import NDArray

from diffq.format import costs
from diffq.format.bitpack import MAX_BITS
from diffq.format.costs import UNIT, Counts
from diffq.format.entropy import LevelPiece
from diffq.format.groups import split_groups

#: Marks and classes are below this.
CLASSES = 31

Marks = NDArray[np.uint8]
Classes = NDArray[np.uint8]

# What a run costs beside its symbols, and what a symbol of it does, in 1/1024 bit.
_RUN_COST = 16 * UNIT
_SYMBOL_COST = 11 * UNIT
# What a piece is charged for a symbol of a class: the precision that frequencies are worth.
_SHARED_COST = 8 * UNIT

# With more different levels than this, classes do not pay for their frequencies.
_MOST_LEVELS = 1 << 10

# Means and ratios have so many bits behind the point.
_POINT = 16
# The class of the mean level, and what a column adds to the mark of its row.
_MIDDLE, _COLUMN = CLASSES // 2, CLASSES // 4
# Ratios from which on a half octave more is nearer, from 2**(_LEAST / 2 - 1/4) on.
_LEAST = 1 - _MIDDLE
_STEPS = np.array([isqrt(isqrt(1 << 4 * _POINT + 2 * n - 1)) for n in range(_LEAST, _MIDDLE + 1)])


@dataclass(frozen=True)
class Rows:
    """How a piece is cut in rows.

    Attributes:
        columns: levels in a row; 0 if one mark is the class of all.
        start: the first level's place in the tensor.
        count: number of levels.
    """

    columns: int
    start: int
    count: int

    @property
    def skipped(self) -> int:
        """Places of the first row before the piece."""
        return self.start % self.columns if self.columns else 0

    @property
    def rows(self) -> int:
        """Rows that hold levels of the piece."""
        return -(-(self.skipped + self.count) // self.columns) if self.columns else 1

    @property
    def marks(self) -> int:
        """Number of marks: of the rows, then of the columns."""
        return self.rows + self.columns

    def sizes(self) -> tuple[Counts, Counts]:
        """Levels of the piece in each row and in each column."""
        missing = self.rows * self.columns - self.skipped - self.count
        rows, places = np.full(self.rows, self.columns), np.arange(self.columns)
        rows[0] -= self.skipped
        rows[-1] -= missing
        outside = (places < self.skipped) + (places >= self.columns - missing).astype(np.int64)
        return rows, self.rows - outside

    def classes(self, marks: Marks, lowest: int, highest: int) -> Classes:
        """The class of each level: the sum of its marks, or the nearest of the two bounds."""
        columns = marks[self.rows :] if self.columns else np.zeros(self.count, np.uint8)
        sums = np.add.outer(marks[: self.rows], columns)
        np.clip(sums, lowest, highest, out=sums)
        return sums.reshape(-1)[self.skipped : self.skipped + self.count]


@dataclass(frozen=True, eq=False)
class Contexts:
    """The classes of the levels of a segment.

    Attributes:
        pieces: how each piece is cut.
        marks: uint8, those of all pieces, below `CLASSES`.
        lowest: the lowest class.
        highest: the highest class.
    """

    pieces: list[Rows]
    marks: Marks
    lowest: int
    highest: int

    def streams(self, maps: Sequence[tuple[NDArray[np.uint8], int]]) -> dict[int, Classes]:
        """The classes of the levels of each bitwidth, in the order of their stream.

        Args:
            maps: for each piece the bitwidths of its groups and the group size.
        """
        streams: dict[int, list[Classes]] = {}
        ends = np.cumsum([piece.marks for piece in self.pieces])[:-1]
        marks = np.split(self.marks, ends)
        for piece, own, (bits, group_size) in zip(self.pieces, marks, maps, strict=True):
            classes = piece.classes(own, self.lowest, self.highest)
            for width, part in split_groups(classes, bits, group_size).items():
                streams.setdefault(width, []).append(part)
        return {width: _joined(parts) for width, parts in streams.items()}


def _joined(parts: list[Classes]) -> Classes:
    # A long tensor fills a segment alone: a copy would double its memory.
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def choose(
    pieces: Sequence[LevelPiece], streams: Mapping[int, NDArray[np.unsignedinteger]]
) -> Contexts:
    """The classes with which the levels of a segment take the fewest bits.

    Args:
        pieces: what the segment holds.
        streams: the levels of each bitwidth, by rising bitwidth.
    """
    flat = [Rows(0, piece.start, piece.levels.size) for piece in pieces]
    single = Contexts(flat, np.zeros(len(pieces), np.uint8), 0, 0)
    levels = _Levels(streams)
    if levels.count > _MOST_LEVELS:
        return single
    counts = np.zeros((CLASSES, levels.count), np.int64)
    cuts, own = [], []
    for piece in pieces:
        rows, marks, added = levels.best(piece)
        cuts.append(rows)
        own.append(marks)
        counts += added
    marks = np.concatenate(own)
    lowest, highest, cost = levels.merge(counts)
    if cost + _marks_cost(marks) >= levels.cost(counts.sum(axis=0, keepdims=True)).sum():
        return single
    return Contexts(cuts, marks, lowest, highest)


class _Levels:
    """The different levels of a segment, numbered, and what they cost in classes.

    Args:
        streams: the levels of each bitwidth, by rising bitwidth.

    Attributes:
        count: number of different levels, those of each bitwidth apart.
    """

    def __init__(self, streams: Mapping[int, NDArray[np.unsignedinteger]]) -> None:
        span = 1 << max(streams)
        self._numbers = np.zeros((MAX_BITS + 1, span), np.int32)
        self._sizes = np.zeros((MAX_BITS + 1, span), np.int32)
        self._ends: list[int] = []
        self.count, total, weights = 0, np.int64(0), 0
        for width, levels in streams.items():
            counts = np.bincount(levels)
            used = np.flatnonzero(counts)
            self._numbers[width, used] = np.arange(self.count, self.count + used.size)
            # How far a level is from the most frequent one, on the scale of 16 bits.
            self._sizes[width, used] = abs(used - counts.argmax()) << MAX_BITS - width
            self.count += used.size
            self._ends.append(self.count)
            total += (counts[used] * self._sizes[width, used]).sum()
            weights += levels.size
        self._mean = _mean(total, np.int64(weights))

    def best(self, piece: LevelPiece) -> tuple[Rows, Marks, Counts]:
        """How a piece is best cut, its marks, and its counts: [classes, levels]."""
        widths = np.repeat(piece.bits, piece.group_size)[: piece.levels.size]
        numbers = self._numbers[widths, piece.levels]
        sizes = self._sizes[widths, piece.levels]
        found = []
        for columns in dict.fromkeys((0, piece.columns * (piece.columns <= numbers.size))):
            cut = Rows(columns, piece.start, numbers.size)
            marks = self._marks(cut, sizes)
            classes = cut.classes(marks, 0, CLASSES - 1).astype(np.int32)
            counts = np.bincount(classes * self.count + numbers, minlength=CLASSES * self.count)
            found.append((cut, marks, counts.reshape(CLASSES, self.count)))
        return min(found, key=lambda one: self._shared_cost(one[1], one[2]))

    def merge(self, counts: Counts) -> tuple[int, int, int]:
        """The lowest and highest class, once those at both ends are merged that gain by it.

        Returns:
            Them, and the cost of all levels.
        """
        counts = counts.copy()
        lowest, highest = np.flatnonzero(counts.any(axis=1))[[0, -1]].tolist()
        for step in (1, -1):
            while lowest < highest:
                outer = lowest if step > 0 else highest
                pair = counts[[outer, outer + step]]
                merged = pair.sum(axis=0)
                if self.cost(merged[None]).sum() > self.cost(pair).sum():
                    break
                counts[outer], counts[outer + step] = 0, merged
                lowest, highest = (lowest + 1, highest) if step > 0 else (lowest, highest - 1)
        return lowest, highest, int(self.cost(counts).sum())

    def cost(self, counts: Counts) -> Counts:
        """Cost of each class: its levels, their frequencies, and its runs."""
        symbols = (counts > 0).sum(axis=1)
        runs = sum(part.any(axis=1).astype(np.int64) for part in self._parts(counts))
        return np.asarray(self._entropy(counts) + _SYMBOL_COST * symbols + _RUN_COST * runs)

    def _shared_cost(self, marks: Marks, counts: Counts) -> int:
        symbols = _SHARED_COST * np.count_nonzero(counts)
        return int(self._entropy(counts).sum() + symbols) + _marks_cost(marks)

    def _entropy(self, counts: Counts) -> Counts:
        return np.asarray(sum(costs.entropy(part) for part in self._parts(counts)))

    def _parts(self, counts: Counts) -> list[Counts]:
        """The counts of each bitwidth."""
        return np.split(counts, self._ends[:-1], axis=1)

    def _marks(self, rows: Rows, sizes: NDArray[np.int32]) -> Marks:
        """Marks of rows relative to the segment's mean, of columns relative to the piece's."""
        mean = _mean(sizes.sum(dtype=np.int64), np.int64(sizes.size))
        if not rows.columns:
            return _half_octaves(mean[None], self._mean, _MIDDLE)
        table = np.zeros((rows.rows, rows.columns), np.int32)
        table.reshape(-1)[rows.skipped :][: rows.count] = sizes
        sums = (table.sum(axis, dtype=np.int64) for axis in (1, 0))
        by_row, by_column = map(_mean, sums, rows.sizes())
        marks = _half_octaves(by_row, self._mean, _MIDDLE - _COLUMN)
        return np.concatenate([marks, _half_octaves(by_column, mean, _COLUMN)])


def _mean(sums: Counts, numbers: Counts) -> Counts:
    """Means with `_POINT` bits behind the point."""
    return np.asarray((sums << _POINT) // numbers)


def _half_octaves(means: Counts, unit: Counts, middle: int) -> Marks:
    """Means relative to a unit in half octaves: `middle` for 1, from 0 to twice that."""
    ratios = (means << _POINT) // np.maximum(unit, 1)
    octaves = np.searchsorted(_STEPS, ratios, "right") - _MIDDLE
    marks: Marks = np.clip(octaves + middle, 0, 2 * middle).astype(np.uint8)
    return marks


def _marks_cost(marks: Marks) -> int:
    return int(costs.entropy(np.bincount(marks)))

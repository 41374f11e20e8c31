"""Which segment of a file holds which part of which tensor (docs/format.md, section 5).

A record is stored in one or two parts: arrays of elements (raw tensors, float
parameters) or levels. A long part is cut in several segments, so that threads can
share the work and memory stays bounded; short parts of many records share one, so
that they share the cost of a frame.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from diffq.format.wire import damaged

#: Most weights in a segment of levels, and most bytes in a segment of elements.
MAX_WEIGHTS = 1 << 20
MAX_BYTES = 1 << 22

#: `Part.item` of levels, which have no whole bytes.
LEVELS = 0


@dataclass(frozen=True)
class Part:
    """One array that a record is stored in.

    Attributes:
        item: bytes per element, or `LEVELS`.
        count: elements or weights; at least one.
        group_size: weights per group, for levels.
    """

    item: int
    count: int
    group_size: int = 1

    @property
    def limit(self) -> int:
        """Most elements or weights that a segment can hold."""
        return MAX_BYTES // self.item if self.item else MAX_WEIGHTS

    def cut_count(self) -> int:
        """Number of ranges that `cuts` yields, without making them."""
        if self.group_size <= self.limit:
            return -(-self.count // self._step)
        whole, rest = divmod(self.count, self.group_size)
        return whole * -(-self.group_size // self.limit) + -(-rest // self.limit)

    def cuts(self) -> Iterator[tuple[int, int]]:
        """The (start, stop) ranges, one per segment: whole groups, or parts of one group."""
        if self.group_size <= self.limit:
            for start in range(0, self.count, self._step):
                yield start, min(start + self._step, self.count)
            return
        for group in range(0, self.count, self.group_size):
            end = min(group + self.group_size, self.count)
            for start in range(group, end, self.limit):
                yield start, min(start + self.limit, end)

    @property
    def _step(self) -> int:
        return self.limit // self.group_size * self.group_size


@dataclass(frozen=True)
class Piece:
    """A range of one part, stored in one segment.

    Attributes:
        record: number of the record.
        part: the part it belongs to.
        start: first element or weight.
        stop: one past the last.
    """

    record: int
    part: Part
    start: int
    stop: int

    @property
    def count(self) -> int:
        """Elements or weights."""
        return self.stop - self.start

    @property
    def group_size(self) -> int:
        """Weights per group as the segment sees them: a piece can lie within a group."""
        return min(self.part.group_size, self.count)

    @property
    def groups(self) -> slice:
        """The tensor's groups that the piece holds weights of."""
        size = self.part.group_size
        return slice(self.start // size, -(-self.stop // size))

    @property
    def group_count(self) -> int:
        """Number of groups, whole or in part."""
        size = self.part.group_size
        return -(-self.stop // size) - self.start // size


@dataclass
class Segment:
    """What one segment holds: pieces of one item size, one after the other.

    Attributes:
        item: bytes per element, or `LEVELS`.
        pieces: the pieces in their order.
        count: elements or weights of all pieces.
    """

    item: int
    pieces: list[Piece] = field(default_factory=list)
    count: int = 0

    def add(self, piece: Piece) -> None:
        """Appends a piece."""
        self.pieces.append(piece)
        self.count += piece.count


class Layout:
    """Segments in the order in which they open.

    Attributes:
        segments: the segments so far.
        homes: for each record, for each of its parts, the numbers of its segments.
    """

    def __init__(self) -> None:
        self.segments: list[Segment] = []
        self.homes: list[list[range]] = []

    def place(self, parts: Sequence[Part], backs: Sequence[int], where: str) -> None:
        """Adds a record's parts.

        Args:
            parts: the record's parts.
            backs: for each part 0 to open as many segments as it needs, or n to join
                the n-th last segment that was opened.
            where: the record, for errors.

        Raises:
            FormatError: a part joins a segment that does not exist, holds other items or is full.
        """
        self.homes.append([])
        for part, back in zip(parts, backs, strict=True):
            home = self._join(part, back, where) if back else self._open(part)
            self.homes[-1].append(home)

    def _open(self, part: Part) -> range:
        first = len(self.segments)
        for start, stop in part.cuts():
            self.segments.append(Segment(part.item))
            self.segments[-1].add(Piece(len(self.homes) - 1, part, start, stop))
        return range(first, len(self.segments))

    def _join(self, part: Part, back: int, where: str) -> range:
        number = len(self.segments) - back
        if number < 0:
            raise damaged(where, f"a part can join one of {len(self.segments)} segments", back)
        segment = self.segments[number]
        if segment.item != part.item:
            rule = f"a part with items of {part.item} bytes must join a segment of such"
            raise damaged(where, rule, segment.item)
        if segment.count + part.count > part.limit:
            rule = f"a segment holds at most {part.limit} items"
            raise damaged(where, rule, segment.count + part.count)
        segment.add(Piece(len(self.homes) - 1, part, 0, part.count))
        return range(number, number + 1)

"""Which short tensors share a segment.

A segment of its own costs a tensor a frame and a Huffman table for each bitwidth. A
shared one makes it pay for tables that also suit others, or for a bit map as wide as
theirs. Each tensor joins the open segment to which it adds the least, or opens one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from diffq.format import layout
from diffq.format.bitpack import MAX_BITS
from diffq.format.costs import UNIT, entropy
from diffq.format.kinds.base import Coded, Entry
from diffq.format.layout import Layout, Part

# Longer parts gain nothing from company.
_LONGEST = 1 << 18
# Open segments of levels that a tensor can choose from, the latest ones.
_CHOICE = 16

_SEGMENT_COST = 20 * 8 * UNIT
_STREAM_COST = 8 * 8 * UNIT
_SYMBOL_COST = 5 * UNIT

_Counts = NDArray[np.int64]


@dataclass
class _Pool:
    number: int
    counts: _Counts


@dataclass
class Pooling:
    """Decides where each record's parts go.

    Args:
        compress: whether segments will be compressed; otherwise only the width of their
            bit maps tells tensors apart.

    Attributes:
        layout: the segments so far.
    """

    compress: bool
    layout: Layout = field(default_factory=Layout)
    _elements: dict[int, int] = field(default_factory=dict)
    _levels: list[_Pool] = field(default_factory=list)

    def add(self, entry: Entry, coded: Coded | None) -> list[int]:
        """Places a record.

        Args:
            entry: what the index says about it.
            coded: its integers.

        Returns:
            For each part what `Layout.place` takes.
        """
        backs, opened = [], len(self.layout.segments)
        for part in entry.parts:
            number = self._choose(part, coded, opened)
            backs.append(opened - number if number < opened else 0)
            opened += 0 if number < opened else part.cut_count()
        self.layout.place(entry.parts, backs, entry.where)
        return backs

    def _choose(self, part: Part, coded: Coded | None, opened: int) -> int:
        """The segment to join, or `opened` for a new one."""
        if part.count * max(part.item, 1) > _LONGEST:
            return opened
        if part.item == layout.LEVELS and coded is not None:
            return self._choose_pool(part, coded, opened)
        number = self._elements.get(part.item, opened)
        if not self._fits(part, number):
            number = opened
        self._elements[part.item] = number
        return number

    def _choose_pool(self, part: Part, coded: Coded, opened: int) -> int:
        counts = _counts(coded) if self.compress else _count_bits(coded)
        cost = _compressed_cost if self.compress else _packed_cost
        pools = [pool for pool in self._levels if self._fits(part, pool.number)]
        if pools:
            added = _added_costs(counts, pools, cost)
            best = int(added.argmin())
            if added[best] <= cost(counts) + _SEGMENT_COST:
                pools[best].counts += counts
                return pools[best].number
        self._levels = [*self._levels[1 - _CHOICE :], _Pool(opened, counts)]
        return opened

    def _fits(self, part: Part, number: int) -> bool:
        segments = self.layout.segments
        return number < len(segments) and segments[number].count + part.count <= part.limit


def _counts(coded: Coded) -> _Counts:
    """How often each symbol occurs: row 0 for the bit map, row b for levels of b bits.

    Of levels above 8 bits only the highest 8 are counted: the rest is packed as it is.
    """
    counts = np.zeros((MAX_BITS + 1, 256), np.int64)
    counts[0] = np.bincount(coded.bits, minlength=256)
    for width, levels in coded.streams().items():
        symbols = levels >> max(width - 8, 0)
        counts[width] = np.bincount(symbols, minlength=256)
    return counts


def _count_bits(coded: Coded) -> _Counts:
    return np.bincount(coded.bits, minlength=MAX_BITS + 1)[None]


def _added_costs(
    counts: _Counts, pools: list[_Pool], cost: Callable[[_Counts], NDArray[np.int64]]
) -> NDArray[np.int64]:
    """What each pool's cost grows by if it takes `counts` in."""
    used = counts.any(axis=-1)
    before = np.stack([pool.counts[used] for pool in pools])
    return cost(before + counts[used]) - cost(before)


def _compressed_cost(counts: _Counts) -> NDArray[np.int64]:
    """Entropy plus tables of the streams in the last two dimensions, in 1/1024 bit."""
    tables = _STREAM_COST * counts.any(axis=-1) + _SYMBOL_COST * (counts > 0).sum(axis=-1)
    return np.asarray((entropy(counts) + tables).sum(axis=-1))


def _packed_cost(counts: _Counts) -> NDArray[np.int64]:
    """The bit map at the width that the bitwidths in the last dimension need, in 1/1024 bit."""
    used = counts > 0
    span = MAX_BITS - used[..., ::-1].argmax(axis=-1) - used.argmax(axis=-1)
    # frexp's exponent is the bit length of a whole number.
    return np.asarray(counts.sum(axis=(-1, -2)) * np.frexp(span)[1].sum(axis=-1) * UNIT)

"""Weights as packed levels, those of each bitwidth in a stream of its own."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffq.format.bitpack import packed_size
from diffq.format.kinds.levels import LevelRecord
from diffq.packed import planes
from diffq.packed.weight import PackedWeight, floats, kept_floats

# Groups between two counts of those before, at least; the fewer, the less there is to count.
_BLOCK = 256

_NOTHING = np.empty(0, np.uint8)
_NO_TERM = np.empty(0, np.float32)


class PackedLevels(PackedWeight):
    """Groups of levels sorted by bitwidth, with what tells where each group is.

    Attributes:
        streams: the packed levels of whole groups, by rising bitwidth.
        bit_map: the packed number, in the list of bitwidths, of the bitwidth of each group;
            without elements if there is one bitwidth.
        before: int32 [blocks, bitwidths], groups of each bitwidth before each block of rows;
            without elements unless rows are decoded alone.
        zero, step, added: the terms of `Affine`, for each bitwidth, for each group, or for all;
            without elements where a term is left out.
    """

    streams: Tensor
    bit_map: Tensor
    before: Tensor
    zero: Tensor
    step: Tensor
    added: Tensor

    def __init__(self, record: LevelRecord, by_rows: bool) -> None:
        """Packs a record, `by_rows` if rows are to be decoded alone."""
        super().__init__(record.shape, getattr(torch, record.dtype))
        self._group_size, self._groups = record.group_size, record.bits.size
        columns = record.numel // record.shape[0]
        self._row_groups = 0 if columns % self._group_size else columns // self._group_size
        self._rows_per_block = -(-_BLOCK // max(self._row_groups, 1))
        counts = np.bincount(record.bits)
        widths = np.flatnonzero(counts).astype(np.uint8)
        numbers = np.searchsorted(widths, np.arange(len(counts))).astype(np.uint8)[record.bits]
        # Bitwidth and number of groups of each stream.
        self._widths = [(width, int(counts[width])) for width in widths.tolist()]
        self._map_bits = (len(widths) - 1).bit_length()
        self.keep("streams", torch.from_numpy(self._pack_streams(record, numbers)))
        bit_map = planes.pack(numbers, self._map_bits) if self._map_bits else _NOTHING
        self.keep("bit_map", torch.from_numpy(bit_map))
        before = self._count_before(numbers) if by_rows and self._row_groups else _NOTHING
        self.keep("before", torch.from_numpy(before))
        self._per_group = record.per_group
        affine = record.affine(record.bits if self._per_group else widths)
        for name, term in vars(affine).items():
            self.keep(name, kept_floats(_NO_TERM if term is None else term))

    @property
    def has_rows(self) -> bool:
        """Whether the levels of a row can be found without those of all rows."""
        return not self._map_bits or bool(self.before.numel())

    def values(self) -> Tensor:
        """All levels in the order of their groups, and what they stand for."""
        parts = (planes.unpack(*each) for each in self._streams())
        levels = torch.cat(list(parts)).view(self._groups, self._group_size)
        if not self._map_bits:
            return self._stand_for(levels, None)
        numbers = planes.unpack(self.bit_map, self._groups, self._map_bits)
        places = self._places(numbers[None], None)[0]
        levels = levels.index_select(0, places)
        return self._stand_for(levels, None if self._per_group else numbers[:, None])

    def row_values(self, rows: Tensor) -> Tensor:
        """The levels of some rows and what they stand for."""
        return self._mixed_rows(rows) if self._map_bits else self._uniform_rows(rows)

    def _uniform_rows(self, rows: Tensor) -> Tensor:
        """Rows of levels of one bitwidth, whatever the groups."""
        ((width, _),) = self._widths
        columns = torch.Size(self.shape[1:]).numel()
        places = rows[:, None] * columns + torch.arange(columns, device=rows.device)
        count = self._groups * self._group_size
        levels = planes.unpack_at(self.streams, count, width, places)
        return self._stand_for(levels, places // self._group_size)

    def _mixed_rows(self, rows: Tensor) -> Tensor:
        """Rows of whole groups: the bitwidths of their blocks tell the places of their levels."""
        wide, device = self._rows_per_block * self._row_groups, rows.device
        blocks = rows // self._rows_per_block
        groups = blocks[:, None] * wide + torch.arange(wide, device=device)
        # The last block may end beyond the last group.
        groups.clamp_(max=self._groups - 1)
        numbers = planes.unpack_at(self.bit_map, self._groups, self._map_bits, groups)
        places = self._places(numbers, self.before[blocks])
        own = (rows % self._rows_per_block)[:, None] * self._row_groups
        own = own + torch.arange(self._row_groups, device=device)
        numbers, places, groups = (each.gather(1, own) for each in (numbers, places, groups))
        index = groups if self._per_group else numbers
        return self._stand_for(self._levels_at(numbers, places), index[..., None])

    def _places(self, numbers: Tensor, before: Tensor | None) -> Tensor:
        """Where groups are once they are sorted by bitwidth.

        Args:
            numbers: of the bitwidths of consecutive groups, [parts, groups].
            before: groups of each bitwidth before each part, [parts, bitwidths].
        """
        places = torch.zeros_like(numbers, dtype=torch.int32)
        start = -1
        for number, (_, count) in enumerate(self._widths):
            these = numbers == number
            found = these.cumsum(1, dtype=torch.int32) + start
            if before is not None:
                found += before[:, number : number + 1]
            places = torch.where(these, found, places)
            start += count
        return places

    def _levels_at(self, numbers: Tensor, places: Tensor) -> Tensor:
        """The levels of groups, [..., group_size], by bitwidth and place."""
        size = self._group_size
        levels = numbers.new_zeros(*numbers.shape, size, dtype=torch.int64)
        within, start = torch.arange(size, device=numbers.device), 0
        for number, (stream, count, width) in enumerate(self._streams()):
            these = numbers == number
            elements = (places[these] - start)[:, None] * size + within
            levels[these] = planes.unpack_at(stream, count, width, elements)
            start += count // size
        return levels

    def _stand_for(self, levels: Tensor, index: Tensor | None) -> Tensor:
        """What levels stand for, in float32.

        Args:
            levels: the levels.
            index: where the terms of each are: the number of its bitwidth or, `per_group`, of its
                group, in a shape that broadcasts; None if they are those of all groups in order.
        """

        def each(term: Tensor) -> Tensor:
            table = floats(term)
            if len(table) == 1:
                return table
            if index is None:
                return table[:, None]
            return table.index_select(0, index.reshape(-1).int()).view(index.shape)

        values = levels.float()
        if len(self.zero):
            values -= each(self.zero)
        values *= each(self.step)
        if len(self.added):
            values += each(self.added)
        return values

    def _streams(self) -> Iterator[tuple[Tensor, int, int]]:
        """The bytes, number of levels and bitwidth of each stream."""
        start = 0
        for width, groups in self._widths:
            count = groups * self._group_size
            stop = start + packed_size(count, width)
            yield self.streams[start:stop], count, width
            start = stop

    def _pack_streams(self, record: LevelRecord, numbers: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The levels of each bitwidth, whole groups, packed."""
        narrow = np.uint8 if self._widths[-1][0] <= 8 else np.uint16
        levels = np.zeros((self._groups, self._group_size), narrow)
        levels.reshape(-1)[: record.numel] = record.levels
        packed = [
            planes.pack(levels[numbers == number].reshape(-1), width)
            for number, (width, _) in enumerate(self._widths)
        ]
        return np.concatenate(packed)

    def _count_before(self, numbers: NDArray[np.uint8]) -> NDArray[np.int32]:
        """Groups of each bitwidth before each block of rows."""
        starts = np.arange(0, self._groups, self._rows_per_block * self._row_groups)
        counts = [
            np.add.reduceat(numbers == number, starts, dtype=np.int32)
            for number in range(len(self._widths))
        ]
        inside = np.stack(counts, axis=1)
        before: NDArray[np.int32] = np.cumsum(inside, axis=0, dtype=np.int32) - inside
        return before

"""Many tensors as the rows of one: what is done to all of them takes a few operations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffq.format.records import group_count
from diffq.numerics.grid import widen
from diffq.numerics.segments import Constants, Segments, in_numpy

#: Elements of a row where a whole tensor shares a bitwidth or a scale.
WIDTH = 64

# Elements of the pieces in which a CPU computes, so that they stay in its cache.
_PIECE = 2**17


class Ends(NamedTuple):
    """Minimum and maximum of each of some tensors, and where they are.

    Attributes:
        low: the minimum of each, [tensors].
        high: the maximum of each, [tensors].
        places: the first place of both in what `Flat.join` gave, int64 [tensors, 2].
    """

    low: Tensor
    high: Tensor
    places: Tensor

    def add_gradients(self, joined: Tensor, totals: Tensor) -> None:
        """Adds the gradients of minimum and maximum to those of all elements, in place.

        Args:
            joined: the gradients, as `Flat.join` gives them.
            totals: those of the logarithm of each tensor's range, [tensors].
        """
        span = self.high - self.low
        # A constant tensor has no range. The inverse of a tiny one would overflow.
        share = torch.where(span > 0, totals / torch.where(span > 0, span, 1), 0)
        both = torch.stack((-share, share), dim=1)
        joined.view(-1).index_add_(0, self.places.view(-1), both.view(-1).to(joined.dtype))


class Flat:
    """Tensors one after the other, each flattened and padded with zeros to whole rows.

    Args:
        shapes: of the tensors, each with at least one element.
        group_size: consecutive weights of a group, which is a row then; None where each tensor
            is one group.

    Attributes:
        shapes: as given.
        width: elements of a row.
        rows: the rows of each tensor.
        groups: the groups of each tensor.
        grouped: whether rows are groups.
        constants: numbers that belong to the tensors, by device.
    """

    def __init__(self, shapes: Sequence[torch.Size], group_size: int | None) -> None:
        self.shapes = tuple(shapes)
        self.grouped = group_size is not None
        self.width = WIDTH if group_size is None else group_size
        self._numels = [shape.numel() for shape in self.shapes]
        self.rows = Segments([group_count(numel, self.width) for numel in self._numels])
        self.groups = self.rows if self.grouped else Segments([1] * len(self.shapes))
        self._sizes = [count * self.width for count in self.rows.counts]
        self._padded = sum(self._sizes) > sum(self._numels)
        self.constants = Constants()

    def join(self, tensors: Sequence[Tensor | None], like: Tensor) -> Tensor:
        """Copies tensors in one.

        Args:
            tensors: of the shapes; zeros in place of None.
            like: gives dtype and device of zeros.

        Returns:
            [rows, width], in float32 at least.
        """
        pieces, padding = [], like.new_zeros(self.width if self._padded else 0)
        for tensor, numel, size in zip(tensors, self._numels, self._sizes, strict=True):
            if tensor is None:
                pieces.append(like.new_zeros(size))
                continue
            pieces.append(tensor.reshape(-1))
            if size > numel:
                pieces.append(padding[: size - numel])
        return widen(torch.cat(pieces)).view(-1, self.width)

    def split(self, joined: Tensor) -> list[Tensor]:
        """The tensors in what `join` gave, as views."""
        parts = torch.split(joined.view(-1), self._sizes)
        each = zip(parts, self._numels, self._sizes, self.shapes, strict=True)
        return [(p if n == size else p[:n]).view(shape) for p, n, size, shape in each]

    def to_rows(self, groups: Tensor) -> Tensor:
        """What each row has of its group, [rows] or [1], of what groups have, [groups]."""
        return groups if self.grouped else self.rows.spread(groups)

    def group_sums(self, rows: Tensor) -> Tensor:
        """The sum of each group, [groups], of what its rows have, [rows]."""
        return rows if self.grouped else self.rows.sums(rows)

    def pieces(self, joined: Tensor, *by_row: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Consecutive rows that a CPU has in its cache, with what belongs to each row.

        Args:
            joined: [rows, width].
            by_row: each [rows], or [1] for what all rows share.
        """
        count = max(1, _PIECE // self.width)
        if not in_numpy(joined) or len(joined) <= count:
            yield joined, *by_row
            return
        for start in range(0, len(joined), count):
            each = (r if len(r) == 1 else r[start : start + count] for r in by_row)
            yield joined[start : start + count], *each

    def ends(self, joined: Tensor) -> Ends:
        """Minimum and maximum of each tensor, and the first place of each, without graph."""
        flat = joined.detach().view(-1)
        if not in_numpy(flat):
            parts = [part.view(-1) for part in self.split(flat.view(-1, self.width))]
            found = [each for part in parts for each in (*part.min(0), *part.max(0))]
            low, high = torch.stack(found[::2]).view(-1, 2).unbind(1)
            places = torch.stack(found[1::2]).view(-1, 2)
            if len(self._sizes) > 1:
                places = places + self.width * self.rows.starts_on(flat.device)[:, None]
            return Ends(low, high, places)
        array, spots = flat.numpy(), []
        for row, numel in zip(self.rows.starts, self._numels, strict=True):
            start = row * self.width
            part = array[start : start + numel]
            spots += [start + part.argmin(), start + part.argmax()]
        where = np.array(spots)
        low, high = torch.from_numpy(array[where]).view(-1, 2).unbind(1)
        return Ends(low, high, torch.from_numpy(where).view(-1, 2))

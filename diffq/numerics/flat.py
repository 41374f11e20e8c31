"""Many tensors as the rows of one: what is done to all of them takes a few operations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils import get_total_norm

from diffq.format.records import group_count
from diffq.numerics.grid import wide, widen
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
        share = (totals / torch.where(span > 0, span, torch.inf)).to(joined.dtype)
        low, high = self.places.unbind(1)
        joined.view(-1).index_add_(0, low, share, alpha=-1).index_add_(0, high, share)


class Piece(NamedTuple):
    """Consecutive rows, and what they are of.

    Attributes:
        rows: which rows.
        parts: for each tensor in them its number, its first element and the one after its last,
            and the zeros that follow.
    """

    rows: slice
    parts: tuple[tuple[int, int, int, int], ...]


class Flat:
    """Tensors one after the other, each flattened and padded with zeros to whole rows.

    Args:
        shapes: of the tensors, each with at least one element.
        group_size: consecutive weights of a group, which is a row then; None where each tensor
            is one group.

    Attributes:
        shapes: as given.
        numels: elements of each tensor.
        width: elements of a row.
        rows: the rows of each tensor.
        groups: the groups of each tensor.
        grouped: whether rows are groups.
        whole: the piece of all rows.
        constants: numbers that belong to the tensors, by device.
    """

    def __init__(self, shapes: Sequence[torch.Size], group_size: int | None) -> None:
        self.shapes = tuple(shapes)
        self.grouped = group_size is not None
        self.width = WIDTH if group_size is None else group_size
        self.numels = [shape.numel() for shape in self.shapes]
        self.rows = Segments([group_count(numel, self.width) for numel in self.numels])
        self.groups = self.rows if self.grouped else Segments([1] * len(self.shapes))
        self._sizes = [count * self.width for count in self.rows.counts]
        self.constants = Constants()
        self.whole = Piece(slice(0, self.rows.total), tuple(self._parts(0, self.rows.total)))
        self._pieces: list[Piece] = []

    def join(
        self, tensors: Sequence[Tensor | None], like: Tensor, piece: Piece | None = None
    ) -> Tensor:
        """Tensors, or a piece of them, as one.

        Args:
            tensors: of the shapes; zeros in place of None.
            like: gives dtype and device of zeros.
            piece: which rows; all by default.

        Returns:
            [rows, width], in float32 at least. It may be a view of a tensor.
        """
        parts = []
        for number, first, end, padding in (piece or self.whole).parts:
            tensor = tensors[number]
            if tensor is None:
                parts.append(like.new_zeros(end - first))
            else:
                whole = end - first == self.numels[number]
                parts.append(tensor.reshape(-1) if whole else tensor.reshape(-1)[first:end])
            if padding:
                zero = self.constants.get("zero", [0.0], like.dtype, like.device)
                parts.append(zero.expand(padding))
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        return widen(joined).view(-1, self.width)

    def split(self, joined: Tensor) -> list[Tensor]:
        """The tensors in what `join` gave, as views."""
        parts = torch.split(joined.view(-1), self._sizes)
        each = zip(parts, self.numels, self._sizes, self.shapes, strict=True)
        return [(p if n == size else p[:n]).view(shape) for p, n, size, shape in each]

    def compute(
        self, like: Tensor, function: Callable[[Piece, Tensor], Sequence[Tensor]]
    ) -> tuple[Tensor, ...]:
        """What a function of rows gives for all rows.

        A CPU computes piece by piece, so that what is in between stays in its cache.

        Args:
            like: one of the tensors.
            function: takes rows, and memory [rows, width] in float32 at least; writes there, and
                returns what else each row has, each [rows].

        Returns:
            The memory of all rows, [rows, width], and what else they have.
        """
        room = like.new_empty((self.rows.total, self.width), dtype=wide(like.dtype))
        pieces = self._in_cache(like)
        if len(pieces) == 1:
            return room, *function(self.whole, room)
        found = [function(piece, room[piece.rows]) for piece in pieces]
        return room, *(torch.cat(each) for each in zip(*found, strict=True))

    def to_rows(self, groups: Tensor) -> Tensor:
        """What each row has of its group, [rows] or [1], of what groups have, [groups]."""
        return groups if self.grouped else self.rows.spread(groups)

    def ends(self, tensors: Sequence[Tensor]) -> Ends:
        """Minimum and maximum of each tensor, and the first place of each, without graph."""
        flat = [widen(tensor.detach()).reshape(-1) for tensor in tensors]
        starts = self.rows.starts
        if not in_numpy(flat[0]):
            found = [each for part in flat for each in (*part.min(0), *part.max(0))]
            low, high = torch.stack(found[::2]).view(-1, 2).unbind(1)
            places = torch.stack(found[1::2]).view(-1, 2)
            if len(starts) > 1:
                places = places + self.width * self.rows.starts_on(low.device)[:, None]
            return Ends(low, high, places)
        values, spots = np.empty((2, len(flat)), np.from_dlpack(flat[0]).dtype), []
        for number, (part, row) in enumerate(zip(flat, starts, strict=True)):
            # Not `numpy()`, after which torch refuses to resize the memory, as FSDP does.
            array = np.from_dlpack(part)
            least, most = array.argmin(), array.argmax()
            values[:, number] = array[least], array[most]
            spots.append((row * self.width + least, row * self.width + most))
        low, high = torch.from_numpy(values).unbind()
        return Ends(low, high, torch.from_numpy(np.array(spots)))

    def largest(self, tensors: Sequence[Tensor]) -> Tensor:
        """The largest magnitude of all elements, 0-dim; NaN if one is."""
        if not in_numpy(tensors[0].detach()):
            return get_total_norm(tensors, math.inf, foreach=True)
        low, high, _ = self.ends(tensors)
        return torch.maximum(-low.min(), high.max())

    def subtract(
        self, tensors: Sequence[Tensor], numbers: Sequence[float], piece: Piece, room: Tensor
    ) -> None:
        """A number of each tensor taken from its elements, in NumPy; zeros where there are none.

        Args:
            tensors: float32 of the shapes, on a CPU.
            numbers: float32 numbers, one for each tensor.
            piece: which rows.
            room: of these, [rows, width]; gets the differences.
        """
        with np.errstate(all="ignore"):
            for number, first, end, to in self._within(piece, room):
                part = np.from_dlpack(tensors[number].detach().reshape(-1))[first:end]
                np.subtract(part, numbers[number], out=to[: end - first])
                to[end - first :] = 0

    def add(self, room: Tensor, numbers: Sequence[float], piece: Piece) -> None:
        """Adds a number of each tensor to its elements in the rows of a piece, in NumPy."""
        with np.errstate(all="ignore"):
            for number, first, end, to in self._within(piece, room):
                to[: end - first] += numbers[number]

    def zeros(self, tensors: Sequence[Tensor], wanted: Sequence[bool]) -> Tensor:
        """Whether an element of each tensor is exactly zero, bool [tensors].

        Args:
            tensors: of the shapes.
            wanted: which of them to look at; false for others.
        """
        none = torch.zeros((), dtype=torch.bool, device=tensors[0].device)
        each = zip(tensors, wanted, strict=True)
        if not in_numpy(tensors[0].detach()):
            return torch.stack([(tensor == 0).any() if want else none for tensor, want in each])
        arrays = (np.from_dlpack(widen(tensor.detach())) if want else None for tensor, want in each)
        found = [array is not None and bool((array == 0).any()) for array in arrays]
        return torch.tensor(found, device="cpu")

    @staticmethod
    def _within(piece: Piece, room: Tensor) -> Iterator[tuple[int, int, int, NDArray[Any]]]:
        """The parts of a piece: tensor, first element, end, and memory with that of the zeros."""
        memory, start = room.view(-1).numpy(), 0
        for number, first, end, padding in piece.parts:
            stop = start + end - first + padding
            yield number, first, end, memory[start:stop]
            start = stop

    def _in_cache(self, like: Tensor) -> list[Piece]:
        count = max(1, _PIECE // self.width)
        if not in_numpy(like.detach()) or torch.is_grad_enabled() or self.rows.total <= count:
            return [self.whole]
        if not self._pieces:
            for start in range(0, self.rows.total, count):
                end = min(start + count, self.rows.total)
                self._pieces.append(Piece(slice(start, end), tuple(self._parts(start, end))))
        return self._pieces

    def _parts(self, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """The parts of tensors in some rows; see `Piece`."""
        each = zip(self.rows.starts, self.rows.counts, self.numels, strict=True)
        for number, (row, count, numel) in enumerate(each):
            low, high = max(start, row) - row, min(end, row + count) - row
            if low < high:
                last = min(high * self.width, numel)
                yield number, low * self.width, last, high * self.width - last


def rows_of(numbers: Tensor, piece: Piece) -> Tensor:
    """What the rows of a piece have, [rows], of what all have; [1] for what they share."""
    return numbers if len(numbers) == 1 else numbers[piece.rows]

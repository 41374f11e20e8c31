"""Where the tensors of a batch are in its buffers, and how kernels share out their work."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from diffq.kernels.weights import DTYPES
from diffq.torch_inside import unflatten

#: Most pieces of one tensor's weights: a program reads what all of them found.
PARTS = 256

_TILE = 1024
_CHUNK_TILES = 4
_LEAST_PIECE = 2**13
# Tensors begin at multiples of so many elements, for loads and matrix products of full speed.
_ALIGNMENT = 16


class Tile(NamedTuple):
    """The constants R, C and G of kernels: rows, columns, and weights of each row."""

    rows: int
    columns: int
    weights: int

    @classmethod
    def of(cls, group_size: int | None) -> Tile:
        """The tile of groups of a size; of tensors that are one group each, any tile will do."""
        weights = group_size or 64
        columns = 1 << (weights - 1).bit_length()
        return cls(max(_TILE // columns, 1), columns, weights)


class Layout:
    """The tables of a batch, and the places of its tensors in buffers of values and gradients.

    Args:
        shapes: of the tensors; each has an element.
        group_size: weights of a group; None if each tensor is one group.
        device: of the tensors.

    Attributes:
        tile: of the kernels.
        numels: weights of each tensor.
        groups: groups of all tensors.
        total: elements of a buffer.
        table, pieces, chunks: see `diffq.kernels.device.columns`.
        weight_pieces, chunk_count: numbers of programs.
    """

    def __init__(
        self, shapes: Sequence[Sequence[int]], group_size: int | None, device: torch.device
    ) -> None:
        self.tile = Tile.of(group_size)
        self.numels = [prod(shape) for shape in shapes]
        sizes = [min(group_size or numel, numel) for numel in self.numels]
        groups = [_ceil(*each) for each in zip(self.numels, sizes, strict=True)]
        padded = [_ceil(numel, _ALIGNMENT) * _ALIGNMENT for numel in self.numels]
        self.groups, self.total = sum(groups), sum(padded)
        weights = _cut(self.numels, [_piece_length(numel) for numel in self.numels])
        rows = [_ceil(numel, self.tile.weights) for numel in self.numels]
        chunks = _cut(rows, [_CHUNK_TILES * self.tile.rows] * len(rows))
        self.weight_pieces, self.chunk_count = len(weights), len(chunks)
        columns = [self.numels, _starts(padded), _starts(groups)]
        for cuts in (weights, chunks):
            counts = torch.bincount(cuts[:, 0], minlength=len(rows)).tolist()
            columns += [_starts(counts), counts]
        self.table = (
            torch.tensor(columns, dtype=torch.int64, device="cpu").T.contiguous().to(device)
        )
        self.pieces = weights.to(device, torch.int32)
        self.chunks = chunks[:, :2].to(device, torch.int32).contiguous()
        self._shapes = shapes
        self._gaps = [end - numel for end, numel in zip(padded, self.numels, strict=True)]
        self._zeros = {t: torch.zeros(_ALIGNMENT, dtype=t, device=device) for t in DTYPES}
        # Only their shapes are read.
        one = torch.empty((), device="cpu")
        self._like = [
            like
            for shape, gap in zip(shapes, self._gaps, strict=True)
            for like in (one.expand(tuple(shape)), one.expand(gap))
        ]

    def cut(self, buffer: Tensor) -> list[Tensor]:
        """The tensors in a buffer, as views."""
        return list(unflatten.cut(buffer, self._like)[::2])

    def join(self, tensors: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
        """A fresh buffer with copies of the tensors, with zeros for those that are None."""
        gap = self._zeros[dtype]
        parts = []
        for tensor, shape, missing in zip(tensors, self._shapes, self._gaps, strict=True):
            parts.append(gap.new_zeros(shape) if tensor is None else tensor)
            if missing:
                parts.append(gap[:missing])
        return unflatten.joined(parts)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _starts(counts: Sequence[int]) -> list[int]:
    return [0, *accumulate(counts)][:-1]


def _piece_length(numel: int) -> int:
    return _ceil(max(_LEAST_PIECE, _ceil(numel, PARTS)), _ALIGNMENT) * _ALIGNMENT


def _cut(totals: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """Cuts ranges from 0 in pieces of a length: index of the range, start and end, int64 [n, 3]."""
    total = torch.tensor(totals, device="cpu")
    length = torch.tensor(lengths, device="cpu")
    counts = (total + length - 1) // length
    owner = torch.repeat_interleave(counts)
    first = torch.cumsum(counts, 0) - counts
    start = (torch.arange(len(owner), device="cpu") - first[owner]) * length[owner]
    return torch.stack([owner, start, torch.minimum(start + length[owner], total[owner])], dim=1)

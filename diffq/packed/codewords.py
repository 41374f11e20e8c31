"""Weights as packed indices into a codebook."""

from __future__ import annotations

import torch
from torch import Tensor

from diffq.format.kinds.product import ProductRecord, codeword_values, index_bits
from diffq.packed import planes
from diffq.packed.weight import PackedWeight, floats, kept_floats


class PackedCodewords(PackedWeight):
    """Blocks of weights, each the codeword that its index names.

    Attributes:
        words: the codewords, [codewords, block_size].
        indices: the packed indices.
    """

    words: Tensor
    indices: Tensor

    def __init__(self, record: ProductRecord, by_rows: bool) -> None:
        """Packs a record, whose rows can be decoded alone in any case."""
        super().__init__(record.shape, getattr(torch, record.dtype))
        self._blocks = record.indices.size
        # The indices of a single codeword have no bits, of which there are no planes.
        self._bits = max(index_bits(len(record.codebook)), 1)
        words = codeword_values(record.codebook, record.scale, record.zero)
        self.keep("words", kept_floats(words))
        self.keep("indices", torch.from_numpy(planes.pack(record.indices, self._bits)))

    def values(self) -> Tensor:
        """The codeword of each block."""
        indices = planes.unpack(self.indices, self._blocks, self._bits)
        return floats(self.words).index_select(0, indices.int())

    @property
    def has_rows(self) -> bool:
        """Whether blocks lie within rows."""
        return self._columns * self.shape[0] == self._blocks

    def row_values(self, rows: Tensor) -> Tensor:
        """The codewords of the blocks of rows."""
        places = rows[:, None] * self._columns + torch.arange(self._columns, device=rows.device)
        indices = planes.unpack_at(self.indices, self._blocks, self._bits, places)
        return floats(self.words).index_select(0, indices.view(-1))

    @property
    def _columns(self) -> int:
        """Blocks in a row."""
        return self._blocks // self.shape[0]

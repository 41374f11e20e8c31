"""What segments hold, put together to tensors.

`Target` collects the pieces of one tensor, from several threads and in any order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffq.errors import FormatError
from diffq.format.entries import Entry
from diffq.format.entropy import DecodedPiece
from diffq.format.groups import merge_groups
from diffq.format.kinds.product import (
    ProductRecord,
    check_codewords,
    check_indices,
    codeword_values,
    index_bits,
)
from diffq.format.layout import Piece
from diffq.format.records import (
    MAX_BITS,
    GridRecord,
    RawRecord,
    Record,
    ScaledRecord,
    check_ranges,
    check_scale,
    zero_points,
)
from diffq.format.wire import REMEDY, damaged


@dataclass
class Target:
    """A tensor in the making.

    Attributes:
        entry: what the index says about it.
        elements: uint8, the bytes of a raw tensor, the float parameters or the codebook.
        out: flat, receives the levels or indices (uint16) or the values (float32); empty to
            check alone.
        maps: first weight of a piece -> the bitwidths of its groups.
    """

    entry: Entry
    elements: NDArray[np.uint8]
    out: NDArray[Any]
    maps: dict[int, NDArray[np.uint8]] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """The tensor, for errors."""
        return f"tensor {self.entry.name!r}"

    @property
    def parameters(self) -> NDArray[np.float32]:
        """The ranges, [ranges, 2], or the scale, [1]."""
        parameters: NDArray[np.float32] = self.elements.view("<f4").astype(np.float32, copy=False)
        return parameters.reshape(-1, 2) if self.entry.kind == "grid" else parameters

    def check_parameters(self) -> None:
        """Checks what the levels are decoded with, before they are (section 4).

        Raises:
            FormatError: a range is no range, or the index is wrong about a constant.
        """
        if self.entry.kind == "scaled":
            with _blaming(self.where):
                check_scale(self.parameters, bits=1)
        if self.entry.kind != "grid":
            return
        ranges = self.parameters
        with _blaming(self.where):
            check_ranges(ranges)
        constant = bool((ranges[:, 0] == ranges[:, 1]).all())
        if constant != self.entry.constant:
            raise damaged(self.where, f"flag 2 must be {int(constant)}", int(not constant))

    def add_elements(self, piece: Piece, data: NDArray[np.uint8]) -> None:
        """Takes the bytes of a piece, uint8 [elements, item]."""
        out = self.elements.reshape(-1, piece.part.item)[piece.start : piece.stop]
        if data.flags.c_contiguous:
            out[:] = data
            return
        for rank in range(piece.part.item):  # NumPy copies planes fastest one by one.
            out[:, rank] = data[:, rank]

    def add_levels(self, piece: Piece, decoded: DecodedPiece) -> None:
        """Takes the levels of a piece.

        Raises:
            FormatError: a bitwidth is below the tensor's minimum or above 15, or the scale
                too large.
        """
        if min(decoded.streams) < self.entry.min_bits:
            rule = f"bitwidths are at least {self.entry.min_bits}"
            raise damaged(self.where, rule, min(decoded.streams))
        if max(decoded.streams) > MAX_BITS:
            rule = f"bitwidths of levels are at most {MAX_BITS}"
            raise damaged(self.where, rule, max(decoded.streams))
        if self.entry.kind == "scaled":
            with _blaming(self.where):
                check_scale(self.parameters, max(decoded.streams))
        self.maps[piece.start] = decoded.bits
        if self.out.size:
            self._decode(piece, decoded, self.out[piece.start : piece.stop])

    def _decode(self, piece: Piece, decoded: DecodedPiece, out: NDArray[Any]) -> None:
        if out.dtype != np.float32:
            fill = partial(_copy_levels, decoded)
            merge_groups(decoded.bits, decoded.counts, piece.group_size, out, fill)
        elif self.entry.kind == "grid":
            _decode_grid(self.parameters, self.entry.zero_point, piece, decoded, out)
        else:
            _decode_scaled(self.parameters, piece, decoded, out)

    def bits(self) -> NDArray[np.uint8]:
        """The bitwidth of each group, [groups]; `min_bits` where no level is stored.

        Raises:
            FormatError: segments that share a group disagree about it.
        """
        if not self.maps:
            return np.full(self.entry.groups, self.entry.min_bits, np.uint8)
        joined: list[NDArray[np.uint8]] = []
        last = 0
        for start, bits in sorted(self.maps.items()):
            continued = start % self.entry.group_size != 0
            if continued and bits[0] != last:
                raise FormatError(
                    f"The group of weight {start} must have one bitwidth, got {last} and {bits[0]}."
                )
            joined.append(bits[1:] if continued else bits)
            last = bits[-1]
        return np.concatenate(joined)

    def record(self) -> Record:
        """The tensor as a record.

        Raises:
            FormatError: what was decoded contradicts itself.
        """
        entry = self.entry
        with _blaming(self.where):
            if entry.kind == "raw":
                return RawRecord(entry.shape, entry.dtype, entry.stored_dtype, self.elements)
            head = entry.shape, entry.dtype, entry.group_size, entry.min_bits
            if entry.kind == "grid":
                fields = self.bits(), self.out, self.parameters, entry.zero_point
                return GridRecord(*head, *fields)
            return ScaledRecord(*head, self.bits(), self.out, self.parameters)

    def values(self) -> NDArray[np.float32]:
        """The decoded weights in the tensor's shape.

        Raises:
            FormatError: segments that share a group disagree about it.
        """
        if self.entry.constant:
            # As everywhere, low is added to level * step, which makes 0.0 of -0.0.
            low = self.parameters[:, 0] + np.float32(0)
            self.out[:] = _per_weight(low, self.entry.group_size, self.out.size)
        self.check_bits()
        return self.out.reshape(self.entry.shape)

    def check_bits(self) -> None:
        """Raises FormatError if segments that share a group disagree about its bitwidth."""
        with _blaming(self.where):
            self.bits()


class ProductTarget(Target):
    """A tensor of indices into a codebook in the making."""

    def check_parameters(self) -> None:
        """Checks the codewords.

        Raises:
            FormatError: one is not finite.
        """
        with _blaming(self.where):
            check_codewords(self._codebook)

    def add_levels(self, piece: Piece, decoded: DecodedPiece) -> None:
        """Takes the indices of a piece.

        Raises:
            FormatError: their bitwidth is another one than they need, or one names no codeword.
        """
        width = index_bits(self.entry.codewords)
        if list(decoded.streams) != [width]:
            rule = f"indices of {self.entry.codewords} codewords have {width} bits"
            raise damaged(self.where, rule, max(decoded.streams))
        indices = decoded.streams[width]
        with _blaming(self.where):
            check_indices(indices, self.entry.codewords)
        if self.out.dtype == np.uint16:
            self.out[piece.start : piece.stop] = indices
        elif self.out.size:
            blocks = self.out.reshape(-1, self.entry.block_size)[piece.start : piece.stop]
            # With a mode other than "raise", NumPy writes to `out` without a copy.
            np.take(self._words, indices, axis=0, out=blocks, mode="clip")

    def record(self) -> Record:
        """The tensor as a record.

        Raises:
            FormatError: what was decoded contradicts itself.
        """
        entry = self.entry
        with _blaming(self.where):
            scale = entry.scale, entry.zero
            return ProductRecord(entry.shape, entry.dtype, self._codebook, self.out, *scale)

    def values(self) -> NDArray[np.float32]:
        """The decoded weights in the tensor's shape."""
        if self.entry.codewords == 1:
            self.out.reshape(-1, self.entry.block_size)[:] = self._words
        return self.out.reshape(self.entry.shape)

    def check_bits(self) -> None:
        """Nothing: each piece's bitwidth was checked by itself."""

    @property
    def _codebook(self) -> NDArray[Any]:
        """The codewords as they are stored, [codewords, block_size]."""
        stored = np.dtype(self.entry.stored_dtype)
        little = self.elements.view(stored.newbyteorder("<"))
        words: NDArray[Any] = little.astype(stored, copy=False)
        return words.reshape(-1, self.entry.block_size)

    @cached_property
    def _words(self) -> NDArray[np.float32]:
        """The codewords that the stored ones stand for."""
        return codeword_values(self._codebook, self.entry.scale, self.entry.zero)


@contextmanager
def _blaming(where: str) -> Iterator[None]:
    """Says which tensor an error is about."""
    try:
        yield
    except FormatError as error:
        raise FormatError(f"{where}: {error} {REMEDY}") from error


def _copy_levels(decoded: DecodedPiece, width: int, part: NDArray[np.uint16]) -> None:
    part[:] = decoded.streams[width]


def _decode_grid(
    ranges: NDArray[np.float32],
    zero_point: bool,
    piece: Piece,
    decoded: DecodedPiece,
    out: NDArray[np.float32],
) -> None:
    """What `GridRecord.values` computes, with the levels of each bitwidth at a time."""
    shared = len(ranges) == 1
    low, high = (ranges if shared else ranges[piece.groups]).T

    def fill(width: int, part: NDArray[np.float32]) -> None:
        levels: NDArray[Any] = decoded.streams[width]
        if not shared:
            part[:] = levels
            return
        top, added = np.array([(1 << width) - 1], np.float32), low
        if zero_point:
            zero, added = zero_points(low, high, top)
            levels = np.subtract(levels, zero, out=part, dtype=np.float32)
        np.multiply(levels, (high - low) / top, out=part, dtype=np.float32)
        part += added

    merge_groups(decoded.bits, decoded.counts, piece.group_size, out, fill)
    if not shared:
        top = ((np.uint32(1) << decoded.bits.astype(np.uint32)) - np.uint32(1)).astype(np.float32)
        step, added = (high - low) / top, low
        if zero_point:
            zero, added = zero_points(low, high, top)
            out -= _per_weight(zero, piece.group_size, out.size)
        out *= _per_weight(step, piece.group_size, out.size)
        out += _per_weight(added, piece.group_size, out.size)


def _decode_scaled(
    scale: NDArray[np.float32], piece: Piece, decoded: DecodedPiece, out: NDArray[np.float32]
) -> None:
    """What `ScaledRecord.values` computes, with the levels of each bitwidth at a time."""

    def fill(width: int, part: NDArray[np.float32]) -> None:
        np.subtract(decoded.streams[width], 1 << (width - 1), out=part, dtype=np.float32)
        part *= scale

    merge_groups(decoded.bits, decoded.counts, piece.group_size, out, fill)


def _per_weight(per_group: NDArray[np.float32], group_size: int, numel: int) -> NDArray[np.float32]:
    """One value per group, or one for all, for each weight."""
    return per_group if per_group.size == 1 else np.repeat(per_group, group_size)[:numel]

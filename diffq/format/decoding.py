"""What segments hold, put together to tensors, from several threads and in any order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffq.errors import FormatError
from diffq.format.entropy import DecodedPiece
from diffq.format.kinds.base import Entry, QuantizedEntry, Record
from diffq.format.layout import Piece
from diffq.format.wire import REMEDY


@dataclass
class Target:
    """A tensor in the making.

    Attributes:
        entry: what the index says about it.
        elements: uint8, the bytes of a raw tensor, the float parameters or the codebook.
    """

    entry: Entry
    elements: NDArray[np.uint8]

    def add_elements(self, piece: Piece, data: NDArray[np.uint8]) -> None:
        """Takes the bytes of a piece, uint8 [elements, item]."""
        out = self.elements.reshape(-1, piece.part.item)[piece.start : piece.stop]
        if data.flags.c_contiguous:
            out[:] = data
            return
        for rank in range(piece.part.item):  # NumPy copies planes fastest one by one.
            out[:, rank] = data[:, rank]

    def record(self) -> Record:
        """The tensor as a record.

        Raises:
            FormatError: what was decoded contradicts itself.
        """
        with self.blamed():
            return self.entry.record(self.elements, np.empty(0, np.uint16), np.empty(0, np.uint8))

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Says of an error which tensor it is about."""
        try:
            yield
        except FormatError as error:
            raise FormatError(f"{self.entry.where}: {error} {REMEDY}") from error


@dataclass
class QuantizedTarget(Target):
    """A tensor in the making whose weights are computed from integers.

    Attributes:
        out: flat, receives the integers (uint16) or the values (float32); empty to check alone.
        maps: first integer of a piece -> the bitwidths of its groups.
    """

    entry: QuantizedEntry
    out: NDArray[Any]
    maps: dict[int, NDArray[np.uint8]] = field(default_factory=dict)

    def check_elements(self) -> None:
        """Checks what the integers are decoded with, before they are (section 4).

        Raises:
            FormatError: a parameter breaks a rule, or the index is wrong about a constant.
        """
        with self.blamed():
            self.entry.check_elements(self.elements)

    def add_levels(self, piece: Piece, decoded: DecodedPiece) -> None:
        """Takes the integers of a piece.

        Raises:
            FormatError: one breaks a rule of the tensor's kind.
        """
        with self.blamed():
            self.entry.check_piece(decoded, self.elements)
        self.maps[piece.start] = decoded.bits
        if self.out.dtype == np.uint16:
            decoded.merge(piece.group_size, self.out[piece.start : piece.stop])
        elif self.out.size:
            # Weights that an integer stands for: one, or a block.
            step = self.out.size // self.entry.integers
            out = self.out[piece.start * step : piece.stop * step]
            self.entry.decode(self.elements, piece, decoded, out)

    def bits(self) -> NDArray[np.uint8]:
        """The bitwidth of each group, [groups]; none where no integers are stored.

        Raises:
            FormatError: segments that share a group disagree about it.
        """
        stored = self.entry.stored_integers
        if not stored:
            return np.empty(0, np.uint8)
        joined: list[NDArray[np.uint8]] = []
        last = 0
        for start, bits in sorted(self.maps.items()):
            continued = start % stored.group_size != 0
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
        with self.blamed():
            return self.entry.record(self.elements, self.out, self.bits())

    def values(self) -> NDArray[np.float32]:
        """The decoded weights in the tensor's shape.

        Raises:
            FormatError: segments that share a group disagree about it.
        """
        if not self.entry.stored_integers:
            self.entry.fill(self.elements, self.out)
        self.check_bits()
        return self.out.reshape(self.entry.shape)

    def check_bits(self) -> None:
        """Raises FormatError if segments that share a group disagree about its bitwidth."""
        with self.blamed():
            self.bits()


def quantized_target(entry: QuantizedEntry, dtype: type[np.generic] | None) -> QuantizedTarget:
    """Memory for a tensor.

    Args:
        entry: what the index says about it.
        dtype: uint16 for the record, float32 for the values, None to check alone.
    """
    count = {np.uint16: entry.integers, np.float32: entry.numel, None: 0}[dtype]
    # Integers that are not stored are zero.
    make = np.empty if entry.stored_integers else np.zeros
    return QuantizedTarget(entry, np.empty(entry.element_bytes, np.uint8), make(count, dtype))

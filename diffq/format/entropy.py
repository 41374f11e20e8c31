"""Levels and bit maps to few bytes and back (docs/format.md, sections 6 and 7).

In a segment, the levels of each bitwidth are a stream of their own, and so is the bit
map. A stream is packed either at its own width or at a wider one of 2, 4 or 8 bits, so
that a byte holds whole symbols and the Huffman stage of zstd sees them. Which width
gives the fewest bytes is measured for each stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffq.errors import FormatError
from diffq.format import bitpack, frames
from diffq.format.groups import merge_groups, split_groups, stream_counts
from diffq.format.layout import Piece
from diffq.format.wire import Cursor, damaged

#: Widths at which narrower symbols can be packed, so that bytes hold whole symbols.
WIDER = (2, 4, 8)

# Symbols of a stream that are compressed to find its best width.
_SAMPLE = 1 << 16


@dataclass(frozen=True)
class Coding:
    """How the payload of a segment of levels is cut in streams.

    Attributes:
        map_width: bits of each entry of the packed bit map; 0 where all are equal.
        stored_widths: bitwidth in use -> bits at which its levels are packed, rising.
    """

    map_width: int
    stored_widths: dict[int, int]

    @property
    def widths(self) -> tuple[int, ...]:
        """The bitwidths in use, rising."""
        return tuple(self.stored_widths)


@dataclass(frozen=True)
class LevelPiece:
    """Groups of one tensor within a segment.

    Attributes:
        where: the tensor, for errors.
        bits: uint8 [groups].
        levels: [weights] of an unsigned dtype.
        group_size: weights per group; the last may be short.
        start: the first weight's place in the tensor.
        columns: weights in a row of the tensor; 0 if it has none.
    """

    where: str
    bits: NDArray[np.uint8]
    levels: NDArray[np.uint16]
    group_size: int
    start: int
    columns: int

    def streams(self) -> dict[int, NDArray[np.uint16]]:
        """The levels of each bitwidth.

        Raises:
            FormatError: a level does not fit its bitwidth.
        """
        streams = split_groups(self.levels, self.bits, self.group_size)
        for width, levels in streams.items():
            if int(levels.max()) >> width:
                rule = f"{self.where}: levels of {width} bits must be below {1 << width}"
                raise FormatError(f"{rule}, got {levels.max()}.")
        return streams


def entropy_bits(counts: NDArray[np.integer]) -> float:
    """Zeroth-order entropy of symbols that occur `counts` times, in bits for all of them."""
    used = counts[counts > 0].astype(np.float64)
    total = used.sum()
    return float(total * np.log2(total) - (used * np.log2(used)).sum()) if used.size else 0.0


def encode(pieces: Sequence[LevelPiece], compress: bool) -> tuple[Coding, int, bytes]:
    """Codes the bit maps and levels of a segment.

    Args:
        pieces: at least one, none empty.
        compress: use zstd where that is smaller.

    Returns:
        how the payload is cut, the payload's size in bytes, and the stored bytes: the
        payload itself or a zstd frame of it.

    Raises:
        FormatError: a level does not fit its bitwidth.
    """
    streams = _streams(pieces)
    plain = [stream.width for stream in streams]
    if compress:
        best = [_best_width(stream) for stream in streams]
        blocks = _blocks(streams, best)
        stored = frames.compress(blocks, frames.LEVELS)
        if len(stored) < sum(block.size for block in _blocks(streams, plain)):
            return _coding(streams, best), sum(block.size for block in blocks), stored
    stored = np.concatenate([*_blocks(streams, plain)]).tobytes()
    return _coding(streams, plain), len(stored), stored


@dataclass(frozen=True)
class _Stream:
    width: int
    symbols: NDArray[np.unsignedinteger]

    def blocks(self, stored_width: int) -> list[NDArray[np.uint8]]:
        """The packed symbols, cut between the fields: their statistics differ."""
        if not stored_width:
            return []
        packed = bitpack.pack(self.symbols, stored_width)
        sizes = [-(-self.symbols.size * field // 8) for field, _ in bitpack.fields(stored_width)]
        return np.split(packed, np.cumsum(sizes)[:-1])


def _blocks(streams: Sequence[_Stream], widths: Sequence[int]) -> list[NDArray[np.uint8]]:
    pairs = zip(streams, widths, strict=True)
    return [block for stream, width in pairs for block in stream.blocks(width)]


def _coding(streams: Sequence[_Stream], widths: Sequence[int]) -> Coding:
    levels = zip(streams[1:], widths[1:], strict=True)
    return Coding(widths[0], {stream.width: width for stream, width in levels})


def _streams(pieces: Sequence[LevelPiece]) -> list[_Stream]:
    """The bit map, counted from its minimum, then the levels by rising bitwidth."""
    bits = np.concatenate([piece.bits for piece in pieces])
    offsets = bits - bits.min()
    levels = [_Stream(width, stream) for width, stream in level_streams(pieces).items()]
    return [_Stream(int(offsets.max()).bit_length(), offsets), *levels]


def level_streams(pieces: Sequence[LevelPiece]) -> dict[int, NDArray[np.uint16]]:
    """The levels of each bitwidth of all pieces, by rising bitwidth.

    Raises:
        FormatError: a level does not fit its bitwidth.
    """
    by_width: dict[int, list[NDArray[np.uint16]]] = {}
    for piece in pieces:
        for width, levels in piece.streams().items():
            by_width.setdefault(width, []).append(levels)
    return {width: np.concatenate(by_width[width]) for width in sorted(by_width)}


def _best_width(stream: _Stream) -> int:
    """The width at which zstd makes the fewest bytes of a stream; the narrowest of equals."""
    widths = [stream.width, *(wider for wider in WIDER if wider > stream.width)]
    if not stream.width or len(widths) == 1:
        return stream.width
    sample = _Stream(stream.width, stream.symbols[:_SAMPLE])
    return min(widths, key=lambda width: len(frames.compress(sample.blocks(width), frames.LEVELS)))


@dataclass(frozen=True)
class DecodedPiece:
    """What a segment holds of one tensor.

    Attributes:
        bits: uint8 [groups].
        streams: bitwidth -> levels, uint8 up to 8 bits and uint16 above.
    """

    bits: NDArray[np.uint8]
    streams: dict[int, NDArray[Any]]

    @property
    def counts(self) -> dict[int, int]:
        """Number of weights at each bitwidth in use."""
        return {width: stream.size for width, stream in self.streams.items()}

    def merge(self, group_size: int, out: NDArray[Any]) -> None:
        """Writes the levels to `out`, of any dtype, in the order of the weights."""

        def fill(width: int, part: NDArray[Any]) -> None:
            part[:] = self.streams[width]

        merge_groups(self.bits, self.counts, group_size, out, fill)


def decode(
    payload: bytes | memoryview, coding: Coding, pieces: Sequence[Piece], where: str
) -> list[DecodedPiece]:
    """Inverse of `encode`.

    Args:
        payload: the streams' bytes.
        coding: how they are cut.
        pieces: what the segment holds.
        where: the segment, for errors.

    Raises:
        FormatError: the payload contradicts `coding` or `pieces`.
    """
    cursor = Cursor(payload, where)
    bits = _decode_map(cursor, coding, sum(piece.group_count for piece in pieces), where)
    shares = Shares.of(bits, pieces, coding.widths, where)
    streams = {
        width: _decode_stream(cursor, count, width, coding.stored_widths[width])
        for width, count in shares.totals().items()
    }
    cursor.end()
    return shares.deal(streams)


@dataclass(frozen=True, eq=False)
class Shares:
    """What each piece of a segment has of the streams.

    Attributes:
        maps: the bitwidths of each piece's groups.
        counts: for each piece bitwidth -> levels.
    """

    maps: list[NDArray[np.uint8]]
    counts: list[dict[int, int]]

    @classmethod
    def of(
        cls, bits: NDArray[np.uint8], pieces: Sequence[Piece], widths: Sequence[int], where: str
    ) -> Shares:
        """Cuts the bit map of a segment.

        Args:
            bits: the bitwidths of all groups.
            pieces: what the segment holds.
            widths: the bitwidths in use, rising.
            where: the segment, for errors.

        Raises:
            FormatError: the bit map uses other bitwidths.
        """
        maps = np.split(bits, np.cumsum([piece.group_count for piece in pieces])[:-1])
        pairs = zip(maps, pieces, strict=True)
        counts = [stream_counts(bits, piece.group_size, piece.count) for bits, piece in pairs]
        used = sorted({width for count in counts for width in count})
        if used != list(widths):
            raise damaged(where, f"the bit map must use the bitwidths {list(widths)}", used)
        return cls(maps, counts)

    def totals(self) -> dict[int, int]:
        """Levels of each bitwidth, by rising bitwidth."""
        widths = sorted({width for count in self.counts for width in count})
        return {width: sum(count.get(width, 0) for count in self.counts) for width in widths}

    def deal(self, streams: Mapping[int, NDArray[Any]]) -> list[DecodedPiece]:
        """Hands each piece its share of every stream."""
        used, pieces = dict.fromkeys(streams, 0), []
        for bits, count in zip(self.maps, self.counts, strict=True):
            parts = {width: streams[width][used[width] :][:n] for width, n in count.items()}
            for width, number in count.items():
                used[width] += number
            pieces.append(DecodedPiece(bits, parts))
        return pieces


def _decode_map(cursor: Cursor, coding: Coding, groups: int, where: str) -> NDArray[np.uint8]:
    lowest, highest = min(coding.stored_widths), max(coding.stored_widths)
    if not coding.map_width:
        return np.full(groups, lowest, np.uint8)
    offsets = _unpack(cursor, groups, coding.map_width)
    if offsets.max() > highest - lowest:
        rule = f"a bitwidth of the bit map is at most {highest}"
        raise damaged(where, rule, lowest + int(offsets.max()))
    bits: NDArray[np.uint8] = offsets + np.uint8(lowest)
    return bits


def _decode_stream(cursor: Cursor, count: int, width: int, stored_width: int) -> NDArray[Any]:
    levels = _unpack(cursor, count, stored_width)
    if stored_width > width and int(levels.max()) >> width:
        rule = f"levels of {width} bits must be below {1 << width}"
        raise damaged(cursor.where, rule, levels.max())
    return levels


def _unpack(cursor: Cursor, count: int, width: int) -> NDArray[Any]:
    """The symbols of one stream, in one byte each up to 8 bits, else in two."""
    packed = np.frombuffer(cursor.take(bitpack.packed_size(count, width), "a stream"), np.uint8)
    if width == 8:
        return packed
    symbols = np.empty(count, np.uint8 if width < 8 else np.uint16)
    try:
        bitpack.unpack_into(packed, symbols, width)
    except FormatError as error:
        raise damaged(cursor.where, "padding bits must be zero", "ones") from error
    return symbols

"""Levels and bit maps as runs of rANS and back (docs/format.md, section 14).

Where zstd spends a whole bit on a symbol at least, this spends what the symbol is worth. The
runs of a segment are its marks, its bit map, and the levels of each bitwidth and class.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffq.format import costs, rans
from diffq.format.bitpack import MAX_BITS
from diffq.format.contexts import CLASSES, Contexts, Rows, choose
from diffq.format.entropy import DecodedPiece, LevelPiece, Shares, level_streams
from diffq.format.layout import Piece
from diffq.format.wire import Cursor, damaged, varint

# A lane takes 4 bytes of a segment, and a row of lanes the time of some 500 symbols.
_BYTES_PER_LANE = 480
_MOST_ROWS = 9 << 10
_MOST_LANES = 1 << 10
# Bytes that a segment takes at least beside its words.
_LEAST_BYTES = 16


@dataclass(frozen=True)
class RunCoding:
    """What the index says about a segment in rANS.

    Attributes:
        widths: the bitwidths in use, rising.
    """

    widths: tuple[int, ...]


def encode(pieces: Sequence[LevelPiece], most: int) -> tuple[RunCoding, bytes] | None:
    """Codes the bit maps and levels of a segment, if that takes at most so many bytes.

    Args:
        pieces: at least one, none empty.
        most: the most bytes that are of use.

    Returns:
        what the index says, and the stored bytes; or None.

    Raises:
        FormatError: a level does not fit its bitwidth.
    """
    streams = level_streams(pieces)
    contexts = choose(pieces, streams)
    runs: list[NDArray[np.unsignedinteger]] = [contexts.marks]
    if len(streams) > 1:
        runs.append(np.concatenate([piece.bits for piece in pieces]))
    classes = contexts.streams([(piece.bits, piece.group_size) for piece in pieces])
    for width, levels in streams.items():
        runs += [levels[chosen] for chosen in _chosen(contexts, classes[width])]
    counts = [np.bincount(run) for run in runs]
    models = [rans.Model.of(count) for count in counts]
    bounds = bytes([contexts.lowest, contexts.highest])
    columns = [varint(piece.columns) for piece in contexts.pieces]
    tail = b"".join([bounds, *columns, *(model.write() for model in models)])
    size = sum(int(costs.entropy(count)) for count in counts) // (8 * costs.UNIT)
    # Words and states never take less than the entropy of the runs, but for a few bytes.
    if size + len(tail) > most:
        return None
    states, words = rans.encode(list(zip(models, runs, strict=True)), _lanes(counts, size))
    head = varint(states.size) + varint(words.size) + states.tobytes() + words.tobytes()
    if len(head) + len(tail) > most:
        return None
    return RunCoding(tuple(streams)), head + tail


def _lanes(counts: Sequence[NDArray[np.int64]], size: int) -> int:
    """As many lanes as pay by their speed for what their states take.

    Args:
        counts: how often the symbols of each run occur.
        size: bytes that the symbols are worth.
    """
    symbols = sum(int(count.sum()) for count in counts if np.count_nonzero(count) > 1)
    least = -(-symbols // min(_MOST_ROWS, rans.ROWS_PER_BYTE * (size + _LEAST_BYTES)))
    return min(max(size // _BYTES_PER_LANE, least, 1), _MOST_LANES)


def decode(
    stored: memoryview, coding: RunCoding, pieces: Sequence[Piece], where: str
) -> list[DecodedPiece]:
    """Inverse of `encode`.

    Args:
        stored: the stored bytes.
        coding: what the index says.
        pieces: what the segment holds.
        where: the segment, for errors.

    Raises:
        FormatError: a rule of section 14 is broken.
    """
    reader = _Reader(Cursor(stored, where))
    contexts = _read_contexts(reader, pieces)
    bits = _read_map(reader, coding, sum(piece.group_count for piece in pieces))
    shares = Shares.of(bits, pieces, coding.widths, where)
    pairs = zip(shares.maps, pieces, strict=True)
    classes = contexts.streams([(bits, piece.group_size) for bits, piece in pairs])
    streams = {}
    for width in coding.widths:
        levels = np.empty(classes[width].size, np.uint8 if width <= 8 else np.uint16)
        for chosen in _chosen(contexts, classes.pop(width)):
            levels[chosen] = reader.run(int(chosen.sum()), 1 << width)
        streams[width] = levels
    reader.end()
    return shares.deal(streams)


def _chosen(contexts: Contexts, classes: NDArray[np.uint8]) -> Iterator[NDArray[np.bool_]]:
    """Which levels each class has, without those that have none."""
    for number in range(contexts.lowest, contexts.highest + 1):
        chosen = classes == number
        if chosen.any():
            yield chosen


class _Reader:
    """Reads runs: their models as they are needed, from behind the states and words.

    Args:
        cursor: the stored bytes.

    Raises:
        FormatError: states or words are missing or wrong.
    """

    def __init__(self, cursor: Cursor) -> None:
        self.cursor = cursor
        rows = min(rans.MAX_ROWS, rans.ROWS_PER_BYTE * cursor.remaining)
        lanes, words = cursor.varint("the number of lanes"), cursor.varint("the number of words")
        if not 1 <= lanes <= rans.MAX_LANES:
            raise damaged(cursor.where, f"there are from 1 to {rans.MAX_LANES} lanes", lanes)
        states = np.frombuffer(cursor.take(4 * lanes, "the states"), "<u4")
        if states.min() < rans.TOTAL:
            raise damaged(cursor.where, f"a state is at least {rans.TOTAL}", states.min())
        stored = np.frombuffer(cursor.take(2 * words, "the words"), "<u2")
        self._decoder = rans.Decoder(states, stored, cursor.where, rows)

    def run(self, count: int, limit: int) -> NDArray[Any]:
        """The next run: `count` symbols below `limit`, a byte each if that holds them."""
        model = rans.Model.read(self.cursor, limit)
        return self._decoder.run(model, count, np.uint8 if limit <= 256 else np.uint16)

    def end(self) -> None:
        """Checks that nothing is left over."""
        self.cursor.end()
        self._decoder.end()


def _read_contexts(reader: _Reader, pieces: Sequence[Piece]) -> Contexts:
    cursor = reader.cursor
    lowest, highest = cursor.fixed(1, "the lowest class"), cursor.fixed(1, "the highest class")
    if not lowest <= highest < CLASSES:
        rule = f"classes rise and are below {CLASSES}"
        raise damaged(cursor.where, rule, f"{lowest} to {highest}")
    cuts = []
    for piece in pieces:
        columns = cursor.varint("the number of columns")
        if columns > piece.count:
            rule = f"a piece of {piece.count} levels has rows of at most as many"
            raise damaged(cursor.where, rule, columns)
        cuts.append(Rows(columns, piece.start, piece.count))
    marks = reader.run(sum(cut.marks for cut in cuts), CLASSES)
    return Contexts(cuts, marks, lowest, highest)


def _read_map(reader: _Reader, coding: RunCoding, groups: int) -> NDArray[np.uint8]:
    """The bitwidths of all groups."""
    if len(coding.widths) == 1:
        return np.full(groups, coding.widths[0], np.uint8)
    return reader.run(groups, MAX_BITS + 1)

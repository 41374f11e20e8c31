"""A range variant of asymmetric numeral systems (rANS, arXiv:1311.2540) in NumPy.

Symbols are coded in runs, each with frequencies of its own (docs/format.md, section 14). Lanes
of 32-bit states take turns: a step codes one symbol in each lane, so that NumPy works on a row
of them, and all lanes share one sequence of 16-bit words.

Frequencies sum to 2**16, the unit in which states move words out and in. So the slot that
names a symbol is the lower half of a state, what remains of it the upper half, and both are
views. Everything is whole numbers: the same symbols give the same bytes everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffq.format.wire import Cursor, damaged, varint

#: Sum of the frequencies of a model, and the lowest state.
TOTAL = 1 << 16

#: Most lanes that a reader accepts.
MAX_LANES = 1 << 12

#: Most rows of lanes that a reader accepts, in all and for each stored byte: a row takes the time
#: of many symbols, however few lanes it has.
MAX_ROWS = 1 << 14
ROWS_PER_BYTE = 16

_SLOTS = np.arange(TOTAL, dtype="<u8")
# As an array, NumPy compares with it in half the time.
_LEAST = np.array(TOTAL, "<u4")

# Symbols that are looked up at a time: their slots stay in a core's cache.
_BLOCK = 1 << 14

Words = NDArray[np.uint16]
States = NDArray[np.uint32]


@dataclass(frozen=True, eq=False)
class Model:
    """The symbols of a run and how frequent they are.

    Attributes:
        symbols: uint16, rising.
        frequencies: int64, one of at least 1 for each symbol; they sum to `TOTAL`.
    """

    symbols: NDArray[np.uint16]
    frequencies: NDArray[np.int64]

    @classmethod
    def of(cls, counts: NDArray[np.int64]) -> Model:
        """The model of symbols 0, 1, … that occur `counts` times, from 1 to 2**30 in all.

        Each symbol that occurs gets 1; the rest is dealt out in proportion to what their shares
        exceed 1 by, and what rounding leaves over goes to the largest remainders.
        """
        symbols = np.flatnonzero(counts)
        used = counts[symbols].astype(np.int64)
        above = np.maximum(used * TOTAL - used.sum(), 0)
        free = TOTAL - symbols.size
        shares, rest = np.divmod(above * free, max(int(above.sum()), 1))
        most = np.argsort(-rest, kind="stable")[: free - int(shares.sum())]
        shares[most] += 1
        return cls(symbols.astype(np.uint16), shares + 1)

    @property
    def starts(self) -> NDArray[np.int64]:
        """First slot of each symbol."""
        return np.cumsum(self.frequencies) - self.frequencies

    @property
    def certain(self) -> bool:
        """Whether there is one symbol alone, which takes no bits."""
        return self.symbols.size == 1

    def write(self) -> bytes:
        """The first symbol, then frequencies up to the last, with runs of zeros cut short."""
        out, last = [varint(int(self.symbols[0]))], int(self.symbols[0]) - 1
        for symbol, frequency in zip(self.symbols.tolist(), self.frequencies.tolist(), strict=True):
            if symbol - last > 1:
                out.append(varint(0) + varint(symbol - last - 2))
            out.append(varint(frequency))
            last = symbol
        return b"".join(out)

    @classmethod
    def read(cls, cursor: Cursor, limit: int) -> Model:
        """Inverse of `write`.

        Args:
            cursor: where to read.
            limit: all symbols must be below.

        Raises:
            FormatError: the frequencies do not sum to `TOTAL`, or a symbol is not below `limit`.
        """
        symbol, left = cursor.varint("a symbol"), TOTAL
        symbols, frequencies = [], []
        while left:
            if symbol >= limit:
                raise damaged(cursor.where, f"a symbol must be below {limit}", symbol)
            frequency = cursor.varint("a frequency")
            if frequency > left:
                rule = f"the frequencies of a run must sum to {TOTAL}"
                raise damaged(cursor.where, rule, TOTAL - left + frequency)
            if frequency:
                symbols.append(symbol)
                frequencies.append(frequency)
                symbol += 1
            else:
                symbol += 1 + cursor.varint("a gap of symbols")
            left -= frequency
        return cls(np.array(symbols, np.uint16), np.array(frequencies, np.int64))


def encode(
    runs: Sequence[tuple[Model, NDArray[np.unsignedinteger]]], lanes: int
) -> tuple[States, Words]:
    """Codes runs of symbols one after the other.

    Args:
        runs: for each run its model, and symbols that all have a frequency there.
        lanes: number of lanes, from 1 to `MAX_LANES`.

    Returns:
        what `Decoder` takes: a state for each lane, and the words.
    """
    states = np.full(lanes, TOTAL, "<u4")
    words: list[Words] = []
    # What is decoded first is encoded last.
    for model, symbols in reversed(runs):
        if not model.certain:
            _encode_run(model, symbols, states, words)
    return states, np.concatenate([*reversed(words), np.empty(0, "<u2")])


def _encode_run(
    model: Model, symbols: NDArray[np.unsignedinteger], states: States, words: list[Words]
) -> None:
    """Puts the symbols of a run on the lanes, the last one first."""
    places = np.zeros(int(model.symbols[-1]) + 1, np.intp)
    places[model.symbols] = np.arange(model.symbols.size)
    tables = model.frequencies.astype("<u4"), model.starts.astype("<u4")
    lanes = states.size
    step = _rows(lanes) * lanes
    for start in reversed(range(0, symbols.size, step)):
        place = places[symbols[start : start + step]]
        frequencies, starts = (table[place] for table in tables)
        for row in reversed(range(0, place.size, lanes)):
            chosen = slice(row, row + lanes)
            _push(states[: place.size - row], frequencies[chosen], starts[chosen], words)


def _push(x: States, frequencies: States, starts: States, words: list[Words]) -> None:
    """Puts a symbol on each lane, after a word where the state would grow past 32 bits."""
    low, high = _halves(x)
    full = high >= frequencies
    words.append(low[full])
    np.right_shift(x, 16, out=x, where=full)
    # TOTAL * (x // frequency) + x % frequency + start
    quotients = x // frequencies
    quotients *= TOTAL - frequencies
    x += quotients
    x += starts


class Decoder:
    """Reads runs of symbols, in the order in which they were encoded.

    Args:
        states: a state of at least `TOTAL` for each lane.
        words: the words.
        where: what is decoded, for errors.
        rows: most rows of lanes that runs of several symbols may take.
    """

    def __init__(self, states: States, words: Words, where: str, rows: int = MAX_ROWS) -> None:
        self._states, self._words, self._where = states.astype("<u4"), words, where
        self._used, self._rows, self._most_rows = 0, 0, rows

    def run(self, model: Model, count: int, dtype: type[np.unsignedinteger]) -> NDArray[Any]:
        """The next `count` symbols.

        Raises:
            FormatError: there are too few words, or too few lanes for so many symbols.
        """
        if model.certain:
            return np.full(count, model.symbols[0], dtype)
        self._rows += -(-count // self._states.size)
        if self._rows > self._most_rows:
            rule = f"the runs may take {self._most_rows} rows of {self._states.size} lanes"
            raise damaged(self._where, rule, self._rows)
        symbols = np.repeat(model.symbols, model.frequencies).astype(dtype)
        steps = _steps(model)
        out = np.empty(count, dtype)
        lanes = self._states.size
        slots = np.empty((_rows(lanes), lanes), np.intp)
        whole = count // lanes
        for start in range(0, whole, len(slots)):
            rows = slots[: whole - start]
            self._pop(steps, rows)
            part = out[start * lanes :][: rows.size]
            # With a mode other than "raise", NumPy writes to `out` without a copy.
            symbols.take(rows.reshape(-1), out=part, mode="wrap")
        rest = slots[:1, : count - whole * lanes]
        self._pop(steps, rest)
        out[whole * lanes :] = symbols[rest[0]]
        return out

    def end(self) -> None:
        """Checks that all was decoded: every word is read, and every lane where it began.

        Raises:
            FormatError: something is left.
        """
        left = self._words.size - self._used
        if left:
            raise damaged(self._where, "no word may be left over", left)
        if (self._states != TOTAL).any():
            raise damaged(self._where, f"the lanes must end at {TOTAL}", self._states.max())

    def _pop(self, steps: NDArray[np.uint64], slots: NDArray[np.intp]) -> None:
        """Takes rows of symbols, one off each of the first lanes: writes their slots."""
        x = self._states[: slots.shape[1]]
        low, high = _halves(x)
        step = np.empty(x.size, "<u8")
        offset, frequency = step.view("<u4").reshape(-1, 2).T
        words, used = self._words, self._used
        short = np.empty(x.size, np.bool_)
        for row in slots:
            row[:] = low
            steps.take(row, out=step, mode="wrap")
            np.multiply(frequency, high, x)
            np.add(x, offset, x)
            np.less(x, _LEAST, short)
            empty = short.nonzero()[0]
            more = used + empty.size
            if more > words.size:
                rule = f"the runs must need {words.size} words"
                raise damaged(self._where, rule, "more")
            high[empty] = low[empty]
            low[empty] = words[used:more]
            used = more
        self._used = used


def _steps(model: Model) -> NDArray[np.uint64]:
    """For each slot what makes the next state: its symbol's frequency above, its offset below."""
    steps = np.repeat((model.frequencies << 32) - model.starts, model.frequencies).astype("<u8")
    steps += _SLOTS
    return steps


def _rows(lanes: int) -> int:
    return max(1, _BLOCK // lanes)


def _halves(x: States) -> tuple[Words, Words]:
    """The lower and upper halves of states, as views."""
    low, high = x.view("<u2").reshape(-1, 2).T
    return low, high

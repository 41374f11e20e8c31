"""Bitwidths in a smaller file, if those of today are worth their bytes.

Where no bit of one group is worth more than a bit of another, the error falls by the same amount
for each bit of the file: E'(b) = -λ. With an error of s·4^-b in a group, s its sensitivity, the
bitwidths in use give s up to a factor that all groups share. A higher λ then takes the same
number of bits from every group, until it has 1 left. This is the rule of equal slopes, as
`diffq pack --target-mb` follows it, with the sensitivities that a training has found.

The bytes come from the levels: those at fewer bits are these, rounded to a coarser grid of the same
range, and the file loses what their entropy loses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffq.format.entropy import entropy_bits
from diffq.format.kinds.base import Record
from diffq.format.kinds.grid import GridRecord
from diffq.reports.summary import Summary, Tensor

#: Bits that every group keeps.
LEAST_BITS = 1
# Halvings of an interval of at most 15 bits.
_HALVINGS = 40


@dataclass(frozen=True)
class Rates:
    """What the levels of one tensor would take at fewer bits.

    Attributes:
        coded: bitwidth in use -> bits of its levels in all by their entropy, at each bitwidth from
            1 up to that one.
        counts: bitwidth in use -> number of levels.
    """

    coded: Mapping[int, NDArray[np.float64]]
    counts: Mapping[int, int]

    @classmethod
    def of(cls, record: Record) -> Rates | None:
        """Measures a record; None if it stores no levels whose bitwidths were chosen."""
        levels = record.coded if isinstance(record, GridRecord) else None
        if levels is None:
            return None
        streams = levels.streams()
        histograms = {
            width: np.bincount(stream, minlength=1 << width) for width, stream in streams.items()
        }
        coded = {width: _entropies(width, counts) for width, counts in histograms.items()}
        return cls(coded, {width: stream.size for width, stream in streams.items()})

    def packed(self) -> Rates:
        """The rates without entropy coding."""
        widths = {w: np.arange(1.0, w + 1) * count for w, count in self.counts.items()}
        return Rates(widths, self.counts)

    def bytes(self, fewer: float) -> float:
        """Bytes of the levels with so many bits fewer in each group."""
        bits = (
            float(np.interp(_left(width, fewer), np.arange(1, width + 1), coded))
            for width, coded in self.coded.items()
        )
        return sum(bits) / 8

    def mean_bits(self, fewer: float) -> float:
        """Bits per weight with so many bits fewer in each group."""
        bits = sum(count * _left(width, fewer) for width, count in self.counts.items())
        return bits / sum(self.counts.values())


@dataclass(frozen=True)
class Forecast:
    """A file of another size.

    Attributes:
        share: its size as a part of today's.
        size: its bytes; more than asked for where fewer bits cannot make it smaller.
        reached: whether fewer bits make it that small.
        fewer: bits that every group loses, down to 1.
        bits: tensor -> bits per weight.
    """

    share: float
    size: float
    reached: bool
    fewer: float
    bits: Mapping[str, float]


def forecast(summary: Summary, rates: Mapping[str, Rates], share: float) -> Forecast:
    """Predicts the bitwidths of a file with a share of today's size."""
    levels = _together(_as_coded(t, rates[t.name]) for t in summary.tensors if t.name in rates)
    others = summary.size - levels.bytes(0)
    low, high = 0.0, float(max(levels.counts, default=LEAST_BITS) - LEAST_BITS)
    reached = others + levels.bytes(high) <= share * summary.size
    for _ in range(_HALVINGS if reached else 0):
        middle = (low + high) / 2
        fits = others + levels.bytes(middle) <= share * summary.size
        low, high = (low, middle) if fits else (middle, high)
    bits = {name: each.mean_bits(high) for name, each in rates.items()}
    return Forecast(share, others + levels.bytes(high), reached, high, bits)


def _together(rates: Iterable[Rates]) -> Rates:
    """The rates of several tensors as those of one."""
    coded: dict[int, NDArray[np.float64]] = {}
    counts: dict[int, int] = {}
    for each in rates:
        for width, count in each.counts.items():
            coded[width] = coded.get(width, 0) + each.coded[width]
            counts[width] = counts.get(width, 0) + count
    return Rates(coded, counts)


def _as_coded(tensor: Tensor, rates: Rates) -> Rates:
    return rates.packed() if tensor.codings == ("none",) else rates


def _left(width: int, fewer: float) -> float:
    return max(float(LEAST_BITS), width - fewer)


def _entropies(width: int, histogram: NDArray[np.int64]) -> NDArray[np.float64]:
    """Entropy in bits of levels that are rounded to each bitwidth from 1 to `width`."""
    levels = np.arange(histogram.size)
    used = histogram > 0
    levels, histogram = levels[used], histogram[used]
    top = (1 << width) - 1
    coarser = (np.rint(levels * ((1 << bits) - 1) / top) for bits in range(1, width + 1))
    return np.array([_entropy(each.astype(np.int64), histogram) for each in coarser])


def _entropy(levels: NDArray[np.int64], counts: NDArray[np.int64]) -> float:
    return entropy_bits(np.bincount(levels, weights=counts).astype(np.int64))

"""Pure math of ranges: minimum to maximum, or the range of least squared error.

The search works on a histogram, so that its cost does not grow with the tensor, and
reads nothing back from the device. Values outside of a range are clamped to its ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from diffq.errors import ConfigError
from diffq.numerics import grid

#: "min-max" is one range per tensor, "channel" one per channel, and "histogram" one per
#: tensor that minimises the squared error (Quant-Noise paper, Section 8.7.5).
Observer = Literal["min-max", "histogram", "channel"]
OBSERVERS: tuple[str, ...] = get_args(Observer)

BINS = 1024

# The search tries this many places for each end of the range, then again around the best.
_PLACES = 8
_ROUNDS = 3
# Binary digits of a float32.
_DIGITS = 24
# An estimate on a histogram must promise this much before the full range is given up.
_CLEARLY = 0.999


def check_observer(observer: Any) -> None:
    """Raises ConfigError unless `observer` is the name of an observer."""
    if observer not in OBSERVERS:
        raise ConfigError(f"observer must be one of {', '.join(OBSERVERS)}, got {observer!r}.")


@dataclass(frozen=True)
class Histogram:
    """How many values lie in each of `BINS` bins of equal width.

    Attributes:
        counts: int64 [BINS].
        low: float32 [1], where the first bin begins.
        high: float32 [1], where the last bin ends.
    """

    counts: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Histogram:
        """The histogram of a tensor of any shape, from its minimum to its maximum."""
        flat = values.detach().reshape(-1).float()
        low, high = grid.bounds(flat)
        return cls(_count(flat, torch.ones_like(flat[:1], dtype=torch.int64), low, high), low, high)

    def centers(self) -> Tensor:
        """The middle of each bin, float32 [BINS]."""
        places = torch.arange(BINS, dtype=torch.float32, device=self.low.device) + 0.5
        return self.low + (self.high - self.low) * (places / BINS)

    def merge(self, other: Histogram) -> Histogram:
        """Both together, over the range of both; values move by half a bin at most."""
        low, high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)
        moved = [_count(part.centers(), part.counts, low, high) for part in (self, other)]
        return Histogram(moved[0] + moved[1], low, high)


def _count(values: Tensor, weights: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Sums `weights`, one for each value or one for all, by the bin of the value."""
    width = (high - low) / BINS
    places = (values - low).div_(torch.where(width > 0, width, 1))
    counts = torch.zeros(BINS, dtype=torch.int64, device=values.device)
    bins = places.long().clamp_(0, BINS - 1)
    return counts.scatter_add_(0, bins, weights.expand_as(bins))


def least_error_range(
    histogram: Histogram, bits: int, through_zero: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Searches the range whose grid has the least squared error on a histogram.

    Both ends are moved inwards on a coarse grid of places, then on finer ones around
    the best pair.

    Args:
        histogram: the values; each counts as its bin's center.
        bits: bitwidth of the grid, which has 2**bits levels.
        through_zero: bool 0-dim, whether zero stays within the range, as it is in the
            histogram's; None if it need not.

    Returns:
        low and high, float32 [1] each, within the histogram's range.
    """
    span = histogram.high - histogram.low
    scale = torch.where(span > 0, span, 1)
    # In shares of the range: where the bins are, what is cut off at each end, and may be.
    centers = (histogram.centers() - histogram.low) / scale
    zero = (-histogram.low / scale).clamp(0, 1)
    most = [torch.ones_like(zero)] * 2
    if through_zero is not None:
        most = [torch.where(through_zero, end, 1) for end in (zero, 1 - zero)]
    cuts = [torch.zeros_like(zero)] * 2
    start, spacing = 0.0, 1 / _PLACES
    places = torch.arange(_PLACES, dtype=torch.float32, device=span.device)
    for _ in range(_ROUNDS):
        offsets = start + spacing * places
        tried = [
            torch.minimum((cut + offsets).clamp(min=0), end)
            for cut, end in zip(cuts, most, strict=True)
        ]
        pairs = torch.cartesian_prod(*tried)
        place = _errors(centers, histogram.counts, pairs, bits).argmin()
        # index_select, because pairs[place] would wait for the device.
        best = pairs.index_select(0, place.view(1))[0]
        cuts = [best[:1], best[1:]]
        start, spacing = -spacing, 2 * spacing / _PLACES
    low, high = histogram.low + cuts[0] * span, histogram.high - cuts[1] * span
    if through_zero is not None:
        # The rounding of a cut at zero may put the end on zero's other side.
        low = torch.where(through_zero, torch.minimum(low, histogram.low.clamp(min=0)), low)
        high = torch.where(through_zero, torch.maximum(high, histogram.high.clamp(max=0)), high)
    return low, high


def _errors(centers: Tensor, counts: Tensor, cuts: Tensor, bits: int) -> Tensor:
    """Squared error of each pair of cuts [pairs, 2] on a histogram: [pairs]."""
    low, high = cuts[:, :1], 1 - cuts[:, 1:]
    step = (high - low) / (2**bits - 1)
    levels = torch.round((centers - low) / step).clamp(0, 2**bits - 1)
    errors = ((levels * step + low - centers).square() * counts).sum(1)
    return torch.where(high[:, 0] > low[:, 0], errors, torch.inf)


def fit_range(weight: Tensor, bits: int, zero_point: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The range of a tensor that minimises the squared error of its grid.

    What the histogram finds is checked on the weights themselves, so that the error is
    never above that of the full range.

    Args:
        weight: any shape, at least one element.
        bits: bitwidth of the grid.
        zero_point: as `grid.to_levels`. With one, zero stays within the range.

    Returns:
        low and high, float32 [1] each.
    """
    histogram = Histogram.of(weight)
    low, high = least_error_range(histogram, bits, zero_point)
    largest = torch.maximum(histogram.low.abs(), histogram.high.abs())
    unit = torch.where(largest > 0, largest, 1)
    rule = bits, zero_point, unit
    before = _squared_error(weight, histogram.low, histogram.high, *rule)
    after = _squared_error(weight, low, high, *rule)
    better = (after < before * _CLEARLY) & (high > low)
    return torch.where(better, low, histogram.low), torch.where(better, high, histogram.high)


def _squared_error(
    weight: Tensor, low: Tensor, high: Tensor, bits: int, zero_point: Tensor | None, unit: Tensor
) -> Tensor:
    """Squared error of a grid, float32 0-dim, in squares of `unit`."""
    groups = weight.detach().float().reshape(1, -1)
    rule = low, high, torch.full_like(low, bits), zero_point
    levels = grid.to_levels(groups, *rule, weight.dtype)
    errors = grid.from_levels(levels, *rule).sub_(groups)
    # Squares of large or tiny weights would leave float32.
    return errors.div_(unit).square_().sum()


def keep_zero(low: Tensor, high: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """Moves a range so that zero is one of its levels, exactly.

    A range that does not hold zero is extended to it first.

    The step is cut to so few digits that all its multiples up to 2**bits are float32
    numbers: `level * step + low` has no rounding, and is 0.0 at the level -low / step.

    Args:
        low: float32, [1] or [groups].
        high: float32, like `low`.
        bits: whole bitwidths as float32, [1] or [groups].

    Returns:
        low and high, about as far apart as they were.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    top = torch.exp2(bits) - 1
    mantissa, exponent = torch.frexp((high - low) / top)
    digits = torch.exp2(_DIGITS - bits)
    # As a float, since torch 2.6 gives powers of whole numbers the default dtype.
    step = torch.ldexp(2 * torch.ceil(mantissa * digits) / digits, (exponent - 1).to(low.dtype))
    zero = torch.minimum(torch.round(-low / torch.where(step > 0, step, 1)), top)
    return -zero * step, (top - zero) * step


class RangeTracker:
    """The range of a stream of tensors; it always holds zero.

    Zeros are common in activations, from ReLU and padding, so zero becomes a level.

    Args:
        observer: one range for all channels or one for each, and how it is found.
        bits: bitwidth of the grid.
    """

    def __init__(self, observer: Observer, bits: int) -> None:
        self._observer, self._bits = observer, bits
        self._bounds: Tensor | None = None
        self._histogram: Histogram | None = None

    def update(self, values: Tensor) -> None:
        """Takes a part of the stream: [channels, values], at least one value."""
        if self._observer == "histogram":
            seen = Histogram.of(values)
            self._histogram = self._histogram.merge(seen) if self._histogram else seen
            return
        rows = values if self._observer == "channel" else values.reshape(1, -1)
        bounds = torch.stack([rows.amin(1), -rows.amax(1)])
        self._bounds = bounds if self._bounds is None else torch.minimum(self._bounds, bounds)

    def range(self) -> Tensor | None:
        """Low and high, float32 [2, 1] or [2, channels]; None if nothing was seen."""
        if self._histogram is not None:
            through_zero = torch.ones_like(self._histogram.low, dtype=torch.bool)
            low, high = least_error_range(self._histogram, self._bits, through_zero)
        elif self._bounds is not None:
            low, high = self._bounds[0], -self._bounds[1]
        else:
            return None
        return torch.stack(keep_zero(low, high, torch.full_like(low, self._bits)))

"""Bitwidths for a size: post-training quantization that fills a given number of bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffq.checks import MAX_BITS
from diffq.errors import ConfigError
from diffq.format.container import Codec, encode_parts
from diffq.format.entropy import entropy_bits
from diffq.numerics import grid
from diffq.numerics.size import MEGABYTE
from diffq.ptq.importance import Source, importance_of
from diffq.ptq.state import Settings, StateGrid, StatePlan, plan_state
from diffq.quantizers.grid import WeightGrid
from diffq.storage.state import Snapshot

#: Called with what is being done, the steps done and the steps in all.
Report = Callable[[str, int, int], None]

#: Weights per group unless told otherwise; docs/cli.md has the measurement.
GROUP_SIZE = 64

_WIDTHS = np.arange(1, MAX_BITS + 1)
# Weights whose errors are measured at a time.
_CHUNK = 1 << 20
# How often groups choose again after the bit map's cost has followed their choice.
_ROUNDS = 4
# Prices of a bit in units of squared errors, which are at most 1 per weight.
_LOWEST, _HIGHEST = 2.0**-60, 2.0**20
# Prices that differ by less than this factor are not told apart.
_SAME = 1.0001
# The search ends after so many files, or with one that fills this much of the size.
_MOST_FILES = 16
_FILLED = 0.999
# How near the expected size of the next file comes to what is wanted.
_CLOSE = 0.9998


@dataclass(frozen=True)
class Fitted:
    """A quantized state dict that fits, and the bytes of its file, in parts."""

    snapshot: Snapshot
    parts: list[bytes]


def quantize_to_size(
    state: Mapping[str, Any],
    most: int,
    settings: Settings | None = None,
    codec: Codec = "rans",
    metadata: Mapping[str, Any] | None = None,
    report: Report = lambda what, done, total: None,
    sensitivity: Source | None = None,
) -> Fitted:
    """Chooses the bitwidth of each group so that the file has at most `most` bytes.

    Minimises E + λ R, group by group. E is the squared error, measured at each bitwidth,
    in which each weight counts as much as its importance.
    R is what the levels and the bit map take by their entropy; for levels that of the
    whole tensor at the bitwidth (or the bitwidth itself, with the "packed" codec). λ is
    then searched until the file, as really encoded, nearly fills `most`.

    Args:
        state: name to tensor, as `model.state_dict()` gives it.
        most: bytes of the whole file.
        settings: what is quantized, and how; by default in groups of `GROUP_SIZE`.
        codec: see `diffq.save`.
        metadata: see `diffq.save`.
        report: told about the progress.
        sensitivity: how much errors in each weight cost, by default all the same; see
            `diffq.quantize_checkpoint`.

    Raises:
        ConfigError: nothing fits, a setting breaks a rule, a pattern matches nothing, or the
            sensitivity is not that of the state dict.
        WeightError: a weight to quantize holds NaN or Inf, or does not fit float16.
        FormatError: the metadata is no JSON object, or a name is not storable.
    """
    plan = plan_state(state, settings or Settings(group_size=GROUP_SIZE))
    importance = {} if sensitivity is None else importance_of(sensitivity, plan)
    return _Search(plan, most, codec, metadata, report, importance).run()


@dataclass(frozen=True)
class Choice:
    """What one tensor's groups can choose from.

    Attributes:
        errors: squared error of each group at each bitwidth, [groups, widths].
        weights: weights of each group, [groups].
        rates: expected bits per weight at each bitwidth, [widths].
    """

    errors: NDArray[np.float32]
    weights: NDArray[np.float32]
    rates: NDArray[np.float32]

    def best(self, price: float) -> tuple[NDArray[np.uint8], float]:
        """Bitwidths that minimise error + price · bits, uint8 [groups], and those bits.

        A group's entry in the bit map costs -log2 of the share of groups with the same
        bitwidth. Shares and choices follow each other for some rounds.
        """
        costs = self.errors + np.float32(price) * (self.weights[:, None] * self.rates)
        map_costs = np.zeros(_WIDTHS.size, np.float32)
        for _ in range(_ROUNDS):
            chosen = (costs + np.float32(price) * map_costs).argmin(axis=1)
            used = np.bincount(chosen, minlength=_WIDTHS.size)
            # A bitwidth that nobody chose stays possible, at the cost of a rare one.
            map_costs = -np.log2(np.maximum(used, 0.5) / chosen.size).astype(np.float32)
        bits = float((self.weights * self.rates[chosen]).sum()) + entropy_bits(used)
        return _WIDTHS[chosen].astype(np.uint8), bits


def measure(
    tensor: StateGrid, codec: Codec, unit: float = 1.0, importance: Tensor | None = None
) -> Choice:
    """Errors of one tensor, in units of the square of `unit`, and rates with a codec.

    Squared errors are multiplied by `importance`, of the tensor's shape or 0-dim.
    """
    whole, size = tensor.grid, tensor.grid.group_size
    factors = None if importance is None else _to_groups(importance, whole)
    groups, numel = whole.groups(), whole.weight.numel()
    errors = np.empty((tensor.count, _WIDTHS.size), np.float32)
    counts = np.zeros((_WIDTHS.size, 1 << MAX_BITS), np.int64)
    step = max(1, _CHUNK // size)
    for start in range(0, tensor.count, step):
        part = groups[start : start + step]
        rows = slice(start, start + len(part))
        low, high = (end if end.numel() == 1 else end[rows] for end in (whole.low, whole.high))
        # Zeros fill the last group up; they are neither stored nor do they cost anything.
        real = min(part.numel(), numel - start * size)
        for column, width in enumerate(_WIDTHS):
            rule = low, high, low.new_full((1,), float(width)), whole.zero_point
            levels = grid.to_levels(part, *rule, whole.weight.dtype)
            error = grid.from_levels(levels, *rule).sub_(part).div_(unit)
            error.view(-1)[real:] = 0
            error.square_()
            if factors is not None:
                error.mul_(factors[rows])
            errors[rows, column] = error.sum(dim=1).numpy()
            symbols = levels.view(-1)[:real].to(torch.int64).numpy()
            counts[column, : 1 << width] += np.bincount(symbols, minlength=1 << width)
    weights = np.full(tensor.count, size, np.float32)
    weights[-1] -= tensor.count * size - numel
    rates = _WIDTHS if codec == "packed" else [entropy_bits(count) / numel for count in counts]
    return Choice(errors, weights, np.asarray(rates, np.float32))


def _to_groups(importance: Tensor, whole: WeightGrid) -> Tensor:
    """What a weight's error is multiplied by, [groups, group_size]."""
    expanded = importance.expand(whole.weight.shape)
    return grid.to_groups(expanded, whole.group_size)


class _File(NamedTuple):
    """A file that was tried: its bytes, and how many more than its levels and bit maps take."""

    fitted: Fitted
    size: int
    surplus: float


class _Search:
    """Finds the price of a bit at which the file just fits."""

    def __init__(
        self,
        plan: StatePlan,
        most: int,
        codec: Codec,
        metadata: Mapping[str, Any] | None,
        report: Report,
        importance: Mapping[str, Tensor],
    ) -> None:
        self._plan, self._most, self._report = plan, most, report
        self._codec, self._metadata = codec, metadata
        # No error exceeds the longest range, so that none of their squares overflows.
        ranges = (float((g.grid.high - g.grid.low).max()) for g in plan.grids)
        unit = max(ranges, default=0.0) or 1.0
        self._choices: dict[str, Choice] = {}
        for done, tensor in enumerate(plan.grids):
            report("measuring errors", done, len(plan.grids))
            factors = importance.get(tensor.name)
            self._choices[tensor.name] = measure(tensor, codec, unit, factors)

    def run(self) -> Fitted:
        """The file of least error among those that were tried and fit."""
        # Below the lowest price, which may still be tried.
        low, high = _LOWEST / 2, _HIGHEST
        best = last = self._try(high)
        if best.size > self._most:
            raise ConfigError(
                f"The smallest file has {best.size} bytes ({best.size / MEGABYTE:.6f} MB), more "
                f"than the target of {self._most}. Quantize more tensors (a smaller min_size), "
                "store the others as float16, or allow more."
            )
        for done in range(_MOST_FILES):
            self._report("searching bitwidths", done, _MOST_FILES)
            # Between two prices that are nearly the same, the size jumps over the target.
            if best.size >= _FILLED * self._most or high <= low * _SAME or high <= _LOWEST:
                break
            price = self._solve((1 + _FILLED) / 2 * self._most - last.surplus)
            if done % 4 == 3 or not low < price < high:
                # Halving ends the search where the estimate misleads.
                price = (low * high) ** 0.5
            last = self._try(price)
            if last.size <= self._most:
                best, high = last, price
            else:
                low = price
        return best.fitted

    def _try(self, price: float) -> _File:
        snapshot = self._plan.snapshot({n: c.best(price)[0] for n, c in self._choices.items()})
        parts = encode_parts(snapshot.records, snapshot.aliases, self._metadata, self._codec)
        size = sum(map(len, parts))
        return _File(Fitted(snapshot, parts), size, size - self._expected(price))

    def _expected(self, price: float) -> float:
        """Bytes of levels and bit maps."""
        return sum(choice.best(price)[1] for choice in self._choices.values()) / 8

    def _solve(self, size: float) -> float:
        """A low price at which levels and bit maps are expected to have at most `size` bytes."""
        low, high = _LOWEST, _HIGHEST
        if self._expected(low) <= size:
            return low
        while high > low * _SAME:
            price: float = (low * high) ** 0.5
            expected = self._expected(price)
            if _CLOSE * size < expected <= size:
                return price
            low, high = (price, high) if expected > size else (low, price)
        return high

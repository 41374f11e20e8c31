"""What weight quantizers on an even min-max grid share: DiffQ and QAT."""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffq.attach.plan import TensorPlan, dtype_name
from diffq.attach.weight import WeightQuantizer
from diffq.errors import WeightError
from diffq.format.records import MAX_RANGE, RANGE_BITS, WIDTH_BITS, GridRecord, group_count
from diffq.numerics import grid
from diffq.torch_inside.graph import is_plain


def check_range(low: Tensor, high: Tensor, name: str) -> None:
    """Raises WeightError unless a grid from `low` to `high` can be stored in float32."""
    largest = torch.maximum(high - low, torch.maximum(low.abs(), high.abs()))
    # NaN is not at most anything.
    if not (largest <= MAX_RANGE).all():
        raise WeightError(
            f"The weights of {name} must be finite, in a range of at most {MAX_RANGE:.8g}; got "
            f"{low.min().item()} to {high.max().item()}. "
            "Find the step that diverged, or exclude the tensor."
        )


def check_bitwidths(bits: Tensor, name: str) -> None:
    """Raises WeightError for bitwidths that a loss which was not finite has spoiled."""
    if not torch.isfinite(bits).all():
        raise WeightError(
            f"The bitwidths of {name} must be finite, got NaN: a loss that was not finite reached "
            "them. Go back to a checkpoint, and skip steps whose loss is not finite."
        )


class WeightGrid(NamedTuple):
    """The grids of one weight: ranges of its groups, or one for all.

    Attributes:
        weight: any shape.
        group_size: consecutive weights that share a bitwidth; the last group may be short.
        low: float32 minimum, [1] or [groups].
        high: float32 maximum, like `low`.
        zero_point: as `grid.to_levels`.
    """

    weight: Tensor
    group_size: int
    low: Tensor
    high: Tensor
    zero_point: Tensor | None

    def groups(self) -> Tensor:
        """The weights in float32, [groups, group_size]; the last group is padded with zeros."""
        return grid.to_groups(self.weight.float(), self.group_size)

    def levels(self, bits: Tensor) -> Tensor:
        """Levels at whole bitwidths, float32 [1] or [groups]: float32 [groups, group_size]."""
        rule = self.low, self.high, bits, self.zero_point
        return grid.to_levels(self.groups(), *rule, self.weight.dtype)

    def values(self, bits: Tensor) -> Tensor:
        """Values of the levels at whole bitwidths, in the weight's shape and dtype."""
        rule = self.low, self.high, bits, self.zero_point
        values = grid.from_levels(self.levels(bits), *rule)
        return grid.from_groups(values, self.weight.shape).to(self.weight.dtype)

    def record(self, bits: NDArray[np.uint8], min_bits: int) -> GridRecord:
        """Levels, bitwidths and ranges, at bitwidths [groups] that count from `min_bits`."""
        levels = self.levels(torch.from_numpy(bits).to(self.low))
        flat = levels.reshape(-1)[: self.weight.numel()]
        return GridRecord(
            shape=tuple(self.weight.shape),
            dtype=dtype_name(self.weight.dtype),
            group_size=self.group_size,
            min_bits=min_bits,
            bits=bits,
            levels=flat.to(torch.int16).cpu().numpy().view(np.uint16),
            ranges=torch.stack([self.low, self.high], dim=1).cpu().numpy(),
            zero_point=bool(self.zero_point) and not torch.equal(self.low, self.high),
        )


class GridQuantizer(WeightQuantizer):
    """Quantizes one tensor on an even grid between its minimum and maximum.

    Weights that are exactly zero stay so: the grid of a tensor that has some has a zero point.

    Args:
        plan: the tensor.
        group_size: weights per group of the flattened tensor.
        min_bits: the bitwidth that the stored bit map counts from.
        ranges_per_group: one range per group instead of one for the tensor.

    Attributes:
        may_have_zeros: whether weights may be exactly zero: by the plan, or by the last look
            (see `diffq.attach.weight`). If so, each computation looks again, without a host sync.
    """

    def __init__(
        self, plan: TensorPlan, group_size: int, min_bits: int, ranges_per_group: bool = False
    ) -> None:
        super().__init__(plan)
        self.group_size = group_size
        self.min_bits = min_bits
        self.ranges_per_group = ranges_per_group
        self.groups = group_count(plan.numel, group_size)
        self.may_have_zeros = plan.pruned or plan.padded
        self.overhead_bits = RANGE_BITS * (self.groups if ranges_per_group else 1) + WIDTH_BITS

    @abstractmethod
    def whole_bits(self, weight: Tensor, learned: Tensor | None) -> Tensor:
        """Rounded bitwidths, float32 [groups], or [1] for one that all share.

        Where nothing is learned, they are on the device of the weight.
        """

    def bounds(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Minimum and maximum, [1] or [groups]."""
        if not self.ranges_per_group:
            return grid.bounds(weight)
        return grid.group_bounds(weight, self.group_size)

    def check(self, weight: Tensor) -> None:
        """Raises WeightError for ranges that float32 cannot hold."""
        low, high = GridQuantizer.bounds(self, weight)
        check_range(low.float(), high.float(), self.plan.name)

    def look(self, weight: Tensor, learned: Tensor | None) -> None:
        """Looks for weights that are exactly zero; a mask may bring some back at any time."""
        self.note_zeros(bool((weight == 0).any()))

    def note_zeros(self, found: bool) -> None:
        """Takes notice of whether a weight is exactly zero."""
        self.may_have_zeros = self.plan.pruned or found

    def zero_point(self, weight: Tensor) -> Tensor | None:
        """Whether the grid has a zero point, bool 0-dim; None where that was ruled out."""
        return (weight == 0).any() if self.may_have_zeros else None

    def quantize(self, weight: Tensor, learned: Tensor | None) -> Tensor:
        """Equation 1 of the DiffQ paper at whole bitwidths."""
        low, high = self._checked_bounds(weight)
        bits = self.whole_bits(weight, learned)
        if is_plain():
            check_bitwidths(bits, self.plan.name)
        return self.nearest(weight, low, high, bits)

    @torch.no_grad()
    def nearest(self, weight: Tensor, low: Tensor, high: Tensor, bits: Tensor) -> Tensor:
        """The nearest values on the grid from `low` to `high`; no host synchronisation."""
        return self._grid(weight, low, high).values(bits)

    @torch.no_grad()
    def record(self, weight: Tensor, learned: Tensor | None) -> GridRecord:
        """Levels, bitwidths and ranges."""
        low, high = self._checked_bounds(weight)
        return self._grid(weight, low, high).record(self.group_bits(learned), self.min_bits)

    def group_bits(self, learned: Tensor | None) -> NDArray[np.uint8]:
        """Rounded bitwidths, uint8 [groups]."""
        bits = self.whole_bits(torch.empty(0, device="cpu"), learned)
        check_bitwidths(bits, self.plan.name)
        expanded: NDArray[np.uint8] = bits.expand(self.groups).to(torch.uint8).cpu().numpy()
        return expanded

    def _checked_bounds(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        if not is_plain():
            return self.bounds(weight)
        self.look(weight, None)
        low, high = self.bounds(weight)
        check_range(low.float(), high.float(), self.plan.name)
        return low, high

    def _grid(self, weight: Tensor, low: Tensor, high: Tensor) -> WeightGrid:
        ends = low.float(), high.float()
        return WeightGrid(weight, self.group_size, *ends, self.zero_point(weight))

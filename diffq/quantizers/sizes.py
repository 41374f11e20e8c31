"""What each tensor of a quantized model takes, and the table of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from diffq.attach.weight import WeightQuantizer
from diffq.format.groups import group_count, stream_counts
from diffq.format.kinds.levels import LevelRecord
from diffq.numerics.size import MEGABYTE_BITS
from diffq.reports.tables import table
from diffq.reports.text import shape


class TensorSize(NamedTuple):
    """Bits of one tensor.

    Attributes:
        names: all of a tied tensor.
        shape: of the tensor.
        group_size: weights that share a bitwidth or a step.
        stored_bits: of all that is stored.
        level_bits: of the levels or indices; 0 if there are none.
        small: whether it is stored at `small_bits`.
    """

    names: Sequence[str]
    shape: Sequence[int]
    group_size: int
    stored_bits: int
    level_bits: int
    small: bool = False

    @property
    def numel(self) -> int:
        """Weights."""
        return math.prod(self.shape)

    @property
    def mean_bits(self) -> float:
        """Bits of the levels for each weight."""
        return self.level_bits / self.numel


class Rows(NamedTuple):
    """A table: its heading, its rows, and those after them."""

    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    last: Sequence[tuple[str, ...]]

    def __str__(self) -> str:
        """The table as plain text."""
        return table(self.header, [*self.rows, *self.last], left=2)


def tensor_size(quantizer: WeightQuantizer, weight: Tensor, learned: Tensor | None) -> TensorSize:
    """The size of what a weight quantizer stores of its weight."""
    record, plan = quantizer.record(weight, learned), quantizer.plan
    # Levels without bitwidths are worth their entropy.
    if quantizer.coded and record.coded:
        # At least one bit in all: levels that are all zero are levels too.
        levels = max(1, math.ceil(record.coded.entropy_bits()))
    else:
        levels = level_bits(quantizer, learned)
    stored = quantizer.stored_bits(record)
    return TensorSize(plan.names, plan.shape, quantizer.group_size, stored, levels, plan.small)


def record_size(names: Sequence[str], record: LevelRecord) -> TensorSize:
    """The size of a tensor that is stored under these names."""
    levels = _coded_bits(record.coded.counts()) if record.coded else 0
    return TensorSize(names, record.shape, record.group_size, record.stored_bits(), levels)


def level_bits(quantizer: WeightQuantizer, learned: Tensor | None) -> int:
    """Bits of the levels or indices of a tensor; 0 if it has neither."""
    bits = quantizer.group_bits(learned)
    if bits is None:
        return quantizer.index_bits
    return _coded_bits(stream_counts(bits, quantizer.group_size, quantizer.plan.numel))


def total_bits(sizes: Sequence[TensorSize], raw_bits: float) -> float:
    """Bits of a model: of its quantized tensors and all others."""
    return raw_bits + sum(size.stored_bits for size in sizes)


def mean_bits(sizes: Sequence[TensorSize]) -> float:
    """Bits of a level, on average of all weights; NaN if there are none."""
    levels = [size for size in sizes if size.level_bits]
    weights = sum(size.numel for size in levels)
    return sum(size.level_bits for size in levels) / weights if weights else math.nan


def size_rows(sizes: Sequence[TensorSize], raw_bits: float, tensors: int) -> Rows:
    """The table of a quantized model: tensor, shape, groups, mean bits, MB.

    Small tensors, of which a model may have hundreds, share a row.

    Args:
        sizes: of the quantized tensors.
        raw_bits: of all others.
        tensors: all tensors of the model.
    """
    levels = [size for size in sizes if size.level_bits]
    small = [size for size in levels if size.small]
    total = total_bits(sizes, raw_bits)
    rest = total - sum(size.stored_bits for size in levels)
    rows = [
        (*head(s.names, s.shape, s.group_size), f"{s.mean_bits:.2f}", _megabytes(s.stored_bits))
        for s in levels
        if not s.small
    ]
    if small:
        stored = _megabytes(sum(size.stored_bits for size in small))
        rows.append((f"{len(small)} small", "", str(len(small)), f"{mean_bits(small):.2f}", stored))
    last = [
        (f"{tensors - len(levels)} without levels", "", "", "", _megabytes(rest)),
        ("total", "", "", f"{mean_bits(levels):.2f}" if levels else "", _megabytes(total)),
    ]
    return Rows(("tensor", "shape", "groups", "bits", "MB"), rows, last)


def head(names: Sequence[str], sizes: Sequence[int], group_size: int) -> tuple[str, str, str]:
    """What a row begins with: names, shape and groups."""
    groups = group_count(math.prod(sizes), group_size)
    return " = ".join(names), shape(sizes), str(groups)


def _coded_bits(counts: Mapping[int, int]) -> int:
    """Bits of integers, by the number of them at each bitwidth."""
    return sum(width * count for width, count in counts.items())


def _megabytes(bits: float) -> str:
    return f"{bits / MEGABYTE_BITS:.4f}"

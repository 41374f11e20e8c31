"""The table of a quantizer, and a line that tells how far a long task is."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from diffq.attach.weight import WeightQuantizer
from diffq.format.groups import group_count, stream_counts
from diffq.format.kinds.levels import LevelRecord
from diffq.numerics.size import MEGABYTE_BITS
from diffq.quantizers.tables import table

_BAR_WIDTH = 24


class TensorSize(NamedTuple):
    """Bits of one tensor: of its levels or indices, and of all that is stored of it."""

    names: Sequence[str]
    shape: Sequence[int]
    group_size: int
    stored_bits: int
    level_bits: int
    small: bool = False


def tensor_size(quantizer: WeightQuantizer, weight: Tensor, learned: Tensor | None) -> TensorSize:
    """The size of what a weight quantizer stores of its weight."""
    record, plan = quantizer.record(weight, learned), quantizer.plan
    # Levels without bitwidths are worth their entropy.
    entropy = record.coded.entropy_bits() if quantizer.coded and record.coded else 0.0
    levels = math.ceil(entropy) or level_bits(quantizer, learned)
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


def _coded_bits(counts: Mapping[int, int]) -> int:
    """Bits of integers, by the number of them at each bitwidth."""
    return sum(width * count for width, count in counts.items())


def size_table(sizes: Sequence[TensorSize], raw_bits: float, tensors: int) -> str:
    """The table of a quantized model: tensor, shape, groups, mean bits, MB.

    `raw_bits` are those of all of its `tensors` that are not in `sizes`. Small tensors
    share a row.
    """
    levels = [size for size in sizes if size.level_bits]
    small = [size for size in levels if size.small]
    total = raw_bits + sum(size.stored_bits for size in sizes)
    rest = total - sum(size.stored_bits for size in levels)
    weights = sum(math.prod(size.shape) for size in levels)
    mean = sum(size.level_bits for size in levels) / max(1, weights)
    rows = [_row(size) for size in levels if not size.small]
    if small:
        rows.append(_small_row(small))
    rows.append((f"{tensors - len(levels)} without levels", "", "", "", _megabytes(rest)))
    rows.append(("total", "", "", f"{mean:.2f}" if levels else "", _megabytes(total)))
    return table(("tensor", "shape", "groups", "bits", "MB"), rows, left=2)


def _row(size: TensorSize) -> tuple[str, ...]:
    numel = math.prod(size.shape)
    groups = group_count(numel, size.group_size)
    shape = "x".join(map(str, size.shape))
    names = " = ".join(size.names)
    mean = f"{size.level_bits / numel:.2f}"
    return names, shape, str(groups), mean, _megabytes(size.stored_bits)


def _small_row(small: Sequence[TensorSize]) -> tuple[str, ...]:
    """One row for all small tensors, of which a model may have hundreds."""
    mean = sum(size.level_bits for size in small) / sum(math.prod(size.shape) for size in small)
    stored = _megabytes(sum(size.stored_bits for size in small))
    return f"{len(small)} small", "", str(len(small)), f"{mean:.2f}", stored


def _megabytes(bits: float) -> str:
    return f"{bits / MEGABYTE_BITS:.4f}"


class ProgressBar:
    """A line on stderr that tells how far a task is; nothing where stderr is no terminal.

    Args:
        task: what is being done.
        total: steps in all.
        delay: seconds before the line appears, so that short tasks print nothing.
    """

    def __init__(self, task: str, total: int, delay: float = 1.0) -> None:
        self.task = task
        self.total = total
        self.done = 0
        self._due = time.monotonic() + delay

    def advance(self, steps: int, what: str) -> None:
        """Counts steps; `what` is being worked on."""
        self.done += steps
        if sys.stderr.isatty() and time.monotonic() >= self._due:
            full = _BAR_WIDTH * self.done // max(self.total, 1)
            bar = "#" * full + "." * (_BAR_WIDTH - full)
            self._write(f"{self.task} [{bar}] {self.done / max(self.total, 1):.0%} {what}")

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        if sys.stderr.isatty():
            self._write("")

    def _write(self, line: str) -> None:
        sys.stderr.write(f"\r\x1b[K{line}")
        sys.stderr.flush()

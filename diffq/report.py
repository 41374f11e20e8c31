"""Tables as plain text, and a line that tells how far a long task is."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from diffq.format.records import group_count
from diffq.size import MEGABYTE_BITS
from diffq.weight import WeightQuantizer

_BAR_WIDTH = 24


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Aligns rows under a header.

    Args:
        header: one title per column.
        rows: cells as text.
        left: the first `left` columns are aligned to the left, the others to the right.
    """
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    aligned = [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    rule = "-" * max(map(len, aligned))
    return "\n".join([aligned[0], rule, *aligned[1:]])


def size_table(sized: Sequence[tuple[WeightQuantizer, int]], raw_bits: float, tensors: int) -> str:
    """The table of a quantizer: tensor, shape, groups, mean bits, MB.

    Args:
        sized: each weight quantizer with the stored bits of its tensor.
        raw_bits: bits of all tensors that have none.
        tensors: number of all tensors.
    """
    counted = [quantizer.level_totals() for quantizer, _ in sized]
    levels = [pair for pair, (_, weights) in zip(sized, counted, strict=True) if weights]
    total = raw_bits + sum(bits for _, bits in sized)
    rest = total - sum(bits for _, bits in levels)
    mean = sum(bits for bits, _ in counted) / max(1, sum(count for _, count in counted))
    rows = [_row(quantizer, bits) for quantizer, bits in levels]
    rows.append((f"{tensors - len(rows)} without levels", "", "", "", _megabytes(rest)))
    rows.append(("total", "", "", f"{mean:.2f}" if levels else "", _megabytes(total)))
    return table(("tensor", "shape", "groups", "bits", "MB"), rows, left=2)


def _row(quantizer: WeightQuantizer, stored_bits: int) -> tuple[str, ...]:
    plan = quantizer.plan
    bits, weights = quantizer.level_totals()
    groups = group_count(weights, quantizer.group_size)
    shape = "x".join(map(str, plan.shape))
    names = " = ".join(plan.names)
    return names, shape, str(groups), f"{bits / weights:.2f}", _megabytes(stored_bits)


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

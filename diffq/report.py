"""Tables as plain text."""

from __future__ import annotations

from collections.abc import Sequence

from diffq.format.groups import stream_counts
from diffq.format.records import group_count
from diffq.size import MEGABYTE_BITS
from diffq.weight import WeightQuantizer


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
    levels = [(quantizer, bits) for quantizer, bits in sized if quantizer.group_bits() is not None]
    total = raw_bits + sum(bits for _, bits in sized)
    rest = total - sum(bits for _, bits in levels)
    counted = [level_totals(quantizer) for quantizer, _ in levels]
    mean = sum(bits for bits, _ in counted) / max(1, sum(count for _, count in counted))
    rows = [_row(quantizer, bits) for quantizer, bits in levels]
    rows.append((f"{tensors - len(rows)} without levels", "", "", "", _megabytes(rest)))
    rows.append(("total", "", "", f"{mean:.2f}" if levels else "", _megabytes(total)))
    return table(("tensor", "shape", "groups", "bits", "MB"), rows, left=2)


def level_totals(quantizer: WeightQuantizer) -> tuple[int, int]:
    """Bits of all levels of a tensor, and the number of its levels."""
    bits = quantizer.group_bits()
    if bits is None:
        return 0, 0
    counts = stream_counts(bits, quantizer.group_size, quantizer.plan.numel)
    return sum(width * count for width, count in counts.items()), quantizer.plan.numel


def _row(quantizer: WeightQuantizer, stored_bits: int) -> tuple[str, ...]:
    plan = quantizer.plan
    bits, weights = level_totals(quantizer)
    groups = group_count(weights, quantizer.group_size)
    shape = "x".join(map(str, plan.shape))
    names = " = ".join(plan.names)
    return names, shape, str(groups), f"{bits / weights:.2f}", _megabytes(stored_bits)


def _megabytes(bits: float) -> str:
    return f"{bits / MEGABYTE_BITS:.4f}"

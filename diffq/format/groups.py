"""Levels sorted by bitwidth and back: groups of one bitwidth stand together in a stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


def group_count(numel: int, group_size: int) -> int:
    """Number of groups of `group_size` consecutive weights; the last may be short."""
    return -(-numel // group_size)


def stream_counts(bits: NDArray[np.uint8], group_size: int, numel: int) -> dict[int, int]:
    """Number of weights at each bitwidth in use, by rising bitwidth.

    Args:
        bits: uint8 [groups].
        group_size: weights per group; the last may be short.
        numel: weights of all groups.
    """
    if not bits.size:
        return {}
    # For millions of groups, several times faster than np.bincount.
    widths = range(int(bits.min()), int(bits.max()) + 1)
    groups = {width: int(np.count_nonzero(bits == width)) for width in widths}
    counts = {width: number * group_size for width, number in groups.items() if number}
    counts[int(bits[-1])] -= bits.size * group_size - numel
    return counts


def split_groups(
    levels: NDArray[Any], bits: NDArray[np.uint8], group_size: int
) -> dict[int, NDArray[Any]]:
    """The levels of each bitwidth in use, in the order of their weights.

    Args:
        levels: [weights]: levels, or something else of each weight.
        bits: uint8 [groups].
        group_size: weights per group; the last may be short.

    Returns:
        bitwidth -> levels, by rising bitwidth.
    """
    counts = stream_counts(bits, group_size, levels.size)
    if len(counts) <= 1:
        return dict.fromkeys(counts, levels)
    rows = np.zeros((bits.size, group_size), levels.dtype)
    rows.reshape(-1)[: levels.size] = levels
    flat = np.take(rows, np.argsort(bits, kind="stable"), axis=0).reshape(-1)
    # Only the last group can be padded, and it is the last of its bitwidth.
    starts = _starts(counts, group_size)
    return {width: flat[starts[width] : starts[width] + count] for width, count in counts.items()}


def merge_levels(
    streams: Mapping[int, NDArray[np.uint16]], bits: NDArray[np.uint8], group_size: int, numel: int
) -> NDArray[np.uint16]:
    """Inverse of `split_groups`; zeros where there are no streams."""
    levels = np.zeros(numel, np.uint16)
    if streams:
        counts = stream_counts(bits, group_size, numel)
        merge_groups(
            bits, counts, group_size, levels, lambda width, part: np.copyto(part, streams[width])
        )
    return levels


def merge_groups(
    bits: NDArray[np.uint8],
    counts: Mapping[int, int],
    group_size: int,
    out: NDArray[Any],
    fill: Callable[[int, NDArray[Any]], None],
) -> None:
    """Inverse of `split_groups`, for levels or what they decode to.

    Args:
        bits: uint8 [groups], at least one.
        counts: what `stream_counts` gives for them.
        group_size: elements per group; the last may be short.
        out: contiguous [elements]; receives the elements in the order of the weights.
        fill: called with each bitwidth in use and the array that it must fill with
            the elements of that bitwidth.
    """
    if len(counts) == 1:
        fill(int(bits[0]), out)
        return
    rows = np.empty((bits.size, group_size), out.dtype)
    starts = _starts(counts, group_size)
    for width, count in counts.items():
        fill(width, rows.reshape(-1)[starts[width] : starts[width] + count])
    places = np.empty(bits.size, np.intp)
    places[np.argsort(bits, kind="stable")] = np.arange(bits.size)
    whole = out.size // group_size
    full = out[: whole * group_size].reshape(whole, group_size)
    # With a mode other than "raise", NumPy writes to `out` without a copy.
    np.take(rows, places[:whole], axis=0, out=full, mode="clip")
    out[whole * group_size :] = rows[places[-1], : out.size - whole * group_size]


def _starts(counts: Mapping[int, int], group_size: int) -> dict[int, int]:
    """Where each bitwidth's elements begin once whole groups are sorted by bitwidth."""
    starts, start = {}, 0
    for width, count in counts.items():
        starts[width] = start
        start += -(-count // group_size) * group_size
    return starts

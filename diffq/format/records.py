"""One stored tensor as integers: what a quantized state and a file are made of.

A record is frozen NumPy data that says everything about one tensor, without the
module that made it. It decodes itself with `values()`, and counts its own bits
with `stored_bits()`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from diffq.format.dtypes import FLOAT_DTYPES as FLOAT_DTYPES
from diffq.format.dtypes import ITEM_SIZES as ITEM_SIZES
from diffq.format.groups import group_count as group_count
from diffq.format.groups import merge_groups, split_groups
from diffq.format.groups import stream_counts as stream_counts
from diffq.format.kinds.grid import RANGE_BITS as RANGE_BITS
from diffq.format.kinds.grid import GridRecord as GridRecord
from diffq.format.kinds.grid import check_ranges as check_ranges
from diffq.format.kinds.grid import zero_points as zero_points
from diffq.format.kinds.levels import MAX_BITS as MAX_BITS
from diffq.format.kinds.levels import MAX_RANGE as MAX_RANGE
from diffq.format.kinds.levels import WIDTH_BITS as WIDTH_BITS
from diffq.format.kinds.levels import LevelRecord as LevelRecord
from diffq.format.kinds.levels import level_bits as level_bits
from diffq.format.kinds.levels import map_width as map_width
from diffq.format.kinds.product import ProductRecord as ProductRecord
from diffq.format.kinds.raw import RawRecord as RawRecord
from diffq.format.kinds.scaled import ScaledRecord as ScaledRecord
from diffq.format.kinds.scaled import check_scale as check_scale


def split_levels(record: Coded) -> dict[int, NDArray[np.uint16]]:
    """The levels or indices of each bitwidth in use, in the order of their weights.

    Returns:
        bitwidth -> uint16 levels, by rising bitwidth; empty for a constant tensor.
    """
    if record.constant:
        return {}
    return split_groups(record.levels, record.bits, record.group_size)


def merge_levels(
    streams: dict[int, NDArray[np.uint16]], bits: NDArray[np.uint8], group_size: int, numel: int
) -> NDArray[np.uint16]:
    """Inverse of `split_levels`; zeros where there are no streams."""
    levels = np.zeros(numel, np.uint16)
    if streams:
        counts = stream_counts(bits, group_size, numel)
        merge_groups(
            bits, counts, group_size, levels, lambda width, part: np.copyto(part, streams[width])
        )
    return levels


#: Records whose integers are entropy-coded: levels, or indices of codewords.
Coded = LevelRecord | ProductRecord

#: Everything that a state or a file can hold under one name.
Record = RawRecord | GridRecord | ScaledRecord | ProductRecord

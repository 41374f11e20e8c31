"""Costs of coding in whole numbers, so that all machines choose alike.

The last digits of a float, which differ between machines, do not change how log2 of a
count is rounded to 1/1024 bit.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

#: Units of cost in a bit.
UNIT = 1024

Counts = NDArray[np.int64]


def log2(counts: Counts) -> Counts:
    """log2 of counts in 1/1024 bit; 0 for a count of 0."""
    return np.asarray(np.rint(np.log2(np.maximum(counts, 1)) * UNIT), np.int64)


def entropy(counts: Counts) -> Counts:
    """Zeroth-order entropy of the symbols in the last dimension, in 1/1024 bit for all of them."""
    totals = counts.sum(axis=-1)
    return np.asarray(totals * log2(totals) - (counts * log2(counts)).sum(axis=-1))

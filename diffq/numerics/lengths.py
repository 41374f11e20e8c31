"""The size of levels by their own histogram: what an entropy coder makes of them.

A level of magnitude m takes L(m) = -log2(share of m among the tensor's levels) bits, and one more
for its sign. The gradient is that of L interpolated at u = |w| / s, which is the expected length of
a level under uniform noise: d size / d log2(s) = -log(2) * sum of u * L'(u) over the row. With
the histogram held constant, it is the gradient of the entropy of the blurred histogram. The price
moves steps, and not weights: a step sums over its row and decides better.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from diffq.numerics.grid import to_groups

# Magnitudes that have a length of their own; larger ones go on in a line.
_BINS = 127

# Levels that each magnitude has in advance, so that none takes infinitely many bits.
_PRIOR = 0.3

# Bounds of the slope of lengths: where magnitudes are rare, and beyond the last one.
_STEEPEST, _LAST_LEAST, _LAST_MOST = 8.0, 0.1, 1.0

# Weights that are measured at a time.
_CHUNK = 2**20


class CodeLength(NamedTuple):
    """Bits of one tensor's levels.

    Attributes:
        bits: their zeroth-order entropy, 0-dim.
        slopes: the gradient of the size by the binary logarithm of each row's step, [rows].
    """

    bits: Tensor
    slopes: Tensor


@torch.no_grad()
def code_length(weight: Tensor, width: int, steps: Tensor) -> CodeLength:
    """The size of the levels that a weight has with some steps.

    Args:
        weight: any shape.
        width: consecutive weights of a row; the last one may be short.
        steps: of each row, float32 [rows].
    """
    rows = to_groups(weight.detach().float(), width)
    chunk = max(1, _CHUNK // width)
    each = zip(torch.split(rows, chunk), torch.split(steps, chunk), strict=True)
    parts = [(part, step[:, None]) for part, step in each]
    counts = rows.new_zeros(_BINS + 1, dtype=torch.int64)
    for part, step in parts:
        levels = (part.abs() / step).round_().clamp_(max=_BINS).long().view(-1)
        counts.scatter_add_(0, levels, counts.new_ones(1).expand_as(levels))
    counts[0] -= rows.numel() - weight.numel()
    bits, lengths = _lengths(counts)
    growth = torch.diff(lengths).clamp_(max=_STEEPEST)
    growth = torch.cat([growth, growth[-1:].clamp(_LAST_LEAST, _LAST_MOST)])
    slopes = []
    for part, step in parts:
        ratio = part.abs() / step
        below = ratio.floor().clamp_(max=_BINS).long()
        slopes.append((growth[below] * ratio).sum(1))
    return CodeLength(bits, torch.cat(slopes).mul_(-math.log(2)))


def _lengths(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy of levels, 0-dim, and lengths that rise with their magnitude, [magnitudes].

    Args:
        counts: how many levels have each magnitude.
    """
    signs = torch.ones_like(counts, dtype=torch.float32)
    signs[0] = 0
    shares = counts / counts.sum()
    bits = (counts * (signs - torch.log2(shares.clamp(min=1e-30)))).sum()
    smooth = counts + _PRIOR
    lengths = signs - torch.log2(smooth / smooth.sum())
    return bits, torch.cummax(lengths, 0).values

"""The size of levels by their own histogram: what an entropy coder makes of them.

A level of magnitude m takes L(m) = -log2(share of m among the tensor's levels) bits, and one more
for its sign. The gradient is that of L interpolated at u = |w| / s, which is the expected length of
a level under uniform noise: d size / d log2(s) = -log(2) * sum of u * L'(u) over the row. With
the histogram held constant, it is the gradient of the entropy of the blurred histogram. The price
moves steps, and not weights: a step sums over its row and decides better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffq.numerics.flat import Flat, Piece, rows_of
from diffq.numerics.grid import wide
from diffq.numerics.noise import row_sums

# Magnitudes that have a length of their own; larger ones go on in a line.
_MOST = 127

# Levels that each magnitude has in advance, so that none takes infinitely many bits.
_PRIOR = 0.3

# Bounds of the slope of lengths: where magnitudes are rare, and beyond the last one.
_STEEPEST, _LAST_LEAST, _LAST_MOST = 8.0, 0.1, 1.0


class CodeLengths(NamedTuple):
    """Bits of the levels of some tensors.

    Attributes:
        bits: their zeroth-order entropy, [tensors].
        slopes: the gradient of the size by the binary logarithm of each row's step, [rows].
    """

    bits: Tensor
    slopes: Tensor


@torch.no_grad()
def code_lengths(flat: Flat, weights: Sequence[Tensor], steps: Tensor) -> CodeLengths:
    """The size of the levels that weights have with some steps.

    Args:
        flat: the tensors, whose rows have a step each.
        weights: of one dtype and device, any strides.
        steps: of each row, float32 [rows].
    """
    like, tensors = weights[0], len(weights)
    steps = steps.to(wide(like.dtype))
    places = torch.arange(tensors, dtype=torch.int32, device="cpu") * (_MOST + 1)
    places = flat.rows.spread(places.to(like.device))
    counts = torch.zeros(tensors * (_MOST + 1), dtype=torch.int64, device=like.device)
    one = counts.new_ones(1)

    def counted(piece: Piece, ratios: Tensor) -> tuple[()]:
        rows = flat.join(weights, like, piece)
        torch.div(rows, rows_of(steps, piece)[:, None], out=ratios).abs_()
        # What is not finite must be no index. Eval refuses it.
        ratios.nan_to_num_(nan=0.0, posinf=0.0)
        levels = ratios.round().clamp_(max=_MOST).int().add_(rows_of(places, piece)[:, None])
        counts.scatter_add_(0, levels.view(-1).long(), one.expand(levels.numel()))
        return ()

    (ratios,) = flat.compute(like, counted)
    table = counts.view(tensors, -1)
    padding = [rows * flat.width - n for rows, n in zip(flat.rows.counts, flat.numels, strict=True)]
    table[:, 0] -= flat.constants.get("padding", padding, torch.int64, like.device)
    bits, growth = _lengths(table.to(steps.dtype))

    def sloped(piece: Piece, _: Tensor) -> tuple[Tensor]:
        ratio = ratios[piece.rows]
        below = ratio.floor().clamp_(max=_MOST).int().add_(rows_of(places, piece)[:, None])
        # Four times as fast as an index of two dimensions.
        slopes = growth.index_select(0, below.view(-1)).view_as(ratio)
        return (row_sums(slopes.mul_(ratio)),)

    _, slopes = flat.compute(like, sloped)
    return CodeLengths(bits, slopes.mul_(-math.log(2)))


def _lengths(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy of the levels of each tensor, and by how much each length exceeds the one before.

    Args:
        counts: how many levels of each tensor have each magnitude, [tensors, magnitudes].

    Returns:
        [tensors], and [tensors * magnitudes] of slopes from each magnitude to the next.
    """
    signs = torch.ones_like(counts[0])
    signs[0] = 0
    shares = counts / counts.sum(1, keepdim=True)
    bits = (counts * (signs - torch.log2(shares.clamp(min=1e-30)))).sum(1)
    smooth = counts + _PRIOR
    lengths = signs - torch.log2(smooth / smooth.sum(1, keepdim=True))
    # Lengths that rise with the magnitude, so that no price makes levels larger.
    growth = torch.diff(torch.cummax(lengths, 1).values, dim=1).clamp_(max=_STEEPEST)
    last = growth[:, -1:].clamp(_LAST_LEAST, _LAST_MOST)
    return bits, torch.cat([growth, last], dim=1).view(-1)

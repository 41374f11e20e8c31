"""The nearest values on min-max grids (Equation 1 of the DiffQ paper), of many tensors at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffq.numerics import grid
from diffq.numerics.flat import WIDTH, Ends, Flat, Piece, rows_of
from diffq.numerics.noise import Drawn
from diffq.numerics.segments import in_numpy

# The least step of full precision.
_LEAST = torch.finfo(torch.float32).tiny


def round_all(flat: Flat, weights: Sequence[Tensor], bits: Tensor, zeros: Tensor | None) -> Drawn:
    """Equation 1 for many tensors at once: the nearest values on their grids; without graph.

    Args:
        flat: the tensors.
        weights: of one dtype and device, any strides.
        bits: of each group, whole ones, [groups] in float32; or [1] for all.
        zeros: whether the grid of each tensor has a zero point, bool [tensors]; None if none has.
    """
    ends, like = flat.ends(weights), weights[0].detach()
    widths = bits if len(bits) == 1 else flat.to_rows(bits)
    if like.dtype == torch.float32 and in_numpy(like):
        return Drawn(flat, _by_tensors(flat, weights, ends, widths, zeros), ends)
    low, high = (flat.rows.spread(end.float()) for end in (ends.low, ends.high))
    points = None if zeros is None else flat.rows.spread(zeros)

    def rounded(piece: Piece, room: Tensor) -> tuple[()]:
        rows = flat.join(weights, like, piece)
        rule = rows_of(low, piece), rows_of(high, piece), rows_of(widths, piece)
        point = None if points is None else rows_of(points, piece)
        levels = grid.to_levels(rows.float(), *rule, point, like.dtype)
        room.copy_(grid.from_levels(levels, *rule, point))
        return ()

    (values,) = flat.compute(like, rounded)
    return Drawn(flat, values, ends)


def _by_tensors(
    flat: Flat, weights: Sequence[Tensor], ends: Ends, widths: Tensor, zeros: Tensor | None
) -> Tensor:
    """The same float32 operations in fewer passes.

    What belongs to a tensor is a number to NumPy, and not one for each row.
    """
    top = torch.exp2(widths).sub_(1)
    steps = flat.rows.spread(ends.high - ends.low) / top
    # Levels of grids without steps are 0, whatever they are multiplied by.
    steps.masked_fill_(steps <= 0, 1)
    # A quotient of such steps is never rounded to a level beyond the last one.
    within = steps.numpy().min() >= _LEAST
    none = torch.zeros(len(weights), dtype=torch.bool, device="cpu")
    points = none if zeros is None else zeros
    added = torch.where((ends.low <= 0) & (ends.high >= 0) & points, 0, ends.low)
    offsets, marked = added.numpy().tolist(), points.numpy().tolist()
    spread = [flat.rows.spread(each) for each in (ends.low, ends.high, points) if any(marked)]

    def rounded(piece: Piece, room: Tensor) -> tuple[()]:
        flat.subtract(weights, offsets, piece, room)
        each, most = rows_of(steps, piece)[:, None], rows_of(top, piece)[:, None]
        if flat.width < WIDTH:
            # A copy takes less time than the second operation on short rows.
            each = each.expand_as(room).contiguous()
        room.div_(each).round_()
        if any(marked[number] for number, *_ in piece.parts):
            low, high, point = (rows_of(numbers, piece) for numbers in spread)
            zero = grid.zero_points(low, high, rows_of(widths, piece), point)[0][:, None]
            room.add_(zero).clamp_(min=0).clamp_(max=most).sub_(zero)
        elif not within:
            room.clamp_(max=most)
        flat.add(room.mul_(each), offsets, piece)
        return ()

    (values,) = flat.compute(weights[0], rounded)
    return values

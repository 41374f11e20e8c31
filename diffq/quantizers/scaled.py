"""What weight quantizers on levels around zero share: LSQ, and small tensors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from diffq.attach.plan import dtype_name
from diffq.errors import WeightError
from diffq.format.records import MAX_RANGE, ScaledRecord
from diffq.numerics.scaled import Levels
from diffq.torch_inside.graph import is_plain


def nearest_levels(levels: Levels, weight: Tensor, scale: Tensor, name: str) -> Tensor:
    """The nearest levels, whole numbers in float32, in the weight's shape.

    Args:
        levels: those of the bitwidth.
        weight: any dtype.
        scale: float32, 0-dim, positive.
        name: the tensor, for errors.

    Raises:
        WeightError: the weight is not finite, or its scale is beyond those that can be stored.
    """
    ratio = weight.detach().float() / scale
    most = MAX_RANGE / -levels.lowest
    finite = torch.isfinite(ratio).all() & (scale <= most)
    if is_plain() and not finite:
        raise WeightError(
            f"The weights and the scale of {name} must be finite, and the scale at most "
            f"{most:.4g}, got scale {scale.item():.4g}. "
            "Find the step that diverged, or exclude the tensor."
        )
    return levels.nearest(ratio, scale, weight.dtype)


def scaled_record(weight: Tensor, nearest: Tensor, scale: Tensor, bits: int) -> ScaledRecord:
    """The levels of `nearest_levels`, counted from the lowest, and their scale."""
    levels = (nearest + 2 ** (bits - 1)).reshape(-1)
    return ScaledRecord(
        shape=tuple(weight.shape),
        dtype=dtype_name(weight.dtype),
        group_size=weight.numel(),
        min_bits=bits,
        bits=np.full(1, bits, np.uint8),
        levels=levels.to(torch.int16).cpu().numpy().view(np.uint16),
        scale=scale.view(1).cpu().numpy(),
    )

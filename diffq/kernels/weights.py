"""Which weights kernels take; imports no Triton."""

from __future__ import annotations

import torch
from torch import Tensor

#: The largest group that a kernel holds.
MAX_GROUP = 1024
#: The largest tensor: places of weights are int32.
MAX_NUMEL = 2**31 - 2**16

#: Of weights and values.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def handles(weight: Tensor, group_size: int | None) -> bool:
    """Whether kernels take a weight in groups of a size; None for a tensor of one group."""
    return (
        type(weight) in (Tensor, torch.nn.Parameter)
        and weight.dtype in DTYPES
        and weight.is_contiguous()
        and 0 < weight.numel() <= MAX_NUMEL
        and (group_size is None or group_size <= MAX_GROUP)
    )


def is_aligned(weight: Tensor) -> bool:
    """Whether a weight can be read 16 bytes at a time.

    One that cannot makes kernels read its whole batch in smaller pieces, so it is best in another.
    """
    return weight.data_ptr() % 16 == 0 and weight.numel() % 16 == 0


def traits(weight: Tensor) -> tuple[bool, bool] | None:
    """What weights of one batch of kernels have in common: `handles` and `is_aligned`."""
    return (handles(weight, None), is_aligned(weight)) if weight.is_cuda else None

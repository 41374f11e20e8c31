"""Writes to tensors, as torch counts them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import torch
from torch import Tensor

#: The integers that hold the bits of an element, by its bytes.
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was written to; None for those of inference mode, which do not count."""
    return None if tensor.is_inference() else tensor._version


#: Address, version and shape of a tensor; None for one of inference mode, which has no version.
Stamp: TypeAlias = tuple[int, int, torch.Size] | None


def stamps(tensors: Iterable[Tensor]) -> list[Stamp]:
    """Stamps of tensors: one changes with each write to its tensor but those through `.data`."""
    # In one pass without calls of Python functions: forwards do this for all tensors.
    return [None if t.is_inference() else (t.data_ptr(), t._version, t.shape) for t in tensors]


def stamp(tensor: Tensor) -> Stamp:
    """The stamp of one tensor."""
    return stamps([tensor])[0]

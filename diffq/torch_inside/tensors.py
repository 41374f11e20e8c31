"""Writes to tensors, as torch counts them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

#: The integers that hold the bits of an element, by its bytes.
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was written to; None for those of inference mode, which do not count."""
    return None if tensor.is_inference() else tensor._version


def stamp(tensor: Tensor) -> tuple[int, int] | None:
    """Address and version, one of which changes with each write but those through `.data`.

    None for tensors of inference mode, which count no versions.
    """
    return None if tensor.is_inference() else (tensor.data_ptr(), tensor._version)


def stamps(tensors: Iterable[Tensor]) -> list[tuple[int, int] | None]:
    """The stamps of many tensors, in one pass without calls of Python functions."""
    return [None if t.is_inference() else (t.data_ptr(), t._version) for t in tensors]

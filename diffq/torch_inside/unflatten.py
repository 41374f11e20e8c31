"""Many tensors in one buffer, each call in C++ for a list of them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """A fresh buffer with the elements of all tensors, which are of one dtype and device."""
    if len(tensors) == 1:
        # One tensor would be flattened to a view of itself.
        return tensors[0].reshape(-1).clone()
    flat: Tensor = _flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call]
    return flat


def cut(buffer: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Views of a buffer, one after the other in the shapes of some tensors."""
    views: tuple[Tensor, ...] = _unflatten_dense_tensors(buffer, like)  # type: ignore[no-untyped-call]
    return views

"""The quantized weights of eval, until what they are computed from changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor

# Elements of each tensor that are compared at each entry.
_PROBED = 64


class _Seen(NamedTuple):
    """A tensor, and what changes when it is written to, other than through `.data`."""

    tensor: ref[Tensor]
    version: int
    pointer: int

    def is_still(self, tensor: Tensor) -> bool:
        """Whether this is the tensor, unchanged."""
        # A tensor may have the address and the version of one that is gone.
        if self.tensor() is not tensor:
            return False
        return tensor._version == self.version and tensor.data_ptr() == self.pointer


def _see(tensor: Tensor) -> _Seen | None:
    if tensor.is_inference():
        return None  # counts no versions
    return _Seen(ref(tensor), tensor._version, tensor.data_ptr())


class EvalCache:
    """Quantized weights by index, with the tensors that they were computed from.

    Writes through `.data` leave no trace in versions. On a CPU, some elements of each weight
    are compared at each entry of a forward; a write to others passes unseen until `train()`
    or `eval()` is called. On other devices that would wait for the device.
    """

    def __init__(self, count: int) -> None:
        self._kept: list[tuple[_Seen, Tensor] | None] = [None] * count
        self._learned: _Seen | None = None
        self._probe: tuple[list[int], list[Tensor], Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> EvalCache:
        """Copies begin with nothing."""
        return EvalCache(len(self._kept))

    def __reduce__(self) -> tuple[type[EvalCache], tuple[int]]:
        """Pickles hold nothing."""
        return EvalCache, (len(self._kept),)

    def clear(self) -> None:
        """Forgets everything."""
        self._kept = [None] * len(self._kept)
        self._probe = None

    def validate(self, learned: Tensor | None, weights: Sequence[Tensor]) -> None:
        """Forgets what a change of the learned parameter, or a write to `.data`, made wrong."""
        if learned is not None and not (self._learned and self._learned.is_still(learned)):
            self.clear()
            self._learned = _see(learned)
        if any(self._kept):
            self._compare([weight for weight in weights if _is_probed(weight)])

    def get(self, index: int, weight: Tensor) -> Tensor | None:
        """The quantized weight, if it is still right."""
        kept = self._kept[index]
        return kept[1] if kept is not None and kept[0].is_still(weight) else None

    def put(self, index: int, weight: Tensor, value: Tensor) -> None:
        """Keeps a quantized weight."""
        seen = _see(weight)
        self._kept[index] = None if seen is None else (seen, value)
        self._probe = (
            None if self._probe and weight.data_ptr() not in self._probe[0] else self._probe
        )

    def _compare(self, weights: Sequence[Tensor]) -> None:
        where = [weight.data_ptr() for weight in weights]
        if not weights:
            return
        if self._probe is None or self._probe[0] != where:
            views = [w.detach().view(-1)[:: max(1, w.numel() // _PROBED)] for w in weights]
            self._probe = where, views, _joined(views)
            return
        found = _joined(self._probe[1])
        if not torch.equal(found, self._probe[2]):
            self.clear()


def _is_probed(weight: Tensor) -> bool:
    return weight.is_cpu and weight.is_contiguous() and not weight.is_inference()


def _joined(views: Sequence[Tensor]) -> Tensor:
    return torch.cat([view.float() for view in views])

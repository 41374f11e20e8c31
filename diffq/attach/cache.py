"""The quantized weights of eval, until what they are computed from changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Elements of each tensor that are compared at each entry.
_PROBED = 64


class _Seen(NamedTuple):
    """A tensor, and what changes when it is written to, other than through `.data`."""

    # No weak reference, with which torch cannot swap tensors.
    tensor: Tensor
    version: int
    pointer: int

    def is_still(self, tensor: Tensor) -> bool:
        """Whether this is the tensor, unchanged."""
        if self.tensor is not tensor or tensor.is_inference():
            return False
        return tensor._version == self.version and tensor.data_ptr() == self.pointer


def _see(tensor: Tensor) -> _Seen | None:
    if tensor.is_inference():
        return None  # counts no versions
    return _Seen(tensor, tensor._version, tensor.data_ptr())


class EvalCache:
    """Quantized weights by index, with the tensors that they were computed from.

    Writes through `.data` leave no trace in versions. On a CPU, some elements of each weight
    are compared at each entry of a forward; a write to others passes unseen until `train()`
    or `eval()` is called. On other devices that would wait for the device.
    """

    def __init__(self, count: int) -> None:
        self._kept: list[tuple[_Seen, Tensor] | None] = [None] * count
        self._learned: _Seen | None = None
        # By the indices of some weights: views of some elements, and what they were.
        self._probes: dict[tuple[int, ...], tuple[list[Tensor], Tensor]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> EvalCache:
        """Copies begin with nothing."""
        return EvalCache(len(self._kept))

    def __reduce__(self) -> tuple[type[EvalCache], tuple[int]]:
        """Pickles hold nothing."""
        return EvalCache, (len(self._kept),)

    def clear(self) -> None:
        """Forgets everything."""
        self._kept = [None] * len(self._kept)
        self._learned = None
        self._probes = {}

    def values(
        self, learned: Tensor | None, indices: Sequence[int], weights: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """The quantized weights that are still right, and None for others.

        Args:
            learned: the flat parameter.
            indices: of the quantizers.
            weights: of each.
        """
        known = self._probes.get(tuple(indices))
        for views, values in self._probes.values() if known is None else [known]:
            if not torch.equal(_joined(views), values):
                self.clear()
                break
        if learned is not None and not (self._learned and self._learned.is_still(learned)):
            self.clear()
            self._learned = _see(learned)
        kept = [self._kept[index] for index in indices]
        each = zip(kept, weights, strict=True)
        return [k[1] if k is not None and k[0].is_still(weight) else None for k, weight in each]

    def put(self, index: int, weight: Tensor, value: Tensor) -> None:
        """Keeps a quantized weight."""
        seen = _see(weight)
        self._kept[index] = None if seen is None else (seen, value)
        self._probes = {}

    def probe(self, indices: Sequence[int], weights: Sequence[Tensor]) -> None:
        """Notes some elements of weights whose quantized ones are kept."""
        where = tuple(indices)
        if where and where not in self._probes:
            probed = [weight for weight in weights if _is_probed(weight)]
            views = [w.detach().view(-1)[:: max(1, w.numel() // _PROBED)] for w in probed]
            self._probes[where] = views, _joined(views)


def _is_probed(weight: Tensor) -> bool:
    return weight.is_cpu and weight.is_contiguous() and not weight.is_inference()


def _joined(views: Sequence[Tensor]) -> Tensor:
    if not views:
        return torch.empty(0, device="cpu")
    if len({view.dtype for view in views}) > 1:
        views = [view.double() for view in views]
    return torch.cat(list(views))

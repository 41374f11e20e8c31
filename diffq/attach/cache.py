"""The quantized weights of eval, until what they are computed from changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from diffq.torch_inside.tensors import INTEGERS, stamp

# Elements of each tensor that are compared at each entry.
_PROBED = 64


class _Seen(NamedTuple):
    """A tensor, and what changes when it is written to, other than through `.data`."""

    # No weak reference, with which torch cannot swap tensors.
    tensor: Tensor
    stamp: tuple[int, int]

    def is_still(self, tensor: Tensor) -> bool:
        """Whether this is the tensor, unchanged."""
        return self.tensor is tensor and stamp(tensor) == self.stamp


def _see(tensor: Tensor) -> _Seen | None:
    seen = stamp(tensor)
    return None if seen is None else _Seen(tensor, seen)


class _Probe:
    """Some elements of weights on the CPU, and what they were, as integers of their bits.

    NumPy joins hundreds of short views in half the time of torch.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._views = [_elements(weight) for weight in weights if _is_probed(weight)]
        self._bits = self._joined()

    def is_still(self) -> bool:
        """Whether the elements are what they were."""
        return self._joined() == self._bits

    def _joined(self) -> bytes:
        return np.concatenate(self._views).tobytes() if self._views else b""


class EvalCache:
    """Quantized weights by index, with the tensors that they were computed from.

    Writes through `.data` leave no trace in versions. On a CPU, some elements of each weight
    are compared at each entry of a forward; a write to others passes unseen until `train()`
    or `eval()` is called. On other devices that would wait for the device.
    """

    def __init__(self, count: int) -> None:
        self._kept: list[tuple[_Seen, Tensor] | None] = [None] * count
        self._learned: _Seen | None = None
        # By the indices of some weights.
        self._probes: dict[tuple[int, ...], _Probe] = {}

    def __reduce__(self) -> tuple[type[EvalCache], tuple[int]]:
        """Copies and pickles hold nothing."""
        return EvalCache, (len(self._kept),)

    def clear(self) -> None:
        """Forgets everything."""
        self._kept = [None] * len(self._kept)
        self._learned = None
        self._probes = {}

    def _has_learned(self, learned: Tensor | None) -> bool:
        return learned is None or bool(self._learned and self._learned.is_still(learned))

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
        if not all(probe.is_still() for probe in ([known] if known else self._probes.values())):
            self.clear()
        if learned is not None and not self._has_learned(learned):
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
            self._probes[where] = _Probe(weights)


def _is_probed(weight: Tensor) -> bool:
    seen = stamp(weight)
    has_memory = seen is not None and seen[0] != 0
    return has_memory and weight.is_cpu and weight.is_contiguous()


def _elements(weight: Tensor) -> NDArray[Any]:
    bits = weight.detach().view(-1).view(INTEGERS[weight.element_size()])
    # Not `numpy()`, after which torch refuses to resize the memory.
    return np.from_dlpack(bits[:: max(1, weight.numel() // _PROBED)])

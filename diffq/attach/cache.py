"""The quantized weights of eval, until what they are computed from changes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from diffq.attach.place import Place
from diffq.attach.sample import Forward
from diffq.torch_inside.modules import parameter_in
from diffq.torch_inside.tensors import INTEGERS, Stamp, stamp, stamps

# Elements of each tensor that are compared at each entry.
_PROBED = 64


class _Seen(NamedTuple):
    """A tensor, and what changes when it is written to, other than through `.data`."""

    # No weak reference, with which torch cannot swap tensors.
    tensor: Tensor
    stamp: Stamp

    def is_still(self, tensor: Tensor) -> bool:
        """Whether this is the tensor, unchanged."""
        return self.tensor is tensor and stamp(tensor) == self.stamp


def _see(tensor: Tensor) -> _Seen | None:
    seen = stamp(tensor)
    return None if seen is None else _Seen(tensor, seen)


class _Kept(NamedTuple):
    """A quantized weight.

    Attributes:
        weight: what it was computed from.
        value: the quantized weight.
        elements: a view of some elements of a weight on the CPU; else of none.
        bits: what they were.
    """

    weight: _Seen
    value: Tensor
    elements: NDArray[Any]
    bits: NDArray[Any]


class _Elements:
    """Some elements of weights, which show writes through `.data`.

    Reading them is safe as long as the stamps of the weights are what they were: the memory of
    a view is gone where its storage was resized.
    """

    def __init__(self, kept: Iterable[_Kept]) -> None:
        # NumPy joins hundreds of short views in half the time of torch.
        views, bits = zip(*((each.elements, each.bits) for each in kept), strict=True)
        self._views, self._bits = views, np.concatenate(bits).tobytes()

    def are_still(self) -> bool:
        """Whether they are what they were."""
        return np.concatenate(self._views).tobytes() == self._bits


class _Entry:
    """What eval forwards of a module begin with: all tensors in it are unchanged Parameters.

    Args:
        forward: the first of the forwards, without gradients.
        places: of the module.
        pairs: the place of each tensor that was quantized, and the tensor.
        kept: of each tensor.
    """

    def __init__(
        self,
        forward: Forward,
        places: Sequence[Place],
        pairs: Sequence[tuple[Place, Tensor]],
        kept: Sequence[_Kept],
    ) -> None:
        self._places = places  # the entry is found by their identity
        self._samples, self._writes = forward.quantized, forward.writes
        # Lists of what a check needs and no more: in a large model, all of it has left the caches.
        self._owners = [(p.owner, type(p.owner), p.name, weight) for p, weight in pairs]
        self._weights = [weight for _, weight in pairs]
        self._stamps = [each.weight.stamp for each in kept]
        self._elements = _Elements(kept)
        each_kept = zip(pairs, kept, strict=True)
        self._ready = {id(w): k.value for (p, w), k in each_kept if p.quantizer.readings.ever}

    def is_right(self) -> bool:
        """Whether all modules are in eval, and hold the same Parameters, unchanged."""
        for owner, kind, name, weight in self._owners:
            if owner.training or type(owner) is not kind or parameter_in(owner, name) is not weight:
                return False
        return stamps(self._weights) == self._stamps and self._elements.are_still()

    def begin(self, forward: Forward) -> None:
        """Has a forward compute with the same tensors."""
        forward.quantized = list(self._samples)
        forward.ready, forward.writes = self._ready, self._writes


class EvalCache:
    """Quantized weights by index, with the tensors that they were computed from.

    Writes through `.data` leave no trace in versions. On a CPU, some elements of each weight
    are compared at each entry of a forward; a write to others passes unseen until `train()`
    or `eval()` is called. On other devices that would wait for the device.
    """

    def __init__(self, count: int) -> None:
        self._kept: list[_Kept | None] = [None] * count
        # What they were computed with.
        self._learned: _Seen | None = None
        # By the identity of the places.
        self._entries: dict[int, _Entry] = {}

    def __reduce__(self) -> tuple[type[EvalCache], tuple[int]]:
        """Copies and pickles hold nothing."""
        return EvalCache, (len(self._kept),)

    def clear(self) -> None:
        """Forgets all quantized weights."""
        self._kept = [None] * len(self._kept)
        self._entries = {}

    def begin(self, forward: Forward, places: Sequence[Place], learned: Tensor | None) -> bool:
        """Has a forward without gradients compute with what one before it did, if all is right.

        Args:
            forward: the forward.
            places: the same object as in that forward.
            learned: the flat parameter.
        """
        entry = self._entries.get(id(places))
        if entry is None or not self._has_learned(learned) or not entry.is_right():
            return False
        entry.begin(forward)
        return True

    def keep(
        self, forward: Forward, places: Sequence[Place], pairs: Sequence[tuple[Place, Tensor]]
    ) -> None:
        """Keeps what a forward without gradients begins with, if it can serve others.

        Args:
            forward: the forward, whose samples are then shared.
            places: of the module that is called.
            pairs: those of them that it began with, and the tensors.
        """
        kept: list[_Kept] = []
        for place, _ in pairs:
            index = place.quantizer.index
            known, sample = self._kept[index], forward.quantized[index]
            # Another thread may have changed something since.
            if known is None or sample is None or known.value is not sample.value:
                return
            kept.append(known)
        if not kept or len(kept) < len({place.quantizer.index for place in places}):
            return
        entry = _Entry(forward, places, pairs, kept)
        if entry.is_right():
            self._entries[id(places)] = entry
            entry.begin(forward)

    def values(
        self, learned: Tensor | None, indices: Sequence[int], weights: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """The quantized weights that are still right, and None for others.

        Args:
            learned: the flat parameter.
            indices: of the quantizers.
            weights: of each.
        """
        if learned is not None and not self._has_learned(learned):
            self.clear()
            self._learned = _see(learned)
        each = zip((self._kept[index] for index in indices), weights, strict=True)
        kept = [k if k is not None and k.weight.is_still(weight) else None for k, weight in each]
        right = [k for k in kept if k is not None]
        if right and not _Elements(right).are_still():
            self.clear()
            return [None] * len(kept)
        return [None if k is None else k.value for k in kept]

    def put(self, index: int, weight: Tensor, value: Tensor) -> None:
        """Keeps a quantized weight."""
        seen, elements = _see(weight), _elements(weight)
        kept = None if seen is None else _Kept(seen, value, elements, elements.copy())
        self._kept[index] = kept

    def _has_learned(self, learned: Tensor | None) -> bool:
        return learned is None or bool(self._learned and self._learned.is_still(learned))


def _elements(weight: Tensor) -> NDArray[Any]:
    seen = stamp(weight)
    has_memory = seen is not None and seen[0] != 0
    if not (has_memory and weight.is_cpu and weight.is_contiguous()):
        return np.empty(0, np.int8)
    bits = weight.detach().view(-1).view(INTEGERS[weight.element_size()])
    # Not `numpy()`, after which torch refuses to resize the memory.
    return np.from_dlpack(bits[:: max(1, weight.numel() // _PROBED)])

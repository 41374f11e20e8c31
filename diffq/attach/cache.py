"""The quantized weights of eval, until what they are computed from changes."""

from __future__ import annotations

from collections.abc import Sequence
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


class _Probe:
    """Some elements of weights on the CPU, and what they were, as integers of their bits.

    NumPy joins hundreds of short views in half the time of torch.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._weights = [weight for weight in weights if _is_probed(weight)]
        self._pointers = [weight.data_ptr() for weight in self._weights]
        self._views = [_elements(weight) for weight in self._weights]
        self._bits = self._joined()

    def is_still(self) -> bool:
        """Whether the elements are what they were."""
        # Pointers first: the memory of a view is gone where its storage was resized.
        if [weight.data_ptr() for weight in self._weights] != self._pointers:
            return False
        return self._joined() == self._bits

    def _joined(self) -> bytes:
        return np.concatenate(self._views).tobytes() if self._views else b""


class _Entry:
    """What eval forwards of a module begin with: all tensors in it are unchanged Parameters.

    Args:
        places: of the module.
        pairs: the place of each tensor that was quantized, and the tensor.
        forward: the first of the forwards, without gradients.
        stamps: of the tensors.
        probe: of the tensors.
    """

    def __init__(
        self,
        places: Sequence[Place],
        pairs: Sequence[tuple[Place, Tensor]],
        forward: Forward,
        stamps: list[Stamp],
        probe: _Probe,
    ) -> None:
        self.places = places
        self._samples, self._writes = forward.quantized, forward.writes
        # Lists of what a check needs and no more: in a large model, all of it has left the caches.
        self._owners = [(p.owner, type(p.owner), p.name, weight) for p, weight in pairs]
        self._weights = [weight for _, weight in pairs]
        self._stamps, self._probe = stamps, probe
        read = [(p.quantizer.index, w) for p, w in pairs if p.quantizer.readings.ever]
        self._ready = {id(w): s.value for i, w in read if (s := self._samples[i]) is not None}

    def is_right(self) -> bool:
        """Whether all modules are in eval, and hold the same Parameters, unchanged."""
        for owner, kind, name, weight in self._owners:
            if owner.training or type(owner) is not kind or parameter_in(owner, name) is not weight:
                return False
        return stamps(self._weights) == self._stamps and self._probe.is_still()

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
        self._kept: list[tuple[_Seen, Tensor] | None] = [None] * count
        self._learned: _Seen | None = None
        # By the indices of some weights.
        self._probes: dict[tuple[int, ...], _Probe] = {}
        # By the identity of the places, which each holds.
        self._entries: dict[int, _Entry] = {}

    def __reduce__(self) -> tuple[type[EvalCache], tuple[int]]:
        """Copies and pickles hold nothing."""
        return EvalCache, (len(self._kept),)

    def clear(self) -> None:
        """Forgets everything."""
        self._kept = [None] * len(self._kept)
        self._learned = None
        self._probes = {}
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
        indices = tuple(place.quantizer.index for place, _ in pairs)
        seen = [kept[0].stamp for i in indices if (kept := self._kept[i]) is not None]
        probe = self._probes.get(indices)
        # Nothing is known where another thread has changed something since.
        if probe is None or {len(seen), len({p.quantizer.index for p in places})} != {len(pairs)}:
            return
        entry = _Entry(places, pairs, forward, seen, probe)
        if entry.is_right():
            self._entries[id(places)] = entry
            entry.begin(forward)

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

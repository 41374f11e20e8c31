"""The quantized weights that an eval forward computed with, for the next one of the same module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from diffq.attach.place import Place
from diffq.attach.sample import Sample
from diffq.torch_inside.modules import parameter_in
from diffq.torch_inside.tensors import stamp, stamps


class Ready:
    """The quantized weights of a module and of those below it, and how to see that they are right.

    Args:
        places: where the tensors are, tied ones at each place.
        pairs: one place of each tensor, and its weight.
        samples: of eval, by index.

    Attributes:
        values: by the identity of each weight that a forward has read, its quantized weight, which
            the property of the tensor gives where gradients are off.
    """

    def __init__(
        self,
        places: Sequence[Place],
        pairs: Sequence[tuple[Place, Tensor]],
        samples: Sequence[Sample | None],
    ) -> None:
        self.places = places
        self.pairs = pairs
        self.values: dict[int, Tensor] = {}
        self._samples = [None if s is None else replace(s, shared=True) for s in samples]
        # Lists of what a check needs and no more: in a large model, all of it has left the caches.
        self._owners = [(p.owner, type(p.owner), p.name, weight) for p, weight in pairs]
        self._weights = [weight for _, weight in pairs]
        self._shapes = [weight.shape for weight in self._weights]
        self._quantized = [s.value for p, _ in pairs if (s := samples[p.quantizer.index])]
        self._stamps, self._quantized_stamps = stamps(self._weights), stamps(self._quantized)

    def is_right(self) -> bool:
        """Whether all modules are in eval, and hold the same weights, unchanged."""
        for owner, kind, name, weight in self._owners:
            if owner.training or type(owner) is not kind or parameter_in(owner, name) is not weight:
                return False
        if stamps(self._weights) != self._stamps:
            return False
        return [weight.shape for weight in self._weights] == self._shapes

    def samples(self, shared: bool) -> list[Sample | None]:
        """The samples by index.

        Args:
            shared: with other forwards, so none may hold a graph.
        """
        if shared:
            return list(self._samples)
        return [None if s is None else replace(s, shared=False) for s in self._samples]

    def check(self) -> None:
        """Raises AttachError for a tensor that a forward assigned or wrote to."""
        for number, (owner, _, name, weight) in enumerate(self._owners):
            if parameter_in(owner, name) is not weight:
                raise self.pairs[number][0].replaced(weight)
        found = stamps(self._quantized)
        if found != self._quantized_stamps:
            each = zip(self.pairs, found, self._quantized_stamps, strict=True)
            raise next(
                p.refused("write to", "written to") for (p, _), now, was in each if now != was
            )


def can_be_ready(places: Sequence[Place], pairs: Sequence[tuple[Place, Tensor]]) -> bool:
    """Whether a forward computed all tensors of some places, from Parameters in eval."""
    unique = {place.quantizer.index for place in places}
    return 0 < len(unique) == len(pairs) and all(
        not place.owner.training
        and parameter_in(place.owner, place.name) is weight
        and stamp(weight) is not None
        for place, weight in pairs
    )

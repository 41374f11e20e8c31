"""Writes to quantized tensors inside of a forward, which would be lost."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffq.attach.place import Place
from diffq.attach.sample import Forward, Sample
from diffq.torch_inside.modules import parameter_in
from diffq.torch_inside.tensors import INTEGERS, stamps


class Writes:
    """Compares what a forward computed with, at its end, with what it was at the beginning.

    Args:
        forward: the forward.
        pairs: the places of the tensors that it began with, and the tensors.
        thorough: also look for writes through `.data`, which leave no trace in versions. It
            takes a pass over each value, and waits for the device.
    """

    def __init__(
        self, forward: Forward, pairs: Sequence[tuple[Place, Tensor]], thorough: bool
    ) -> None:
        self._pairs = pairs
        samples = [(place, forward.first(place.quantizer.index)) for place, _ in pairs]
        # A sample that is the weight itself may be written to.
        self._watched = [(place, s) for place, s in samples if s is not None and not s.is_weight]
        self._computed = [sample.value for _, sample in self._watched]
        self._stamps = stamps(self._computed)
        self._sums = _checksums(self._computed) if thorough else None

    def check(self) -> None:
        """Raises AttachError for a tensor that was assigned or written to."""
        for place, base in self._pairs:
            now = parameter_in(place.owner, place.name)
            # A tensor that is no Parameter is put in place for a call, or computed.
            if now is not base and isinstance(base, nn.Parameter):
                raise place.replaced(base)
        each = zip(self._watched, self._stamps, stamps(self._computed), strict=True)
        for (place, sample), before, after in each:
            if before != after or _was_moved(sample):
                raise place.refused("write to", "written to")
        if self._sums is None:
            return
        changed = (_checksums(self._computed) != self._sums).nonzero().view(-1).tolist()
        for number in changed[:1]:
            raise self._watched[number][0].refused("write to", "written to")


def _was_moved(sample: Sample) -> bool:
    """Whether other memory was put into the tensor that was read."""
    connected, value = sample.connected, sample.value
    if connected is None or connected.dtype != value.dtype:
        return False
    return connected.data_ptr() != value.data_ptr()


def _checksums(values: Sequence[Tensor]) -> Tensor:
    """The sum of the bits of each value, int64 [values] on the CPU."""
    sums = [
        value.detach().view(INTEGERS[value.element_size()]).sum(dtype=torch.int64)
        for value in values
    ]
    if len({each.device for each in sums}) > 1:
        sums = [each.cpu() for each in sums]
    return torch.stack(sums).cpu() if sums else torch.zeros(0, dtype=torch.int64, device="cpu")

"""Writes to quantized tensors inside of a forward, which would be lost."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffq.attach.place import Place
from diffq.attach.sample import Forward, Sample
from diffq.torch_inside.modules import parameter_in
from diffq.torch_inside.tensors import INTEGERS, version_of


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
        self._samples = [forward.first(place.quantizer.index) for place, _ in pairs]
        self._versions = self._present_versions()
        self._sums = _checksums(self._samples) if thorough else None

    def check(self) -> None:
        """Raises AttachError for a tensor that was assigned or written to."""
        for place, base in self._pairs:
            now = parameter_in(place.owner, place.name)
            # A tensor that is no Parameter is put in place for a call, or computed.
            if now is not base and isinstance(base, nn.Parameter):
                raise place.replaced(base)
        present = self._present_versions()
        for (place, _), sample, before, after in zip(
            self._pairs, self._samples, self._versions, present, strict=True
        ):
            if before != after or _was_moved(sample):
                raise place.refused("write to", "written to")
        if self._sums is None:
            return
        changed = (_checksums(self._samples) != self._sums).nonzero().view(-1).tolist()
        for number in changed[:1]:
            raise self._pairs[number][0].refused("write to", "written to")

    def _present_versions(self) -> list[int | None]:
        # A sample that is the weight itself may be written to.
        values = [None if s is None or s.is_weight else s.value for s in self._samples]
        return [None if v is None else version_of(v) for v in values]


def _was_moved(sample: Sample | None) -> bool:
    """Whether other memory was put into the tensor that was read."""
    if sample is None or sample.connected is None or sample.is_weight:
        return False
    connected, value = sample.connected, sample.value
    return connected.dtype == value.dtype and connected.data_ptr() != value.data_ptr()


def _checksums(samples: Sequence[Sample | None]) -> Tensor:
    """The sum of the bits of each value, int64 [samples] on the CPU."""
    sums = []
    for sample in samples:
        if sample is None or sample.is_weight:
            sums.append(torch.zeros((), dtype=torch.int64, device="cpu"))
        else:
            value = sample.value.detach()
            sums.append(value.view(INTEGERS[value.element_size()]).sum(dtype=torch.int64))
    devices = {each.device for each in sums}
    if len(devices) > 1:
        sums = [each.cpu() for each in sums]
    return torch.stack(sums).cpu() if sums else torch.zeros(0, dtype=torch.int64, device="cpu")

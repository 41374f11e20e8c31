"""Writes to a quantized tensor inside of a forward, which would be lost."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffq.attach.sample import Sample


class Writes:
    """Compares the samples of a forward at its end with what they were at its beginning.

    Args:
        samples: those that the forward began with.
        thorough: also look for writes through `.data`, which leave no trace in versions. It
            takes a pass over each value, and waits for the device.
    """

    def __init__(self, samples: Sequence[Sample | None], thorough: bool) -> None:
        # A sample that is the weight itself may be written to.
        self._samples = [(i, s) for i, s in enumerate(samples) if s is not None and not s.is_weight]
        self._versions = [_version(sample.value) for _, sample in self._samples]
        self._sums = [_checksum(sample.value) for _, sample in self._samples] if thorough else None

    def first(self) -> int | None:
        """The index of the first sample that was written to; None if none was."""
        for (index, sample), version in zip(self._samples, self._versions, strict=True):
            if _version(sample.value) != version or _was_moved(sample):
                return index
        if self._sums is None:
            return None
        for (index, sample), checksum in zip(self._samples, self._sums, strict=True):
            if not torch.equal(_checksum(sample.value), checksum):
                return index
        return None


def _was_moved(sample: Sample) -> bool:
    """Whether other memory was put into the tensor that was read."""
    connected, value = sample.connected, sample.value
    if connected is None or connected.dtype != value.dtype:
        return False
    return connected.data_ptr() != value.data_ptr()


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _checksum(value: Tensor) -> Tensor:
    """The sum of a tensor's bits, 0-dim int64."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return value.detach().view(kinds[value.element_size()]).sum(dtype=torch.int64)

"""What batches of weight quantizers share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffq.attach.sample import Sample
from diffq.kernels.availability import available
from diffq.kernels.weights import handles
from diffq.numerics.flat import Flat
from diffq.torch_inside.graph import is_plain


class Kernels:
    """The kernels of a batch, by dtype and device, made when they are first used.

    Args:
        flat: the tensors.
        make: makes the kernels for a dtype and a device.
    """

    def __init__(self, flat: Flat, make: Callable[[torch.dtype, torch.device], Any]) -> None:
        self._width = flat.width if flat.grouped else None
        self._make = make
        self._made: dict[tuple[torch.dtype, torch.device], Any] = {}

    def of(self, weights: Sequence[Tensor]) -> Any | None:
        """The kernels for some weights; None where torch's operations compute.

        Args:
            weights: of one dtype and device, all of which kernels take, or none.
        """
        weight = weights[0]
        if not is_plain() or not available(weight.device) or not handles(weight, self._width):
            return None
        key = weight.dtype, weight.device
        if key not in self._made:
            self._made[key] = self._make(*key)
        return self._made[key]


def samples_of(
    weights: Sequence[Tensor], values: Sequence[Tensor], drawn: Any = None
) -> list[Sample]:
    """A sample of each weight of a batch, with what connecting them needs besides."""
    return [Sample(w, value, drawn) for w, value in zip(weights, values, strict=True)]


def values_of(samples: Sequence[Sample]) -> list[Tensor]:
    """The value of each sample."""
    return [sample.value for sample in samples]

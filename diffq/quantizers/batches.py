"""What batches of weight quantizers share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffq.attach.batch import Batch, Run
from diffq.attach.sample import Sample
from diffq.checks import MAX_BITS
from diffq.format.records import MAX_RANGE
from diffq.kernels.availability import available
from diffq.kernels.weights import handles
from diffq.numerics.flat import Flat
from diffq.numerics.rounding import round_all
from diffq.quantizers.grid import GridQuantizer
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


class GridBatch(Batch, ABC):
    """Tensors with one range each: true quantization of all together, training one by one.

    Args:
        quantizers: weight quantizers of one class, alike.
        group_size: weights that share a bitwidth; None if each tensor has one.
    """

    def __init__(self, quantizers: Sequence[GridQuantizer], group_size: int | None) -> None:
        super().__init__(quantizers)
        self._flat = Flat([q.plan.shape for q in quantizers], group_size)
        self._grids = Kernels(self._flat, self._make_grids)

    @abstractmethod
    def whole_bits(self, weight: Tensor, learned: Tensor | None) -> Tensor:
        """Rounded bitwidths of all groups, float32 [groups], or [1] for one that all share.

        Args:
            weight: one of the tensors, whose device they are on.
            learned: what all quantizers learn.
        """

    def quantize(self, weights: Sequence[Tensor], learned: Run) -> list[Tensor]:
        """Equation 1 of the DiffQ paper at whole bitwidths."""
        values = self._quantized(weights, learned.flat) if is_plain() else None
        return super().quantize(weights, learned) if values is None else values

    def may_have_zeros(self) -> list[bool]:
        """Whether the weights of each tensor may be exactly zero."""
        return [quantizer.may_have_zeros for quantizer in self.quantizers]

    def _quantized(self, weights: Sequence[Tensor], learned: Tensor | None) -> list[Tensor] | None:
        """The values; None if a weight or a bitwidth may be one that is refused."""
        bits, kernels = self.whole_bits(weights[0], learned), self._grids.of(weights)
        if kernels is not None:
            given = bits.expand(self._flat.groups.total).contiguous()
            values, ends, zeros = kernels.quantize(weights, given)
        else:
            zeros = self._flat.zeros(weights, [True] * len(weights))
            rounded = round_all(self._flat, weights, bits, zeros if zeros.any() else None)
            values = self._flat.split(rounded.values.to(weights[0].dtype))
            ends = torch.stack((rounded.ends.low, rounded.ends.high))
        # No range is more than twice as long as its ends, and NaN is not at most anything.
        within = (ends.abs().max() <= MAX_RANGE / 2) & (bits.max() <= MAX_BITS)
        right, *found = torch.cat((within.view(1), zeros)).tolist()
        for quantizer, has_zeros in zip(self.quantizers, found, strict=True):
            quantizer.note_zeros(has_zeros)
        return values if right else None

    def _make_grids(self, dtype: torch.dtype, device: torch.device) -> Any:
        from diffq.kernels.rounded import Rounded

        width = self._flat.width if self._flat.grouped else None
        return Rounded(self._flat.shapes, width, dtype, device)

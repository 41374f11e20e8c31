"""Batches of weight quantizers: all tensors in a few operations, with one node of autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffq.attach.sample import Sample
from diffq.attach.weight import Batch, Run
from diffq.numerics import noise, scaled
from diffq.numerics.flat import Flat
from diffq.numerics.noise import Drawn, straight_through

if TYPE_CHECKING:
    from diffq.quantizers.diffq import DiffQWeight
    from diffq.quantizers.grid import GridQuantizer
    from diffq.quantizers.lsq import LSQWeight
    from diffq.quantizers.qat import QATWeight
    from diffq.quantizers.quant_noise import QuantNoiseWeight


def samples_of(drawn: Drawn, weights: Sequence[Tensor]) -> list[Sample]:
    """A sample of each weight of a batch."""
    each = enumerate(zip(weights, drawn.flat.split(drawn.values), strict=True))
    return [Sample(weight, value, drawn, place) for place, (weight, value) in each]


def values_of(samples: Sequence[Sample]) -> list[Tensor]:
    """The value of each sample."""
    return [sample.value for sample in samples]


def only_of(sample: Sample) -> Drawn:
    """What a sample of a batch was drawn with, for a node of its own."""
    assert sample.drawn is not None
    return sample.drawn.only(sample.place)


class NoisyBatch(Batch):
    """DiffQ's tensors of one law, group size, kind of noise and stage of the bitwidths."""

    def __init__(self, quantizers: Sequence[DiffQWeight]) -> None:
        super().__init__(quantizers)
        self._first, self._all = quantizers[0], tuple(quantizers)
        self.flat = Flat([q.plan.shape for q in quantizers], self._first.row_size)

    def draw(self, weights: Sequence[Tensor], learned: Run) -> list[Sample]:
        """Equation 6 of the DiffQ paper."""
        first, bits = self._first, self._bits(weights[0], learned.flat)
        if first.noise == "rounding":
            drawn = noise.round_all(self.flat, weights, torch.round(bits), _zeros(self._all))
        else:
            kind, scale = first.noise, first.settings.noise_scale
            drawn = noise.perturb(self.flat, weights, bits, kind, scale, _zeros(self._all))
        return samples_of(drawn, weights)

    def connect(
        self, weights: Sequence[Tensor], samples: Sequence[Sample], learned: Run
    ) -> list[Tensor]:
        """The gradient of Equation 6 to the weights, their ranges and bitwidths."""
        drawn = samples[0].drawn
        assert drawn is not None
        logits = learned.flat if self._first.learning else None
        return noise.pass_noise(drawn, self._first.law, logits, weights, values_of(samples))

    def _bits(self, weight: Tensor, logits: Tensor | None) -> Tensor:
        first = self._first
        if first.learning and logits is not None:
            return first.law.bits(logits)
        return torch.cat([q.bits(weight, logits) for q in self._all])


class RoundedBatch(Batch):
    """QAT's tensors of one bitwidth, each on a grid of its own."""

    def __init__(self, quantizers: Sequence[QATWeight]) -> None:
        super().__init__(quantizers)
        self._first, self._all = quantizers[0], tuple(quantizers)
        self.flat = Flat([q.plan.shape for q in quantizers], None)

    def draw(self, weights: Sequence[Tensor], learned: Run) -> list[Sample]:
        """Equation 1 of the DiffQ paper."""
        return samples_of(self._rounded(weights), weights)

    def connect(
        self, weights: Sequence[Tensor], samples: Sequence[Sample], learned: Run
    ) -> list[Tensor]:
        """The straight-through estimator."""
        return straight_through(weights, values_of(samples))

    def _rounded(self, weights: Sequence[Tensor]) -> Drawn:
        bits = self._first.whole_bits(weights[0], None)
        return noise.round_all(self.flat, weights, bits, _zeros(self._all))


class PartlyRoundedBatch(RoundedBatch):
    """Quant-Noise's tensors: blocks picked at random are rounded."""

    def __init__(self, quantizers: Sequence[QuantNoiseWeight]) -> None:
        super().__init__(quantizers)
        self._settings = quantizers[0].noise_settings

    def draw(self, weights: Sequence[Tensor], learned: Run) -> list[Sample]:
        """Equations 6 and 10 of the Quant-Noise paper."""
        drawn, rate = self._rounded(weights), self._settings.p
        if rate < 1:
            size = self._settings.block_size
            exact = self.flat.join(weights, weights[0]).view(-1, size)
            blocks = drawn.values.view(-1, size)
            kept = torch.rand(len(blocks), 1, dtype=torch.float32, device=exact.device) >= rate
            torch.where(kept, exact, blocks, out=blocks)
        return samples_of(drawn, weights)


class ScaledBatch(Batch):
    """LSQ's tensors of one bitwidth, each with its learned scale."""

    def __init__(self, quantizers: Sequence[LSQWeight]) -> None:
        super().__init__(quantizers)
        self._first = quantizers[0]
        self.flat = Flat([q.plan.shape for q in quantizers], None)

    def draw(self, weights: Sequence[Tensor], learned: Run) -> list[Sample]:
        """Equation 1 of the LSQ paper."""
        scales = positive(learned.flat)
        drawn = scaled.scale_all(self.flat, weights, scales, self._first.levels)
        return samples_of(drawn, weights)

    def connect(
        self, weights: Sequence[Tensor], samples: Sequence[Sample], learned: Run
    ) -> list[Tensor]:
        """Equations 2 and 3 of the LSQ paper."""
        drawn = samples[0].drawn
        assert drawn is not None
        scales, values = positive(learned.flat), values_of(samples)
        return scaled.pass_scale(drawn, self._first.levels, scales, weights, values)


def positive(scales: Tensor | None) -> Tensor:
    """Learned scales without sign or zero, float32."""
    assert scales is not None
    return scales.float().abs().clamp(min=torch.finfo(torch.float32).tiny)


def _zeros(quantizers: Sequence[GridQuantizer]) -> list[bool]:
    return [quantizer.may_have_zeros for quantizer in quantizers]

"""Quant-Noise: in each forward only a random part of the weights is quantized."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffq.attach.batch import Batch
from diffq.attach.plan import Overrides, Rules, TensorPlan
from diffq.attach.sample import Sample
from diffq.checks import check_bits, check_number, check_whole
from diffq.numerics.flat import WIDTH
from diffq.numerics.masks import block_mask
from diffq.numerics.ranges import Observer, check_observer, fit_range
from diffq.quantizers.base import BaseQuantizer
from diffq.quantizers.batches import Kernels
from diffq.quantizers.qat import QATBatch, QATSettings, QATWeight, RoundedBatch

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class QuantNoiseSettings:
    """How one tensor is quantized; see `QuantNoiseQuantizer` for the meaning of each field."""

    bits: int
    p: float
    observer: Observer
    block_size: int

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_number(self.p, "p", 0, 1)
        check_observer(self.observer)
        check_whole(self.block_size, "block_size")


class QuantNoiseWeight(QATWeight):
    """One tensor whose training forwards quantize a random part of it."""

    method = "QuantNoiseQuantizer"

    def __init__(self, plan: TensorPlan, settings: QuantNoiseSettings) -> None:
        per_channel = settings.observer == "channel"
        super().__init__(plan, QATSettings(settings.bits, per_channel, training=True))
        self.noise_settings = settings

    def bounds(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The observer's range, [1] or [channels]; follows the weights as they train."""
        if self.noise_settings.observer == "histogram":
            return fit_range(weight, self.noise_settings.bits, self.zero_point(weight))
        return super().bounds(weight)

    @property
    def alike(self) -> Hashable:
        """Tensors of one bitwidth, rate and size of blocks."""
        return self.noise_settings, self.ranges_per_group

    @classmethod
    def batch(cls, quantizers: Sequence[Self]) -> Batch:
        """All tensors together, where each has one grid between its extremes."""
        settings = quantizers[0].noise_settings
        if settings.observer != "min-max":
            return Batch(quantizers)
        together = settings.p > 0 and WIDTH % settings.block_size == 0
        return (PartlyRoundedBatch if together else QATBatch)(quantizers)

    def draw(self, weight: Tensor, learned: Tensor | None) -> Sample | None:
        """Equations 6 and 10: the blocks J quantized, the others exact."""
        rate = self.noise_settings.p
        if rate == 0:
            return None
        bits = self.whole_bits(weight, learned)
        quantized = self.nearest(weight, *self.bounds(weight), bits)
        if rate == 1:
            return Sample(weight, quantized)
        chosen = block_mask(weight, rate, self.noise_settings.block_size)
        return Sample(weight, torch.where(chosen, quantized, weight))

    def meaning(self) -> dict[str, Any]:
        """The bitwidth and how the ranges are found."""
        return {"bits": self.settings.bits, "observer": self.noise_settings.observer}


class PartlyRoundedBatch(RoundedBatch):
    """Quant-Noise's tensors: blocks picked at random are rounded (Equations 6 and 10)."""

    def __init__(self, quantizers: Sequence[QuantNoiseWeight]) -> None:
        super().__init__(quantizers)
        self._settings = quantizers[0].noise_settings
        self._kernels = Kernels(self._flat, self._make_kernels)

    def _rounded(self, weights: Sequence[Tensor], bits: Tensor, zeros: Sequence[bool]) -> Tensor:
        values, rate = super()._rounded(weights, bits, zeros), self._settings.p
        if rate < 1:
            size = self._settings.block_size
            exact, blocks = (
                self._flat.join(weights, weights[0]).view(-1, size),
                values.view(-1, size),
            )
            kept = torch.rand(len(blocks), 1, dtype=torch.float32, device=exact.device) >= rate
            torch.where(kept, exact, blocks, out=blocks)
        return values

    def _make_kernels(self, dtype: torch.dtype, device: torch.device) -> Any:
        from diffq.kernels.rounded import Rounded

        rate, size = self._settings.p, self._settings.block_size
        return Rounded(self._flat.shapes, None, dtype, device, rate=rate, block_size=size)


class QuantNoiseQuantizer(BaseQuantizer[QuantNoiseSettings]):
    """Quantizes a random part of the weights in each training forward.

    Scalar Quant-Noise (Fan et al., arXiv:2004.07320, Equations 6 to 8 and 10): the other
    weights stay exact and get gradients without the bias of the straight-through
    estimator. In eval mode all are quantized. `p=1` is `QATQuantizer`. A trained model
    is finetuned with the same call.

    Args:
        model: a plain model, changed in place until `detach()`.
        bits: bitwidth of every quantized weight, 1 to 15.
        p: probability that a block is quantized in a training forward, 0 to 1; the
            paper uses 0.05 to 0.2.
        observer: the grid's range, from the weights of each forward: "min-max" of the
            tensor, "histogram" for the range of least squared error (weights outside
            are clamped to its ends), or "channel" for the minimum and maximum of each
            slice along the first dimension, which costs two float32 per slice.
        block_size: consecutive weights of the flattened tensor that are quantized
            together: 1 for single weights, 9 for whole 3x3 kernels.
        min_size: only parameters of more than this many MB (in float32) are quantized.
        include: name patterns; if given, only matching parameters are quantized.
        exclude: name patterns of parameters to leave alone.
        overrides: name pattern to a dict of `bits`, `p`, `observer` or `block_size` for
            the parameters that match.
        float16: store the parameters that are not quantized as float16.
        small_bits: bitwidth, 4 to 15, of the parameters that are too small to be quantized,
            with one scale each; None stores them as they are.

    Raises:
        AttachError: the model is wrapped, compiled or quantized already.
        ConfigError: a setting breaks a rule, or a pattern matches nothing.
        WeightError: a weight to quantize holds NaN or Inf, or exceeds float32.
    """

    _weight_quantizer = QuantNoiseWeight

    def __init__(
        self,
        model: nn.Module,
        *,
        bits: int = 8,
        p: float = 0.1,
        observer: Observer = "min-max",
        block_size: int = 1,
        min_size: float = 0.01,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        overrides: Overrides | None = None,
        float16: bool = False,
        small_bits: int | None = None,
    ) -> None:
        settings = QuantNoiseSettings(bits, p, observer, block_size)
        rules = Rules(min_size, include, exclude, overrides, float16, small_bits)
        super().__init__(model, settings, rules)

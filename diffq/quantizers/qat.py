"""Quantization-aware training with the straight-through estimator: the baseline."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffq.attach.batch import Batch, Run
from diffq.attach.plan import Overrides, Rules, TensorPlan
from diffq.attach.sample import Sample
from diffq.checks import check_bits, check_flag
from diffq.numerics.noise import straight_through
from diffq.numerics.rounding import round_all
from diffq.quantizers.base import FOR_ALL, BaseQuantizer
from diffq.quantizers.batches import GridBatch, samples_of, values_of
from diffq.quantizers.grid import GridQuantizer

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class QATSettings:
    """How one tensor is quantized; see `QATQuantizer` for the meaning of each field."""

    bits: int
    per_channel: bool
    training: bool = field(metadata=FOR_ALL)

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_flag(self.per_channel, "per_channel")
        check_flag(self.training, "training")


class QATWeight(GridQuantizer):
    """One tensor at one bitwidth, on one grid or on one for each output channel."""

    method = "QATQuantizer"

    def __init__(self, plan: TensorPlan, settings: QATSettings) -> None:
        per_channel = settings.per_channel and len(plan.shape) > 1
        group_size = plan.numel // plan.shape[0] if per_channel else plan.numel
        super().__init__(plan, group_size, settings.bits, ranges_per_group=per_channel)
        self.settings = settings

    def whole_bits(self, weight: Tensor, learned: Tensor | None) -> Tensor:
        """The bitwidth, float32 [1]."""
        return weight.new_full((1,), self.settings.bits, dtype=torch.float32)

    @property
    def alike(self) -> Hashable:
        """Tensors of one bitwidth."""
        return self.settings, self.ranges_per_group

    @classmethod
    def batch(cls, quantizers: Sequence[Self]) -> Batch:
        """Equation 1 for all tensors together, unless grids belong to channels."""
        first = quantizers[0]
        if first.ranges_per_group:
            return Batch(quantizers)
        return (RoundedBatch if first.settings.training else QATBatch)(quantizers)

    def draw(self, weight: Tensor, learned: Tensor | None) -> Sample | None:
        """The quantized weight; the weight itself with `training=False`."""
        if not self.settings.training:
            return None
        bits = self.whole_bits(weight, learned)
        return Sample(weight, self.nearest(weight, *self.bounds(weight), bits))

    def size_bits(self) -> float:
        """Equation 12; nothing in it is learned."""
        return float(self.plan.numel * self.settings.bits) + self.overhead_bits

    def meaning(self) -> dict[str, Any]:
        """The bitwidth and the number of ranges."""
        return {"bits": self.settings.bits, "per_channel": self.ranges_per_group}


class QATBatch(GridBatch):
    """QAT's tensors of one bitwidth, each on a grid of its own, which training leaves alone."""

    def __init__(self, quantizers: Sequence[QATWeight]) -> None:
        super().__init__(quantizers, None)
        self._bits = quantizers[0].settings.bits

    def whole_bits(self, weight: Tensor, learned: Tensor | None) -> Tensor:
        """The bitwidth, float32 [1]."""
        return weight.new_full((1,), self._bits, dtype=torch.float32)


class RoundedBatch(QATBatch):
    """The same, quantized in training too."""

    def __init__(self, quantizers: Sequence[QATWeight]) -> None:
        super().__init__(quantizers)
        self._kernels = self._grids

    def draw(self, weights: Sequence[Tensor], learned: Run) -> list[Sample]:
        """Equation 1 of the DiffQ paper."""
        bits, zeros = self.whole_bits(weights[0], None), self.may_have_zeros()
        kernels = self._kernels.of(weights)
        if kernels is not None:
            given = bits.expand(len(weights)).contiguous()
            values = kernels.sample(weights, given, zeros=zeros)
        else:
            values = self._flat.split(self._rounded(weights, bits, zeros))
        return samples_of(weights, values)

    def connect(
        self, weights: Sequence[Tensor], samples: Sequence[Sample], learned: Run
    ) -> list[Tensor]:
        """The straight-through estimator."""
        return straight_through(weights, values_of(samples))

    def _rounded(self, weights: Sequence[Tensor], bits: Tensor, zeros: Sequence[bool]) -> Tensor:
        points = self._flat.zeros(weights, zeros) if any(zeros) else None
        return round_all(self._flat, weights, bits, points).values


class QATQuantizer(BaseQuantizer[QATSettings]):
    """Rounds the weights in training too, and passes their gradient straight through.

    The baseline of the DiffQ paper (Krishnamoorthi, arXiv:1806.08342): min-max
    grid of one bitwidth (Equation 1), straight-through estimator.

    Args:
        model: a plain model, changed in place until `detach()`.
        bits: bitwidth of every quantized weight, 1 to 15.
        per_channel: one grid per slice along the first dimension instead of one
            per tensor; costs two float32 per slice.
        training: False leaves training forwards in full precision: plain
            post-training quantization, in effect in eval mode.
        min_size: only parameters of more than this many MB (in float32) are quantized.
        include: name patterns; if given, only matching parameters are quantized.
        exclude: name patterns of parameters to leave alone.
        overrides: name pattern to a dict of `bits` or `per_channel` for the
            parameters that match.
        float16: store the parameters that are not quantized as float16.
        small_bits: bitwidth, 4 to 15, of the parameters that are too small to be quantized,
            with one scale each; None stores them as they are.

    Raises:
        AttachError: the model is wrapped, compiled or quantized already.
        ConfigError: a setting breaks a rule, or a pattern matches nothing.
        WeightError: a weight to quantize holds NaN or Inf, or exceeds float32.
    """

    _weight_quantizer = QATWeight

    def __init__(
        self,
        model: nn.Module,
        *,
        bits: int = 8,
        per_channel: bool = False,
        training: bool = True,
        min_size: float = 0.01,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        overrides: Overrides | None = None,
        float16: bool = False,
        small_bits: int | None = None,
    ) -> None:
        settings = QATSettings(bits, per_channel, training)
        rules = Rules(min_size, include, exclude, overrides, float16, small_bits)
        super().__init__(model, settings, rules)

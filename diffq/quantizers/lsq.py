"""LSQ: a learned step size per tensor (Esser et al., arXiv:1902.08153)."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diffq.attach.batch import Batch, Run
from diffq.attach.plan import Overrides, Rules, TensorPlan
from diffq.attach.sample import Sample
from diffq.attach.weight import WeightQuantizer
from diffq.checks import check_bits
from diffq.format.records import MAX_RANGE, ScaledRecord
from diffq.numerics import scaled
from diffq.numerics.flat import Flat
from diffq.numerics.scaled import Levels, positive
from diffq.numerics.size import scaled_bits
from diffq.quantizers.base import BaseQuantizer
from diffq.quantizers.batches import Kernels, samples_of, values_of
from diffq.quantizers.scaled import nearest_levels, scaled_record
from diffq.torch_inside.graph import is_plain

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class LSQSettings:
    """How one tensor is quantized; see `LSQQuantizer` for the meaning of each field."""

    bits: int

    def __post_init__(self) -> None:
        # One bit would leave the positive side without a level.
        check_bits(self.bits, least=2)


class LSQWeight(WeightQuantizer):
    """One tensor on the levels -2**(bits-1) to 2**(bits-1)-1 times a learned scale.

    The scale is float32 [1]. Its size counts; its sign does not.
    """

    method = "LSQQuantizer"

    def __init__(self, plan: TensorPlan, settings: LSQSettings) -> None:
        super().__init__(plan)
        self.settings = settings
        self.levels = Levels(-(2 ** (settings.bits - 1)), 2 ** (settings.bits - 1) - 1)

    def start(self, weight: Tensor) -> Tensor:
        """2 * mean|w| / sqrt(highest level), or the largest scale that can be stored."""
        mean = scaled.mean_magnitude(weight.detach().float())
        # At the largest scale that can be stored, the levels reach as far as float32.
        largest = MAX_RANGE / -self.levels.lowest
        return (mean / (math.sqrt(self.levels.highest) / 2)).clamp(max=largest).view(1)

    def check(self, weight: Tensor) -> None:
        """Raises WeightError for magnitudes that float32 cannot hold."""
        self._nearest(weight, positive(self.start(weight))[0])

    @property
    def alike(self) -> Hashable:
        """Tensors of one bitwidth."""
        return self.levels

    @classmethod
    def batch(cls, quantizers: Sequence[Self]) -> Batch:
        """Equation 1 for all tensors together."""
        return ScaledBatch(quantizers)

    def draw(self, weight: Tensor, learned: Tensor | None) -> Sample:
        """Equation 1 of the LSQ paper: the nearest level times the scale."""
        (sample,) = ScaledBatch([self]).draw([weight], Run.of(learned))
        return sample

    def connect(self, weight: Tensor, sample: Sample, learned: Tensor | None) -> Tensor:
        """Equations 2 and 3 of the LSQ paper."""
        flat, scales = Flat([weight.shape], None), cast(Tensor, learned)
        (connected,) = scaled.pass_scale(flat, self.levels, scales, [weight], [sample.value])
        return connected

    def quantize(self, weight: Tensor, learned: Tensor | None) -> Tensor:
        """Nearest level times the scale, rounded to float32."""
        scale = positive(cast(Tensor, learned))[0].detach()
        return (self._nearest(weight, scale) * scale).to(weight.dtype)

    @torch.no_grad()
    def record(self, weight: Tensor, learned: Tensor | None) -> ScaledRecord:
        """Levels, counted from the lowest, and the scale."""
        scale = positive(cast(Tensor, learned))[0]
        return scaled_record(weight, self._nearest(weight, scale), scale, self.settings.bits)

    def size_bits(self) -> float:
        """Levels, scale and bitwidth; the scale is learned, but not its size."""
        return float(scaled_bits(self.plan.numel, self.settings.bits))

    def meaning(self) -> dict[str, Any]:
        """The bitwidth."""
        return {"bits": self.settings.bits}

    def group_bits(self, learned: Tensor | None) -> NDArray[np.uint8]:
        """The bitwidth, uint8 [1]."""
        return np.full(1, self.settings.bits, np.uint8)

    def _nearest(self, weight: Tensor, scale: Tensor) -> Tensor:
        return nearest_levels(self.levels, weight, scale, self.plan.name)


class ScaledBatch(Batch):
    """LSQ's tensors of one bitwidth, each with its learned scale."""

    def __init__(self, quantizers: Sequence[LSQWeight]) -> None:
        super().__init__(quantizers)
        self._levels = quantizers[0].levels
        self._flat = Flat([q.plan.shape for q in quantizers], None)
        self._kernels = Kernels(self._flat, self._make_kernels)

    def draw(self, weights: Sequence[Tensor], learned: Run) -> list[Sample]:
        """Equation 1 of the LSQ paper."""
        scales, kernels = cast(Tensor, learned.flat), self._kernels.of(weights)
        if kernels is not None:
            return samples_of(weights, kernels.sample(weights, scales), kernels)
        values = self._scaled(weights, scales)
        return samples_of(weights, self._flat.split(values))

    def quantize(self, weights: Sequence[Tensor], learned: Run) -> list[Tensor]:
        """Equation 1 of the LSQ paper, rounded to float32."""
        scales = cast(Tensor, learned.flat)
        # The levels of one tensor are those of float32.
        narrow = weights[0].dtype != torch.float64
        if not (is_plain() and narrow and self._are_finite(weights, scales)):
            return super().quantize(weights, learned)
        kernels = self._kernels.of(weights)
        if kernels is not None:
            return cast(list[Tensor], kernels.sample(weights, scales))
        values = self._scaled(weights, scales)
        return self._flat.split(values.to(weights[0].dtype))

    def _scaled(self, weights: Sequence[Tensor], scales: Tensor) -> Tensor:
        of_rows = self._flat.rows.spread(positive(scales))
        return scaled.scale_all(self._flat, weights, of_rows, self._levels)

    def _are_finite(self, weights: Sequence[Tensor], scales: Tensor) -> bool:
        """Whether no weight and no scale can be one that is refused."""
        sizes = positive(scales)
        ratio = self._flat.largest(weights).float() / sizes.min()
        return bool(torch.isfinite(ratio) & (sizes.max() * -self._levels.lowest <= MAX_RANGE))

    def connect(
        self, weights: Sequence[Tensor], samples: Sequence[Sample], learned: Run
    ) -> list[Tensor]:
        """Equations 2 and 3 of the LSQ paper."""
        values, kernels = values_of(samples), samples[0].drawn
        inputs = cast(Tensor, learned.flat), weights, values, kernels
        return scaled.pass_scale(self._flat, self._levels, *inputs)

    def _make_kernels(self, dtype: torch.dtype, device: torch.device) -> Any:
        from diffq.kernels.scaled import Scaled

        shapes = self._flat.shapes
        return Scaled(shapes, [self._levels] * len(shapes), dtype, device)


class LSQQuantizer(BaseQuantizer[LSQSettings]):
    """Quantization-aware training with one learned step size per tensor.

    Symmetric levels of one bitwidth, a scale that starts at 2 * mean|w| /
    sqrt(2**(bits-1) - 1), or at the largest that float32 allows, and is trained with
    the weights ("Learned Step Size Quantization", arXiv:1902.08153).

    Args:
        model: a plain model, changed in place until `detach()`. LSQ does best
            from a trained model.
        bits: bitwidth of every quantized weight, 2 to 15.
        min_size: only parameters of more than this many MB (in float32) are quantized.
        include: name patterns; if given, only matching parameters are quantized.
        exclude: name patterns of parameters to leave alone.
        overrides: name pattern to a dict of `bits` for the parameters that match.
        float16: store the parameters that are not quantized as float16.
        small_bits: bitwidth, 4 to 15, of the parameters that are too small to be quantized,
            with one scale each; None stores them as they are.

    Raises:
        AttachError: the model is wrapped, compiled or quantized already.
        ConfigError: a setting breaks a rule, or a pattern matches nothing.
        WeightError: a weight to quantize holds NaN or Inf, or exceeds float32.
    """

    _weight_quantizer = LSQWeight

    def __init__(
        self,
        model: nn.Module,
        *,
        bits: int = 8,
        min_size: float = 0.01,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        overrides: Overrides | None = None,
        float16: bool = False,
        small_bits: int | None = None,
    ) -> None:
        rules = Rules(min_size, include, exclude, overrides, float16, small_bits)
        super().__init__(model, LSQSettings(bits), rules)

"""Parameters that are too small for the method's bitwidths, at one fixed bitwidth."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffq.attach.plan import TensorPlan
from diffq.format.records import ScaledRecord
from diffq.numerics.scaled import Levels, positive
from diffq.numerics.size import scaled_bits
from diffq.quantizers.scaled import nearest_levels, scaled_record
from diffq.quantizers.stored import StoredQuantizer


class SmallQuantizer(StoredQuantizer):
    """Rounds a small parameter to even levels around zero; the largest magnitude has the last.

    value = level * max|w| / (2**(bits-1) - 1), with levels from -(2**(bits-1) - 1). So zero stays
    exactly zero, and a norm that starts at 1.0 stays exactly 1.0.
    """

    method = "small_bits"

    def __init__(self, plan: TensorPlan, bits: int) -> None:
        super().__init__(plan)
        self.bits = bits
        self.levels = Levels(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    def check(self, weight: Tensor) -> None:
        """Raises WeightError for magnitudes that the levels cannot hold."""
        self._nearest(weight)

    def quantize(self, weight: Tensor, learned: Tensor | None) -> Tensor:
        """Nearest level times the scale, rounded to float32."""
        nearest, scale = self._nearest(weight)
        return (nearest * scale).to(weight.dtype)

    @torch.no_grad()
    def record(self, weight: Tensor, learned: Tensor | None) -> ScaledRecord:
        """Levels, counted from the lowest, and the scale."""
        return scaled_record(weight, *self._nearest(weight), self.bits)

    def size_bits(self) -> float:
        """Levels, scale and bitwidth."""
        return float(scaled_bits(self.plan.numel, self.bits))

    def meaning(self) -> dict[str, Any]:
        """The bitwidth."""
        return {"bits": self.bits}

    def group_bits(self, learned: Tensor | None) -> NDArray[np.uint8]:
        """The bitwidth, uint8 [1]."""
        return np.full(1, self.bits, np.uint8)

    def _nearest(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest levels, and the scale."""
        largest = weight.detach().abs().amax().float()
        # By a tensor: on a GPU, torch divides by a number with its rounded reciprocal.
        highest = torch.full_like(largest, self.levels.highest)
        # A tensor of zeros has a scale too.
        scale = positive(largest / highest)
        return nearest_levels(self.levels, weight, scale, self.plan.name), scale

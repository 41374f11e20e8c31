"""Values on grids: QAT, true quantization of DiffQ's groups, and Quant-Noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffq.kernels.sampler import Sampler, Settings


class Rounded:
    """Weights on min-max grids of whole bitwidths, bit for bit those of `diffq.numerics.grid`.

    Their gradient is the straight-through estimator's, which takes no kernel.

    Args:
        shapes: of the tensors.
        group_size: weights that share a bitwidth; None if each tensor has one.
        dtype: of the weights.
        device: of all tensors.
        rate: probability that a block is quantized, for Quant-Noise: other blocks stay as they
            are.
        block_size: consecutive weights of a block.
    """

    def __init__(
        self,
        shapes: Sequence[Sequence[int]],
        group_size: int | None,
        dtype: torch.dtype,
        device: torch.device,
        *,
        rate: float = 1.0,
        block_size: int = 1,
    ) -> None:
        settings = Settings("rounding", rate=rate, block_size=block_size)
        self._sampler = Sampler(shapes, group_size, settings, dtype, device)

    def sample(
        self,
        weights: Sequence[Tensor],
        bits: Tensor,
        *,
        zeros: Sequence[bool] | None = None,
    ) -> list[Tensor]:
        """The values of all tensors, in two launches, and one for a seed if blocks are drawn.

        Args:
            weights: contiguous; they may move from call to call.
            bits: whole bitwidths of all groups, float32 [groups].
            zeros: of each tensor, whether weights that are exactly zero stay so; none by default.
        """
        return self._sampler.sample(weights, bits, zeros=zeros).values

    def quantize(
        self, weights: Sequence[Tensor], bits: Tensor
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """The values of eval, where weights that are exactly zero stay so.

        Args:
            weights: as for `sample`.
            bits: as for `sample`.

        Returns:
            The values; float32 numbers, among them the extremes of each tensor; whether a weight
            of each tensor is exactly zero, bool [tensors].
        """
        values, state = self._sampler.sample(weights, bits, zeros=[True] * len(weights))
        return values, state.ends, self._sampler.zeros(state)

"""LSQ: values of a batch on levels with learned scales, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffq.kernels.device.scale import scaled_backward_kernel, scaled_finish_kernel, scaled_kernel
from diffq.kernels.launch import TYPES, Addresses, Launches, on
from diffq.kernels.layout import Layout

# Sums that a program adds up at a time.
_FINISH_BLOCK = 1024


class Scaled:
    """Weights on symmetric levels times a learned scale, as `diffq.quantizers.lsq` has them.

    Gradients are computed in float32, and rounded once to the dtype of the weights.

    Args:
        shapes: of the tensors.
        levels: the lowest and the highest level of each tensor.
        dtype: of the weights.
        device: of all tensors.
    """

    def __init__(
        self,
        shapes: Sequence[Sequence[int]],
        levels: Sequence[tuple[int, int]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._dtype, self._device = dtype, device
        self._layout = Layout(shapes, 1, device)
        self._levels = torch.tensor(levels, dtype=torch.float32, device=device)
        self._addresses = Addresses(device)
        self._launches = Launches()

    @torch.no_grad()
    def sample(self, weights: Sequence[Tensor], scales: Tensor) -> list[Tensor]:
        """The values of all tensors, in one launch; views of one buffer.

        Args:
            weights: contiguous; they may move from call to call.
            scales: learned, float32 [tensors]; their magnitude counts.
        """
        with on(self._device):
            self._take(weights)
            values = self._new(self._layout.total, self._dtype)
            self._launches.get(scaled_kernel, self._constants, num_warps=8)(
                self._layout.chunk_count, *self._arguments(scales), values
            )
        return self._layout.cut(values)

    @torch.no_grad()
    def gradients(
        self, weights: Sequence[Tensor], scales: Tensor, grads: Sequence[Tensor | None]
    ) -> tuple[list[Tensor | None], Tensor]:
        """Gradients of weights and scales, in three launches.

        Args:
            weights: as they were for `sample`; they may have moved.
            scales: as they were.
            grads: of the values; None for values that were not used.

        Returns:
            Of each weight, None where its value was not used; views of one fresh buffer. Of all
            scales, float32 [tensors].
        """
        layout = self._layout
        with on(self._device):
            self._take(weights)
            flat = layout.join(grads, self._dtype)
            totals = self._new(layout.chunk_count, torch.float32)
            for_scales = self._new(len(layout.numels), torch.float32)
            self._launches.get(scaled_backward_kernel, self._constants, num_warps=8)(
                layout.chunk_count, *self._arguments(scales), flat, totals
            )
            self._launches.get(scaled_finish_kernel, (_FINISH_BLOCK,))(
                len(layout.numels), layout.table, scales, self._levels, for_scales, totals
            )
        views = zip(layout.cut(flat), grads, strict=True)
        return [None if grad is None else view for view, grad in views], for_scales

    def _take(self, weights: Sequence[Tensor]) -> None:
        self._addresses.update(weights, [False] * len(weights))

    def _new(self, count: int, dtype: torch.dtype) -> Tensor:
        return self._layout.table.new_empty(count, dtype=dtype)

    def _arguments(self, scales: Tensor) -> tuple[Tensor, ...]:
        return self._addresses.table, self._layout.table, self._layout.chunks, scales, self._levels

    @property
    def _constants(self) -> tuple[object, ...]:
        chunk = 4 * self._layout.tile.rows
        return TYPES[self._dtype], self._addresses.aligned, chunk

"""DiffQ's noise: values of a batch, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffq.kernels.device.noise import backward_kernel, finish_kernel
from diffq.kernels.launch import on
from diffq.kernels.layout import PARTS
from diffq.kernels.sampler import Sampler, Settings, State
from diffq.numerics.grid import BitsLaw
from diffq.numerics.noise import Noise

# Sums that a program adds up at a time.
_FINISH_BLOCK = 1024


class Noisy(Sampler):
    """Weights plus noise in proportion to their steps, or their true rounding (Equation 6).

    Gradients are those of `diffq.numerics.noise.PseudoNoise`, with noise that is drawn again from
    its seed. They are computed in float32, and rounded once to the dtype of the weights.

    Args:
        shapes: of the tensors.
        group_size: weights that share a bitwidth; None if each tensor has one.
        law: how bitwidths come from logits; None if bitwidths are given, and not learned.
        kind: of noise.
        scale: steps per unit of random noise.
        dtype: of the weights.
        device: of all tensors.
    """

    def __init__(
        self,
        shapes: Sequence[Sequence[int]],
        group_size: int | None,
        law: BitsLaw | None,
        kind: Noise,
        scale: float,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(shapes, group_size, Settings(kind, law, scale), dtype, device)

    @torch.no_grad()
    def gradients(
        self,
        state: State,
        weights: Sequence[Tensor],
        given: Tensor,
        grads: Sequence[Tensor | None],
    ) -> tuple[list[Tensor | None], Tensor | None]:
        """Gradients of weights and logits, in three launches.

        Args:
            state: that of the sample.
            weights: as they were then; they may have moved.
            given: as it was then.
            grads: of the values; None for values that were not used.

        Returns:
            Of each weight, None where its value was not used; views of one fresh buffer. Of all
            logits, float32 [groups]; None without a law.
        """
        layout, new = self._layout, self._layout.table.new_empty
        with on(self._device):
            self._addresses.update(weights, state.zeros)
            flat = layout.join(grads, self._dtype)
            for_logits = new(layout.groups if self._learned else 0, dtype=torch.float32)
            totals = new(layout.chunk_count, dtype=torch.float32)
            found = state.ends, state.places
            rest = flat, for_logits, totals, layout.weight_pieces, *self._law
            self._launches.get(backward_kernel, self._constants)(
                layout.chunk_count,
                *(self._addresses.table, layout.table, layout.chunks, given, *found),
                *(state.seed, *rest, self._noise[0]),
            )
            constants = self._kind, self._learned, self._whole, PARTS, _FINISH_BLOCK
            self._launches.get(finish_kernel, constants)(
                len(layout.numels), layout.table, given, *found, *rest
            )
        views = zip(layout.cut(flat), grads, strict=True)
        for_each = [None if grad is None else view for view, grad in views]
        return for_each, for_logits if self._learned else None

    @property
    def _constants(self) -> tuple[object, ...]:
        whole = self._whole, *self._layout.tile, PARTS
        return *self._reading, self._kind, self._learned, *whole

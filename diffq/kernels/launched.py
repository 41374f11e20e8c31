"""What kernels drew for a batch. Imports no Triton."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffq.numerics.flat import Flat
from diffq.numerics.grid import BitsLaw


@dataclass(frozen=True, eq=False)
class Launched:
    """Values that kernels have computed: `diffq.numerics.noise.Passing`, drawn again in backward.

    Attributes:
        flat: the tensors.
        kernels: a `diffq.kernels.noisy.Noisy`.
        state: what its gradients need.
        given: the bitwidths that the values were computed with, where they are not learned.
    """

    flat: Flat
    kernels: Any
    state: Any
    given: Tensor

    def gradients(
        self,
        law: BitsLaw,
        logits: Tensor | None,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        """Gradients of the logits and the weights."""
        given = self.given if logits is None else logits.detach()
        for_weights, for_logits = self.kernels.gradients(self.state, weights, given, grads)
        return [for_logits if logits is not None else None, *for_weights]

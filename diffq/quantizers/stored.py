"""A parameter that the method leaves alone and storage rounds: training keeps it as it is."""

from __future__ import annotations

from torch import Tensor

from diffq.attach.weight import WeightQuantizer


class StoredQuantizer(WeightQuantizer):
    """Trains with the parameter itself; eval computes with what is stored of it.

    A subclass implements `quantize`, `record` and `size_bits`.
    """

    def draw(self, weight: Tensor, learned: Tensor | None) -> None:
        """Training uses the weight itself."""

    @property
    def learning(self) -> bool:
        """Nothing is learned: training needs no optimizer for the sake of this tensor."""
        return False

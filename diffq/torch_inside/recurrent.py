"""Recurrent layers, which keep a list of their weights and compare it with what they read."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class ReadsWeights:
    """Mixin for `nn.RNNBase`: its forward reads its weights one by one, as they are read then.

    torch keeps the weights in `_flat_weights`, and makes the list anew if a weight is another
    object than before. In a forward, computed weights would take the Parameters' places there.
    """

    def _computes(self) -> bool:
        """Whether a forward runs, in which weights are computed."""
        raise NotImplementedError

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        if not self._computes():
            kept: list[Tensor | None] = self.__dict__["_flat_weights"]
            return kept
        names: list[str] = self.__dict__["_flat_weights_names"]
        return [getattr(self, name, None) for name in names]

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Tensor | None]) -> None:
        self.__dict__["_flat_weights"] = weights

    def _weights_have_changed(self) -> bool:
        if self._computes():
            return False
        parent: Any = super()
        return bool(parent._weights_have_changed())


def keep_weights(layer: Any) -> None:
    """Has a recurrent layer make its list of weights from its Parameters."""
    layer._init_flat_weights()

"""Levels to values: a product and a sum, with parameters of all levels or of each group."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diffq.format.kinds.base import Floats


@dataclass(frozen=True, eq=False)
class Affine:
    """Turns levels to values: (level - zero) * step + added, each operation rounded to float32.

    Attributes:
        step: float32, of all levels [1] or of each bitwidth or group.
        zero: the level that stands for 0.0, like `step`; None if nothing is subtracted.
        added: like `step`; None if nothing is added.
    """

    step: Floats
    zero: Floats | None = None
    added: Floats | None = None

    def apply(self, levels: Floats, group_size: int) -> None:
        """Turns the levels of groups to values, in place."""
        if self.zero is not None:
            levels -= repeat(self.zero, group_size, levels.size)
        levels *= repeat(self.step, group_size, levels.size)
        if self.added is not None:
            levels += repeat(self.added, group_size, levels.size)


def repeat(per_group: Floats, group_size: int, numel: int) -> Floats:
    """One value per group, or one for all, for each weight."""
    return per_group if per_group.size == 1 else np.repeat(per_group, group_size)[:numel]

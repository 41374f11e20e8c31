"""How finely tensors are quantized, as numbers that one shift moves for another size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from diffq.numerics.grid import BitsLaw
from diffq.numerics.stepped import COARSEST, FINEST, PER_OCTAVE

#: Standard deviations of a weight at the ends of its range, with hundred thousands of weights.
_RANGE = 4.5


class Fineness(Protocol):
    """How finely one tensor is quantized: a number of each group, whole ones once it is fixed.

    The higher the number, the larger the file.

    Attributes:
        least: the lowest number.
        most: the highest number.
        saved: by how many bits a weight the file of the lowest numbers is smaller than their size,
            where weights are normal.
    """

    @property
    def least(self) -> int:
        """The lowest number."""

    @property
    def most(self) -> int:
        """The highest number."""

    @property
    def saved(self) -> float:
        """Bits a weight."""

    def of(self, learned: Tensor) -> Tensor:
        """The numbers of what is learned, float64 on the CPU."""

    def learned(self, numbers: Tensor) -> Tensor:
        """Inverse of `of` for whole numbers, float32."""


@dataclass(frozen=True)
class BitsFineness:
    """The bitwidths of Equation 11.

    Attributes:
        law: how they come from logits.
    """

    law: BitsLaw

    @property
    def least(self) -> int:
        """The lowest bitwidth."""
        return self.law.min_bits

    @property
    def most(self) -> int:
        """The highest bitwidth."""
        return self.law.max_bits

    @property
    def saved(self) -> float:
        """What entropy coding takes off the lowest bitwidth."""
        return self.least - normal_entropy(self.least)

    def of(self, learned: Tensor) -> Tensor:
        """Real bitwidths."""
        share = torch.sigmoid(learned.detach().double().cpu())
        return self.least + share * (self.most - self.least)

    def learned(self, numbers: Tensor) -> Tensor:
        """The logits of bitwidths."""
        return self.law.logits(numbers).float()


@dataclass(frozen=True)
class StepFineness:
    """Steps, in quarter octaves below 1."""

    least: int = -COARSEST
    most: int = -FINEST
    # The size of steps is that of their levels in the file.
    saved: float = 0.0

    def of(self, learned: Tensor) -> Tensor:
        """The numbers of logarithms of steps."""
        return learned.detach().double().cpu() * -PER_OCTAVE

    def learned(self, numbers: Tensor) -> Tensor:
        """The logarithms of steps."""
        return (numbers / -PER_OCTAVE).float()


def normal_entropy(bits: int) -> float:
    """Bits that a weight takes in a file, where weights are normal up to 4.5 deviations."""
    step = 2 * _RANGE / (2**bits - 1)
    cuts = [-_RANGE + step * (index + 0.5) for index in range(2**bits - 1)]
    below = [0.0, *(0.5 * (1 + math.erf(cut / math.sqrt(2))) for cut in cuts), 1.0]
    shares = [upper - lower for lower, upper in pairwise(below)]
    return -sum(share * math.log2(share) for share in shares if share > 0)

"""What one training forward computes with in place of a weight."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from diffq.numerics.grid import laid_out_as


@dataclass
class ForwardState:
    """What all weight quantizers of one model share: the forwards of the root that run.

    A list, because threads may evaluate at once: `append` and `pop` lose no count.
    """

    running: list[bool] = field(default_factory=list)

    @property
    def depth(self) -> int:
        """How many forwards of the root run."""
        return len(self.running)


class Constant(NamedTuple):
    """What a training forward computes with in place of a weight, without graph.

    Attributes:
        value: of the weight's shape, in its dtype or a wider one.
        about: what `WeightQuantizer.connect` needs besides, and the sampling found.
    """

    value: Tensor
    about: Any = None

    def laid_out_as(self, weight: Tensor) -> Constant:
        """The same with its value in the strides of the weight."""
        # Not _replace, at which torch 2.6 breaks the graph.
        return Constant(laid_out_as(weight, self.value), self.about)


@dataclass(eq=False)
class Sample:
    """What one training forward computes with in place of a weight.

    Attributes:
        weight: the parameter that it was made for; None for a weight that another
            parametrization computes anew at each access.
        constant: the perturbed or quantized weight; None once it is released.
        forward_state: tells whether a forward runs.
        connected: the value with its gradient; None where the forward needs none.
        reads: how often the forward read it.
        read_without_grad: the value was read where gradients are off.
        read_again: it was read in a backward, which computes parts of its forward again.
    """

    weight: Tensor | None
    constant: Constant | None
    connected: Tensor | None
    forward_state: ForwardState
    reads: int = 0
    read_without_grad: bool = False
    read_again: bool = False

    def serves(self, weight: Tensor) -> bool:
        """Whether a reading of this weight gets the sample."""
        return self.constant is not None and (self.weight is None or self.weight is weight)

    def release(self) -> None:
        """Lets go of the value once its gradient is complete, so that memory is freed early.

        Read once, it was either in a part of the forward that this backward has computed
        again by now, or in one that none will. Of several readings, some may still come; and a
        backward may run inside of the forward, which then reads on.
        """
        if self.reads < 2 and not self.read_again and not self.forward_state.depth:
            self.constant = self.connected = None

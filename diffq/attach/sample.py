"""What one forward computes with in place of a weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffq.numerics.grid import laid_out_as


@dataclass(eq=False)
class Sample:
    """The tensor that a forward computes with in place of a weight.

    | state | `connected` |
    | --- | --- |
    | drawn, or quantized | None |
    | read with gradients, or drawn where gradients are on | the value with its gradient |

    Attributes:
        weight: the tensor that it stands for.
        value: perturbed or quantized, without graph: of the weight's shape and strides, in its
            dtype or a wider one.
        about: what `WeightQuantizer.connect` needs besides, and the drawing found.
        training: whether it is one of training.
        is_weight: it is the weight itself, which the method leaves as it is.
        connected: the value with its gradient, in the weight's dtype.
        read_without_grad: the value was read where gradients are off.
    """

    weight: Tensor
    value: Tensor
    about: Any = None
    training: bool = True
    is_weight: bool = False
    connected: Tensor | None = None
    read_without_grad: bool = False

    def __post_init__(self) -> None:
        self.value = laid_out_as(self.weight, self.value)

    def stands_for(self, weight: Tensor) -> bool:
        """Whether it is the sample of a tensor: of this one, or of one in the same memory."""
        return self.weight is weight or same_memory(self.weight, weight)


def same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same elements in the same order."""
    if one.shape != other.shape or one.stride() != other.stride() or one.dtype != other.dtype:
        return False
    if one.device != other.device or one.is_meta or type(one) is not type(other):
        return False
    try:
        return one.data_ptr() == other.data_ptr() != 0
    except RuntimeError:  # tensors of torch.func and of tracers have no memory
        return False

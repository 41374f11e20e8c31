"""What one forward computes with: a tensor in place of each weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from diffq.numerics.grid import laid_out_as
from diffq.torch_inside.graph import in_backward, is_plain
from diffq.torch_inside.tensors import version_of


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
        drawn: what `Batch.connect` needs of the tensors that were drawn together.
        training: whether it is one of training.
        is_weight: it is the weight itself, which the method leaves as it is.
        connected: the value with its gradient, in the weight's dtype.
        read_without_grad: the value was read where gradients are off.
        version: the version of the weight when it was drawn, for blocks that may write to it.
    """

    weight: Tensor
    value: Tensor
    drawn: Any = None
    training: bool = True
    is_weight: bool = False
    connected: Tensor | None = None
    read_without_grad: bool = False
    version: int | None = None

    def __post_init__(self) -> None:
        self.value = laid_out_as(self.weight, self.value)

    @classmethod
    def of(cls, weight: Tensor) -> Sample:
        """The sample of a weight that the method leaves as it is."""
        return cls(weight, weight.detach(), is_weight=True)

    def stands_for(self, weight: Tensor) -> bool:
        """Whether it is the sample of a tensor: of this one, or of one in the same memory."""
        return self.weight is weight or same_memory(self.weight, weight)


class Forward:
    """What one outermost forward computes with.

    Attributes:
        drawn: the sample of training of each quantized tensor, by index; None for what is drawn
            when it is read.
        quantized: the same for eval.
        entry: the module whose call it is; None in a block that computes.
        writes: finds writes to quantized tensors at the end.
        ready: where the samples of eval are shared with other forwards: by the identity of each
            weight that one has read, what eval without gradients computes with.
    """

    def __init__(self, count: int, entry: nn.Module | None) -> None:
        self.drawn: list[Sample | None] = [None] * count
        self.quantized: list[Sample | None] = [None] * count
        self.entry = entry
        self.writes: Any = None
        self.ready: Mapping[int, Tensor] | None = None

    def samples(self, training: bool) -> list[Sample | None]:
        """The samples of a mode."""
        return self.drawn if training else self.quantized

    def first(self, index: int) -> Sample | None:
        """The sample of a tensor that a forward began with, in the mode of its module."""
        return self.drawn[index] or self.quantized[index]

    def forget(self) -> None:
        """Has a block compute anew what may have changed in it: it may hold steps and loads."""
        if self.entry is None:
            self.quantized = [None] * len(self.quantized)
            # In a backward, parts of a training forward may yet run again on the same noise.
            if not in_backward():
                self.drawn = [None] * len(self.drawn)

    def put(self, index: int, sample: Sample) -> None:
        """Takes a sample."""
        self.samples(sample.training)[index] = sample
        if self.entry is None:
            sample.version = _version_of(sample.weight)

    def is_outdated(self, sample: Sample) -> bool:
        """Whether the weight of a sample was written to since, in a block."""
        return self.entry is None and _version_of(sample.weight) != sample.version


def _version_of(tensor: Tensor) -> int | None:
    return version_of(tensor) if is_plain() else None


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


def separate_versions(samples: Sequence[Sample | None]) -> None:
    """Gives each value a version of its own: slices of one buffer share theirs."""
    for sample in samples:
        if sample is not None and not sample.is_weight:
            sample.value = sample.value.data

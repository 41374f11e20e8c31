"""Batches: tensors that are alike are drawn, connected and quantized together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffq.attach.sample import Sample
from diffq.kernels.weights import traits
from diffq.numerics.lengths import CodeLengths
from diffq.torch_inside.graph import is_plain

# Weights of a batch, by type of device, 32 MB in float32 for others than a CPU. A batch has its
# gradients together, and gradients that are ready early are sent early by
# DistributedDataParallel. They are copied together too, so smaller batches take less memory at
# a time, and on a CPU they are as fast.
_MOST = {"cpu": 2**21}
_MOST_ELSEWHERE = 2**23


class Run(NamedTuple):
    """What some quantizers learn, one after the other.

    Attributes:
        flat: all numbers, [numbers]; None if nothing is learned.
        shapes: of each quantizer's part; None for those without.
    """

    flat: Tensor | None
    shapes: tuple[torch.Size | None, ...]

    @classmethod
    def of(cls, learned: Tensor | None) -> Run:
        """The run of one quantizer."""
        flat = None if learned is None else learned.view(-1)
        return cls(flat, (None if learned is None else learned.shape,))

    def beside(self, weight: Tensor) -> Run:
        """The same on the device of a weight."""
        if self.flat is None or self.flat.device == weight.device:
            return self
        return Run(self.flat.to(weight.device, non_blocking=True), self.shapes)

    def detach(self) -> Run:
        """The same without graph."""
        return self if self.flat is None else Run(self.flat.detach(), self.shapes)

    def parts(self) -> list[Tensor | None]:
        """Each quantizer's part, in its shape."""
        if self.flat is None:
            return [None] * len(self.shapes)
        counts = [shape.numel() for shape in self.shapes if shape is not None]
        pieces = iter(torch.split(self.flat, counts))
        return [None if shape is None else shaped(next(pieces), shape) for shape in self.shapes]


def shaped(part: Tensor, shape: torch.Size) -> Tensor:
    """A part of what is learned in its shape."""
    # Only codebooks have two dimensions, and views cost time.
    return part if len(shape) == 1 else part.view(shape)


class Batch:
    """Tensors of one dtype and device whose quantizers are alike, drawn and connected together.

    This one takes them one by one. A method that many tensors are trained with has a batch that
    computes with all of them in a few operations, and one node of autograd.

    Args:
        quantizers: weight quantizers of one class, alike.
    """

    def __init__(self, quantizers: Sequence[Any]) -> None:
        self.quantizers = tuple(quantizers)

    def draw(self, weights: Sequence[Tensor], learned: Run) -> list[Sample]:
        """What a training forward computes with in place of each weight; without graph."""
        each = zip(self.quantizers, weights, learned.parts(), strict=True)
        return [q.draw(weight, part) or Sample.of(weight) for q, weight, part in each]

    def connect(
        self, weights: Sequence[Tensor], samples: Sequence[Sample], learned: Run
    ) -> list[Tensor]:
        """The values with their gradients, in the weights' dtype."""
        each = zip(self.quantizers, weights, samples, learned.parts(), strict=True)
        return [w if s.is_weight else q.connect(w, s, part) for q, w, s, part in each]

    def quantize(self, weights: Sequence[Tensor], learned: Run) -> list[Tensor]:
        """The true quantized weights, in the weights' dtype; both without graph."""
        each = zip(self.quantizers, weights, learned.parts(), strict=True)
        return [q.quantize(weight, part) for q, weight, part in each]


class CodedBatch(Batch, ABC):
    """Tensors whose quantizers are `coded`: their size is measured by their weights."""

    @abstractmethod
    def code_lengths(self, weights: Sequence[Tensor], learned: Run) -> CodeLengths:
        """Bits of the levels, and their slopes by what is learned.

        Args:
            weights: as they are.
            learned: what is learned.
        """


class Batches:
    """Cuts the tensors of a forward in batches, which are kept for the next one."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Batch] = {}

    def __reduce__(self) -> tuple[type[Batches], tuple[()]]:
        """Copies and pickles hold nothing."""
        return Batches, ()

    def of(self, tensors: Sequence[tuple[Any, Tensor]]) -> list[tuple[Batch, list[Tensor]]]:
        """Batches, and the tensors of each, in the order of the first ones.

        Args:
            tensors: weight quantizers, and the tensor of each.
        """
        if not is_plain():
            # Compiled code of layers that are alike is shared, if each has a batch of its own.
            return [(type(quantizer).batch([quantizer]), [base]) for quantizer, base in tensors]
        sizes: dict[Hashable, int] = {}
        members: dict[Hashable, list[tuple[Any, Tensor]]] = {}
        for quantizer, base in tensors:
            made = base.dtype, base.device, base.is_inference(), traits(base)
            kind = type(quantizer), quantizer.alike, *made
            size = sizes[kind] = sizes.get(kind, 0) + base.numel()
            # What is computed from others has a graph, of which no backward of others may need
            # anything: checkpoints free graphs in parts.
            alone = None if base.is_leaf else quantizer.index
            most = _MOST.get(base.device.type, _MOST_ELSEWHERE)
            members.setdefault((*kind, size // most, alone), []).append((quantizer, base))
        batches = []
        for each in members.values():
            quantizers, bases = zip(*each, strict=True)
            batches.append((self._batch(quantizers), list(bases)))
        return batches

    def _batch(self, quantizers: Sequence[Any]) -> Batch:
        kind, alike = type(quantizers[0]), quantizers[0].alike
        key = kind, alike, *(quantizer.index for quantizer in quantizers)
        if key not in self._known:
            self._known[key] = kind.batch(quantizers)
        return self._known[key]

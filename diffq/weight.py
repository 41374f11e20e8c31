"""The quantizer of one tensor: noisy in training, truly quantized in eval."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diffq.format.groups import stream_counts
from diffq.format.records import Record
from diffq.noise import straight_through
from diffq.select import TensorPlan
from diffq.size import Grouping


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


class ModeFollower(Protocol):
    """Something that is switched together with a weight quantizer's mode."""

    def set_training(self, training: bool) -> None:
        """Follows `train()` and `eval()`."""

    def remove(self) -> None:
        """Ends it."""


@dataclass(eq=False)
class Sample:
    """What one training forward computes with in place of a weight.

    Attributes:
        weight: the tensor that it was made for.
        value: the perturbed or quantized weight, a constant.
        connected: the value with its gradient; None where the forward needs none.
        read_without_grad: the value was read where gradients are off.
        read_again: it was read in a backward, which computes parts of its forward again.
    """

    weight: Tensor
    value: Tensor
    connected: Tensor | None
    read_without_grad: bool = False
    read_again: bool = False


@dataclass(frozen=True)
class _Cached:
    """The true quantized weight, and what it was computed from."""

    weight: weakref.ref[Tensor]
    key: tuple[int, ...]
    quantized: Tensor
    version: int


class WeightQuantizer(nn.Module, ABC):
    """Parametrization of one unique tensor: noisy in training, truly quantized in eval.

    Subclasses hold what is learned as parameters, and implement `sample`, `connect`,
    `eval_weight`, `record` and the sizes.

    Invariants: the weight is never stored nor changed. One sample serves a whole
    forward of the root and its recomputation under activation checkpointing; outside
    of both, each access makes its own. The quantized weight is computed once, until
    the weight, what is learned or the mode changes.

    Attributes:
        used: whether the last training forward of the root read the weight.
    """

    def __init__(self, plan: TensorPlan) -> None:
        super().__init__()
        self.plan = plan
        self.group_size = plan.numel
        self.forward_state = ForwardState()
        self.mode_followers: list[ModeFollower] = []
        self.used = False
        self.current: Sample | None = None
        self._held: Tensor | None = None
        self._cached: _Cached | None = None

    @abstractmethod
    def sample(self, weight: Tensor) -> Tensor | None:
        """What one training forward computes with, as a constant.

        Args:
            weight: the weight, any shape.

        Returns:
            A tensor of the weight's shape, in its dtype or a wider one, without graph;
            None for the weight itself.
        """

    @classmethod
    def sample_all(
        cls, quantizers: Sequence[WeightQuantizer], weights: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """`sample` of many tensors, whose quantizers are of this class, in few operations."""
        return [q.sample(weight) for q, weight in zip(quantizers, weights, strict=True)]

    def connect(self, weight: Tensor, value: Tensor) -> Tensor:
        """A sample with its gradient, in the weight's dtype: the straight-through estimator."""
        return straight_through(weight, value)

    @abstractmethod
    def eval_weight(self, weight: Tensor) -> Tensor:
        """The true quantized weight, in the weight's shape and dtype, without gradient."""

    @abstractmethod
    def record(self, weight: Tensor) -> Record:
        """What is stored of the weight: it decodes to `eval_weight` bit for bit."""

    @abstractmethod
    def size_bits(self) -> Tensor | float:
        """Bits of the stored weight, 0-dim; those that are learned are left to `learned_size`."""

    def learned_size(self) -> tuple[Grouping, Tensor] | None:
        """What learned bits depend on: the groups and their logits; None if there are none."""
        return None

    @abstractmethod
    def stored_bits(self, weight: Tensor) -> int:
        """Bits of the stored weight as `record` counts them, exactly."""

    def group_bits(self) -> NDArray[np.uint8] | None:
        """Bitwidth of each group, uint8 [groups]; None if there are no levels."""
        return None

    def level_totals(self) -> tuple[int, int]:
        """Bits of all levels or indices, and the number of weights that they stand for."""
        bits = self.group_bits()
        if bits is None:
            return 0, 0
        counts = stream_counts(bits, self.group_size, self.plan.numel)
        return sum(width * count for width, count in counts.items()), self.plan.numel

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the model computes with."""
        if not self.training:
            return self._quantized(weight)
        if self._held is not None:
            return self._held
        self.used = True
        current = self.current
        if current is not None and current.weight is weight and self._goes_on():
            return self._read(current)
        value = self.sample(weight)
        return weight if value is None else self.connect(weight, value)

    def begin(self, weight: Tensor, value: Tensor | None) -> None:
        """Takes the sample for the forward of the root that is about to run."""
        self.used = False
        self.current = None
        if value is not None:
            connected = self.connect(weight, value) if torch.is_grad_enabled() else None
            self.current = Sample(weight, value, connected)

    def _goes_on(self) -> bool:
        return self.forward_state.depth > 0 or _in_backward()

    def _read(self, current: Sample) -> Tensor:
        if not torch.is_grad_enabled():
            current.read_without_grad = True
            return current.value.to(current.weight.dtype)
        current.read_again = current.read_again or _in_backward()
        # Reentrant checkpoints run without gradients first, and then build a graph of their
        # own for each part: two of them must not share a node.
        own_graph = current.read_again and current.read_without_grad
        if current.connected is None or own_graph:
            return self.connect(current.weight, current.value)
        return current.connected

    def hold(self, weight: Tensor | None) -> None:
        """Fixes what training forwards return, until `hold(None)`."""
        self._held = weight

    def train(self, mode: bool = True) -> WeightQuantizer:
        """Sets the mode; the quantized weight is computed again after it."""
        self._cached = None
        for follower in self.mode_followers:
            follower.set_training(mode)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WeightQuantizer:
        # A cast or move may end at the same address, so that the weight looks unchanged.
        self._cached = None
        return super()._apply(fn, recurse)  # type: ignore[no-any-return,no-untyped-call]

    def _quantized(self, weight: Tensor) -> Tensor:
        compiling = torch.compiler.is_compiling()
        quantized = self._evaluate(weight) if compiling else self._from_cache(weight)
        if not torch.is_grad_enabled() or not weight.requires_grad:
            return quantized
        passed = straight_through(weight, quantized)
        if not compiling:
            # After a backward comes a step, and fused optimizers leave no trace of theirs.
            passed.register_hook(self.forget)  # type: ignore[no-untyped-call]
        return passed

    def forget(self, grad: Tensor | None = None) -> None:
        """Has the quantized weight computed again; takes a gradient to serve as a hook."""
        self._cached = None

    def _evaluate(self, weight: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return self.eval_weight(weight.detach())

    def _from_cache(self, weight: Tensor) -> Tensor:
        key, cached = _fingerprint(weight, *self.parameters()), self._cached
        if (
            cached is not None
            and key is not None
            and cached.key == key
            and cached.weight() is weight
            and cached.quantized._version == cached.version
        ):
            return cached.quantized
        quantized = self._evaluate(weight)
        if key is not None:
            self._cached = _Cached(weakref.ref(weight), key, quantized, quantized._version)
        return quantized

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry no sample and no quantized weight."""
        return {**self.__dict__, "current": None, "_held": None, "_cached": None}


def _fingerprint(*tensors: Tensor) -> tuple[int, ...] | None:
    """Changes whenever a tensor is written to, other than through `.data`; None if unknown."""
    try:
        return tuple(number for t in tensors for number in (t._version, t.data_ptr()))
    except RuntimeError:
        # Tensors made in inference mode count no versions; functorch's have no memory.
        return None


def _in_backward() -> bool:
    # Activation checkpointing runs forwards inside of the backward.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1

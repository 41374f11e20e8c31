"""The quantizer of one tensor: noisy in training, truly quantized in eval."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diffq.format.records import Record
from diffq.noise import straight_through
from diffq.select import TensorPlan
from diffq.sharding import Part, is_managed


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


@dataclass(frozen=True)
class _Cached:
    """The true quantized weight, and what it was computed from."""

    weight: weakref.ref[Tensor]
    key: tuple[int, ...]
    quantized: Tensor
    version: int


class WeightQuantizer(nn.Module, ABC):
    """Parametrization of one unique tensor: noisy in training, truly quantized in eval.

    Subclasses hold what is learned as parameters, and implement `train_weight`,
    `eval_weight`, `record` and the sizes.

    Invariants: the weight is never stored nor changed. One noise sample serves a
    whole forward of the root and its recomputation under activation checkpointing;
    outside of both, each access draws its own. The quantized weight is computed
    once, until the weight, what is learned or the mode changes.
    """

    def __init__(self, plan: TensorPlan) -> None:
        super().__init__()
        self.plan = plan
        self.group_size = plan.numel
        self.forward_state = ForwardState()
        self.mode_followers: list[ModeFollower] = []
        self.noise: Tensor | None = None
        self._held: Tensor | None = None
        self._cached: _Cached | None = None

    def draw(self, weight: Tensor) -> Tensor | None:
        """The random numbers of one training forward; None if it needs none."""
        return None

    @abstractmethod
    def train_weight(self, weight: Tensor, noise: Tensor | None) -> Tensor:
        """The weight that a training forward uses; differentiable."""

    @abstractmethod
    def eval_weight(self, weight: Tensor) -> Tensor:
        """The true quantized weight, in the weight's shape and dtype, without gradient."""

    @abstractmethod
    def record(self, weight: Tensor) -> Record:
        """What is stored of the weight: it decodes to `eval_weight` bit for bit."""

    @abstractmethod
    def size_bits(self) -> Tensor | float | Part:
        """Bits of the stored weight, differentiable in what is learned; a part if sharded."""

    @abstractmethod
    def stored_bits(self, weight: Tensor) -> int:
        """Bits of the stored weight as `record` counts them, exactly."""

    def group_bits(self) -> NDArray[np.uint8] | None:
        """Bitwidth of each group, uint8 [groups]; None if there are no levels."""
        return None

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the model computes with."""
        if not self.training:
            return self._quantized(weight)
        if self._held is not None:
            return self._held
        inside = self.forward_state.depth > 0 or _in_backward()
        noise = self.noise if inside and self.noise is not None else self.draw(weight)
        return self.train_weight(weight, noise)

    def draw_ahead(self, weight: Tensor) -> None:
        """Draws the sample of the root forward that is about to run."""
        self.noise = self.draw(weight)

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
        # FSDP gathers weights into one tensor again and again, without a trace in its version.
        uncached = compiling or is_managed(self)
        quantized = self._evaluate(weight) if uncached else self._from_cache(weight)
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
        return {**self.__dict__, "noise": None, "_held": None, "_cached": None}


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

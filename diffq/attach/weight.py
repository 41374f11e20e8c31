"""The quantizer of one tensor: noisy in training, truly quantized in eval."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from weakref import ref

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diffq.attach.plan import TensorPlan
from diffq.attach.readings import Readings
from diffq.attach.sample import Constant, ForwardState, Sample
from diffq.format.groups import stream_counts
from diffq.format.records import Record
from diffq.numerics.grid import laid_out_as
from diffq.numerics.noise import straight_through
from diffq.numerics.size import Grouping
from diffq.torch_inside import functions
from diffq.torch_inside.replay import in_backward
from diffq.torch_inside.sharding import is_managed

if TYPE_CHECKING:
    from typing_extensions import Self


class ModeFollower(Protocol):
    """Something that is switched together with a weight quantizer's mode."""

    def set_training(self, training: bool) -> None:
        """Follows `train()` and `eval()`."""

    def remove(self) -> None:
        """Ends it."""


# Attributes that are no parameters of the module, even where they hold one.
_PASSING = frozenset({"current", "_held", "_cached"})


class _Seen(NamedTuple):
    """A tensor, and what changes when it is written to, other than through `.data`."""

    tensor: ref[Tensor]
    version: int
    pointer: int


@dataclass(frozen=True)
class _Cached:
    """The true quantized weight, and what it was computed from."""

    sources: tuple[_Seen, ...]
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
        readings: who has read the weight, which decides whether its bits learn.
    """

    def __init__(self, plan: TensorPlan) -> None:
        super().__init__()
        self.plan = plan
        self.group_size = plan.numel
        self.forward_state = ForwardState()
        self.mode_followers: list[ModeFollower] = []
        self.readings = Readings()
        self.current: Sample | None = None
        self._held: Tensor | None = None
        self._cached: _Cached | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets what changes in each forward at once, without a look for parameters."""
        if name in _PASSING:
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def check(self, weight: Tensor) -> None:
        """Raises WeightError for weights beyond the grids that can be stored."""

    def look(self, weight: Tensor) -> None:
        """Looks for weights that are exactly zero and must stay so; waits for the device.

        Nothing has to be done where zero is a level of every grid.

        Args:
            weight: the weight, whole.
        """

    @abstractmethod
    def sample(self, weight: Tensor) -> Constant | None:
        """What one training forward computes with; None for the weight itself.

        Args:
            weight: the weight, any shape.
        """

    @classmethod
    def sample_all(
        cls, quantizers: Sequence[Self], weights: Sequence[Tensor]
    ) -> Sequence[Constant | None]:
        """`sample` of many tensors, whose quantizers are of this class, in few operations."""
        return [q.sample(weight) for q, weight in zip(quantizers, weights, strict=True)]

    def connect(self, weight: Tensor, constant: Constant) -> Tensor:
        """A sample with its gradient, in the weight's dtype: the straight-through estimator."""
        return straight_through(weight, constant.value)

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

    @property
    def learning(self) -> bool:
        """Whether training still moves the parameters of this quantizer."""
        return True

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
            self.readings.ever = True
            return self._quantized(weight)
        if self._held is not None:
            return self._held
        current = self.current
        if current is not None and current.serves(weight) and self._goes_on():
            return self._read(current, weight)
        self.readings.note_training()
        constant = self.sample(weight)
        return weight if constant is None else self.connect(weight, constant.laid_out_as(weight))

    def begin(self, weight: Tensor, constant: Constant | None) -> None:
        """Takes the sample for the forward of the root that is about to run."""
        self.current = None
        if constant is not None:
            constant = constant.laid_out_as(weight)
            connected = self.connect(weight, constant) if torch.is_grad_enabled() else None
            parameter = weight if isinstance(weight, nn.Parameter) else None
            self.current = Sample(parameter, constant, connected, self.forward_state)
            if connected is not None and not torch.compiler.is_compiling():
                functions.release_after(connected, self.current)

    def _goes_on(self) -> bool:
        return self.forward_state.depth > 0 or in_backward()

    def _read(self, current: Sample, weight: Tensor) -> Tensor:
        constant = current.constant
        if constant is None:
            raise RuntimeError("A sample that was released serves no reading.")
        current.reads += 1
        self.readings.note_training()
        if not torch.is_grad_enabled():
            current.read_without_grad = True
            return constant.value.to(weight.dtype)
        current.read_again = current.read_again or in_backward()
        # Reentrant checkpoints run without gradients first, and then build a graph of their
        # own for each part: two of them must not share a node.
        own_graph = current.read_again and current.read_without_grad
        if current.connected is None or own_graph:
            return self.connect(weight, constant)
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

        def keep_dtype(tensor: Tensor) -> Tensor:
            # Bitwidths and scales in half precision would hardly learn: casts are for weights.
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)  # type: ignore[no-any-return,no-untyped-call]

    def at_hand(self, weight: Tensor) -> Tensor | None:
        """What `forward` would return, where nothing is left to compute; otherwise None."""
        if self.training:
            current = self.current
            if current is None or not current.serves(weight) or self.forward_state.depth == 0:
                return None
            if not torch.is_grad_enabled() or current.connected is None:
                return None
            self.readings.note_training()
            current.reads += 1
            return current.connected
        if torch.is_grad_enabled() and weight.requires_grad:
            return None
        return self._cached_for(weight)

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
            return laid_out_as(weight, self.eval_weight(weight.detach()))

    def _from_cache(self, weight: Tensor) -> Tensor:
        cached = self._cached_for(weight)
        if cached is not None:
            return cached
        seen = self._seen(weight)
        quantized = self._evaluate(weight)
        if seen is not None:
            self._cached = _Cached(seen, quantized, quantized._version)
        return quantized

    def _cached_for(self, weight: Tensor) -> Tensor | None:
        cached = self._cached
        if cached is None:
            return None
        try:
            pairs = zip(cached.sources, self._sources(weight), strict=True)
            for (tensor, version, pointer), source in pairs:
                # A tensor may have the address and the version of one that is gone.
                if tensor() is not source or source._version != version:
                    return None
                if source.data_ptr() != pointer:
                    return None
        except (RuntimeError, ValueError):  # no versions; other parameters than before
            return None
        return cached.quantized if cached.quantized._version == cached.version else None

    def _sources(self, weight: Tensor) -> list[Tensor]:
        """What the quantized weight is computed from."""
        return [weight, *(learned for learned in self._parameters.values() if learned is not None)]

    def _seen(self, weight: Tensor) -> tuple[_Seen, ...] | None:
        """The sources, with what changes when one is written to; None if that is unknown."""
        try:
            return tuple(_Seen(ref(s), s._version, s.data_ptr()) for s in self._sources(weight))
        except RuntimeError:
            # Tensors made in inference mode count no versions; functorch's have no memory.
            return None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry no sample and no quantized weight."""
        return {**self.__dict__, "current": None, "_held": None, "_cached": None}

"""Puts weight quantizers on a model's tensors, and takes them off without a trace.

Each unique tensor gets one `WeightQuantizer`, registered with
`torch.nn.utils.parametrize` at every place that holds the tensor. The parameter
object stays the same, so that an optimizer made before still owns it.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from diffq.errors import AttachError
from diffq.format.records import Record
from diffq.noise import straight_through
from diffq.select import Site, TensorPlan

# These read a weight several times in one forward; it is computed once for them.
_REPEATED_READERS = (nn.RNNBase, nn.MultiheadAttention)


@dataclass
class ForwardState:
    """What all weight quantizers of one model share: whether the root's forward runs."""

    depth: int = 0


@dataclass(frozen=True)
class _Cached:
    """The true quantized weight, and what it was computed from."""

    weight: weakref.ref[Tensor]
    versions: tuple[int, ...]
    pointer: int
    quantized: Tensor


class WeightQuantizer(nn.Module):
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
        self._noise: Tensor | None = None
        self._held: Tensor | None = None
        self._cached: _Cached | None = None

    def draw(self, weight: Tensor) -> Tensor | None:
        """The random numbers of one training forward; None if it needs none."""
        return None

    def train_weight(self, weight: Tensor, noise: Tensor | None) -> Tensor:
        """The weight that a training forward uses; differentiable."""
        raise NotImplementedError

    def eval_weight(self, weight: Tensor) -> Tensor:
        """The true quantized weight, in the weight's shape and dtype, without gradient."""
        raise NotImplementedError

    def record(self, weight: Tensor) -> Record:
        """What is stored of the weight: it decodes to `eval_weight` bit for bit."""
        raise NotImplementedError

    def size_bits(self) -> Tensor | float:
        """Bits of the stored weight, differentiable in what is learned."""
        raise NotImplementedError

    def stored_bits(self, weight: Tensor) -> int:
        """Bits of the stored weight as `record` counts them, exactly."""
        raise NotImplementedError

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
        noise = self._noise if inside and self._noise is not None else self.draw(weight)
        return self.train_weight(weight, noise)

    def draw_ahead(self, weight: Tensor) -> None:
        """Draws the sample of the root forward that is about to run."""
        self._noise = self.draw(weight)

    def hold(self, weight: Tensor | None) -> None:
        """Fixes what training forwards return, until `hold(None)`."""
        self._held = weight

    def train(self, mode: bool = True) -> WeightQuantizer:
        """Sets the mode; the quantized weight is computed again after it.

        The sample stays: a backward that recomputes may still be due.
        """
        self._cached = None
        return super().train(mode)

    def _quantized(self, weight: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            quantized = self.eval_weight(weight.detach())
        else:
            quantized = self._from_cache(weight)
        if torch.is_grad_enabled() and weight.requires_grad:
            return straight_through(weight, quantized)
        return quantized

    def _from_cache(self, weight: Tensor) -> Tensor:
        versions = (weight._version, *(extra._version for extra in self.parameters()))
        cached = self._cached
        if (
            cached is None
            or cached.weight() is not weight
            or cached.versions != versions
            or cached.pointer != weight.data_ptr()
        ):
            with torch.inference_mode(False), torch.no_grad():
                quantized = self.eval_weight(weight.detach())
            cached = _Cached(weakref.ref(weight), versions, weight.data_ptr(), quantized)
            self._cached = cached
        return cached.quantized

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry no sample and no quantized weight."""
        return {**self.__dict__, "_noise": None, "_held": None, "_cached": None}


def _in_backward() -> bool:
    # Activation checkpointing runs forwards inside of the backward.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class Attachment:
    """Weight quantizers on a model: made whole or not at all, and undone without a trace.

    Attributes:
        model: the model, as long as it is attached.
        quantizers: one weight quantizer for each plan, in the plans' order.
    """

    def __init__(self, model: nn.Module, quantizers: Sequence[WeightQuantizer]) -> None:
        self.model = model
        self.quantizers = tuple(quantizers)
        self._handles: list[RemovableHandle] = []
        self._orders: dict[str, list[str]] = {}
        state = ForwardState()
        try:
            for quantizer in self.quantizers:
                quantizer.forward_state = state
                for site in quantizer.plan.sites:
                    self._register(site, quantizer)
            self._handles += [
                model.register_forward_pre_hook(self._enter_forward, prepend=True),
                model.register_forward_hook(self._leave_forward, always_call=True),
            ]
        except BaseException:
            self.detach()
            raise
        self.forward_state = state

    def owners(self) -> list[nn.Module]:
        """The submodules that hold a quantized tensor, each once."""
        paths = dict.fromkeys(s.module for q in self.quantizers for s in q.plan.sites)
        return [self.model.get_submodule(path) for path in paths]

    def weight(self, quantizer: WeightQuantizer) -> Tensor:
        """The tensor that a weight quantizer is given: the original parameter.

        Where another parametrization computes the tensor, it is computed here.

        Raises:
            AttachError: the weight quantizer is no longer in its place, or tied
                tensors were untied.
        """
        chain, *others = (self._chain(site, quantizer) for site in quantizer.plan.sites)
        originals = _originals(chain)
        if any(
            a is not b
            for other in others
            for a, b in zip(originals, _originals(other), strict=True)
        ):
            raise AttachError(_untied(quantizer.plan))
        for module in list(chain)[:-1]:
            originals = [module(*originals)]
        return originals[0]

    def tied_tensor(self, plan: TensorPlan) -> Tensor:
        """The tensor of a plan without quantizer.

        Raises:
            AttachError: tied tensors were untied.
        """
        tensor, *others = (site.read(self.model) for site in plan.sites)
        if any(other is not tensor for other in others):
            raise AttachError(_untied(plan))
        return tensor

    def detach(self) -> None:
        """Takes all weight quantizers off: same parameters, names, order and classes."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for quantizer in self.quantizers:
            for site in quantizer.plan.sites:
                _unregister(site.owner(self.model), site.attribute, quantizer)
        for path, order in self._orders.items():
            _reorder(self.model.get_submodule(path), order)
        self._orders.clear()

    def _register(self, site: Site, quantizer: WeightQuantizer) -> None:
        owner = site.owner(self.model)
        if site.module not in self._orders:
            self._orders[site.module] = list(owner._parameters)
            load_hook = owner.register_load_state_dict_pre_hook(_load_plain)  # type: ignore[no-untyped-call]
            self._handles.append(load_hook)
            if isinstance(owner, _REPEATED_READERS):
                self._handles.append(owner.register_forward_pre_hook(_hold_weights))
                self._handles.append(
                    owner.register_forward_hook(_release_weights, always_call=True)
                )
        parametrize.register_parametrization(owner, site.attribute, quantizer, unsafe=True)
        quantizer.train(owner.training)

    def _chain(self, site: Site, quantizer: WeightQuantizer) -> parametrize.ParametrizationList:
        owner = site.owner(self.model)
        chain = _chain_at(owner, site.attribute)
        if chain is None or list(chain)[-1] is not quantizer:
            raise AttachError(
                f"The quantizer of {site.name} is no longer the last parametrization there. "
                "Do not replace or parametrize a quantized tensor; call detach() first."
            )
        return chain

    def _enter_forward(self, module: nn.Module, args: Any) -> None:
        self.forward_state.depth += 1
        with torch.no_grad():
            for quantizer in self.quantizers:
                if quantizer.training:
                    quantizer.draw_ahead(self.weight(quantizer))

    def _leave_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        # Another hook may have failed before ours could count the entry.
        self.forward_state.depth = max(0, self.forward_state.depth - 1)


def quantizers_in(model: nn.Module) -> list[WeightQuantizer]:
    """The weight quantizers that sit on a model, each once."""
    return [module for module in model.modules() if isinstance(module, WeightQuantizer)]


def _chain_at(owner: nn.Module, name: str) -> parametrize.ParametrizationList | None:
    if not parametrize.is_parametrized(owner, name):
        return None
    return _chains(owner)[name]


def _chains(owner: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    chains: Any = owner.parametrizations
    return dict(chains.items())


def _originals(chain: parametrize.ParametrizationList) -> list[Tensor]:
    if chain.is_tensor:
        return [chain.original]
    return [getattr(chain, f"original{i}") for i in range(chain.ntensors)]


def _untied(plan: TensorPlan) -> str:
    return (
        f"{' and '.join(plan.names)} were one tensor when the quantizer was made, "
        "and must stay so. Tie them again, or detach() and make a new quantizer."
    )


def _unregister(owner: nn.Module, name: str, quantizer: WeightQuantizer) -> None:
    chain = _chain_at(owner, name)
    if chain is None or quantizer not in list(chain):
        return
    if len(chain) > 1:
        del chain[list(chain).index(quantizer)]
        return
    parametrize.remove_parametrizations(owner, name, leave_parametrized=False)
    if isinstance(owner, nn.RNNBase):
        owner._init_flat_weights()


def _reorder(owner: nn.Module, order: list[str]) -> None:
    parameters = {name: owner._parameters[name] for name in order if name in owner._parameters}
    parameters.update(owner._parameters)
    owner._parameters.clear()
    owner._parameters.update(parameters)


def _hold_weights(owner: nn.Module, args: Any) -> None:
    for name, quantizer in _quantizers_at(owner):
        if quantizer.training:
            quantizer.hold(getattr(owner, name))


def _release_weights(owner: nn.Module, args: Any, output: Any) -> None:
    for _, quantizer in _quantizers_at(owner):
        quantizer.hold(None)
    if isinstance(owner, nn.RNNBase) and torch.is_grad_enabled():
        # Recurrent modules keep the last weights; these belong to a graph.
        owner._flat_weights = []


def _load_plain(owner: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Lets a plain checkpoint load into an attached model; what is learned stays."""
    for name, quantizer in _quantizers_at(owner):
        chain = f"{prefix}parametrizations.{name}."
        position = len(_chains(owner)[name]) - 1
        if prefix + name in state_dict:
            state_dict[chain + "original"] = state_dict.pop(prefix + name)
        elif position == 0:
            continue
        for key, value in quantizer.state_dict().items():
            state_dict.setdefault(f"{chain}{position}.{key}", value)


def _quantizers_at(owner: nn.Module) -> list[tuple[str, WeightQuantizer]]:
    lasts = [(name, list(chain)[-1]) for name, chain in _chains(owner).items()]
    return [(name, last) for name, last in lasts if isinstance(last, WeightQuantizer)]

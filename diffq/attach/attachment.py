"""Puts weight quantizers on a model's tensors, and takes them off without a trace.

Each unique tensor gets one `WeightQuantizer`, registered with
`torch.nn.utils.parametrize` at every place that holds the tensor. The parameter
object stays the same, so that an optimizer made before still owns it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from diffq.attach.chains import (
    chain_at,
    chains,
    original_names,
    originals,
    own_class,
    quantizers_at,
    reorder,
    unregister,
)
from diffq.attach.graph import call_before_backward, take_samples_away, tie_to_output, use_samples
from diffq.attach.holding import TrainingHold, hold_in_forward
from diffq.attach.plan import Site, TensorPlan
from diffq.attach.reading import shorten_reading
from diffq.attach.sample import ForwardState
from diffq.attach.weight import WeightQuantizer
from diffq.attach.zeros import ModeWatch, look_after_load
from diffq.errors import AttachError
from diffq.torch_inside.sharding import is_distributed, is_managed, reshard, whole, whole_parameters

T = TypeVar("T")


class Attachment:
    """Weight quantizers on a model: made whole or not at all, and undone without a trace.

    Attributes:
        model: the model, as long as it is attached.
        quantizers: one weight quantizer for each quantized tensor.
        face: the object that users hold; copies of the model have their own.
        ran: whether a forward of the model has ended.
    """

    def __init__(
        self, model: nn.Module, quantizers: Sequence[WeightQuantizer], face: object
    ) -> None:
        self.model = model
        self.face = face
        self.ran = False
        self.quantizers = tuple(quantizers)
        self._handles: list[RemovableHandle] = []
        # By the module and not by its name: a detach takes quantizers off modules that were
        # replaced or moved since.
        self._places: list[tuple[nn.Module, str, WeightQuantizer]] = []
        self._orders: dict[nn.Module, list[str]] = {}
        self._classes: dict[nn.Module, type[nn.Module]] = {}
        state = ForwardState()
        try:
            for quantizer in self.quantizers:
                quantizer.forward_state = state
                for site in quantizer.plan.sites:
                    self._register(site, quantizer)
            self._handles.append(model.register_forward_pre_hook(self._enter_forward, prepend=True))
            self._handles.append(model.register_forward_hook(self._leave_forward, always_call=True))
            load_hook = model.register_load_state_dict_post_hook(self._tie_again)  # type: ignore[no-untyped-call]
            self._handles.append(load_hook)
        except BaseException:
            self.detach()
            raise
        self.forward_state = state

    def owners(self) -> list[nn.Module]:
        """The submodules that hold a quantized tensor, each once."""
        return list(self._orders)

    def weight(self, quantizer: WeightQuantizer) -> Tensor:
        """The tensor that a weight quantizer is given: the original parameter.

        Where another parametrization computes the tensor, it is computed here.

        Raises:
            AttachError: the weight quantizer is no longer in its place, the tensor has
                another shape, or tied tensors were untied.
        """
        chain, *others = (self._chain(site, quantizer) for site in quantizer.plan.sites)
        inputs = originals(chain)
        if any(
            a is not b for other in others for a, b in zip(inputs, originals(other), strict=True)
        ):
            raise AttachError(_untied(quantizer.plan))
        for module in list(chain)[:-1]:
            inputs = [module(*inputs)]
        (weight,) = inputs
        if weight.shape != quantizer.plan.shape:
            was, now = list(quantizer.plan.shape), list(weight.shape)
            raise AttachError(quantizer.plan.sites[0].changed(f"went from shape {was} to {now}"))
        return weight

    def check_places(self) -> None:
        """Checks that every weight quantizer is in its place.

        Raises:
            AttachError: one is not.
        """
        for quantizer in self.quantizers:
            for site in quantizer.plan.sites:
                self._chain(site, quantizer)

    def forget(self) -> None:
        """Has all quantized weights computed again."""
        for quantizer in self.quantizers:
            quantizer.forget()

    def learning_now(self) -> frozenset[WeightQuantizer]:
        """The weight quantizers whose noise acts on the loss in this step of the optimizer.

        Before its first forward, those of the step before: a loop may ask for the size first.
        """
        if any(q.readings.in_this_step for q in self.quantizers):
            return frozenset(q for q in self.quantizers if q.readings.learns)
        return frozenset(q for q in self.quantizers if q.readings.before)

    def each_quantizer(self, call: Callable[[WeightQuantizer], T]) -> list[T]:
        """What `call` gives for each weight quantizer; sharded extras are gathered for it."""
        reshard(self.model)
        results = []
        for quantizer in self.quantizers:
            with whole_parameters([quantizer]):
                results.append(call(quantizer))
        return results

    def each_weight(self, call: Callable[[WeightQuantizer, Tensor], T]) -> list[T]:
        """What `call` gives for each weight quantizer and its weight.

        Sharded weights and extras are gathered for it, those of one tensor at a time.

        Raises:
            AttachError: as `weight`.
        """
        reshard(self.model)
        results = []
        for quantizer in self.quantizers:
            with whole_parameters(self._chains_of(quantizer.plan)):
                results.append(call(quantizer, self.weight(quantizer).detach()))
        return results

    def each_raw(self, plans: Iterable[TensorPlan], call: Callable[[Tensor], T]) -> list[T]:
        """What `call` gives for the tensor of each plan without quantizer, gathered likewise.

        Raises:
            AttachError: tied tensors were untied, and differ.
        """
        reshard(self.model)
        return [call(self._raw_tensor(plan)) for plan in plans]

    def detach(self) -> None:
        """Takes all weight quantizers off: same parameters, names, order and classes."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for quantizer in self.quantizers:
            for follower in quantizer.mode_followers:
                follower.remove()
            quantizer.mode_followers.clear()
        for owner, attribute, quantizer in self._places:
            unregister(owner, attribute, quantizer)
        for owner, order in self._orders.items():
            reorder(owner, order)
        for owner, shared in self._classes.items():
            owner.__class__ = shared
        self._places.clear()
        self._orders.clear()
        self._classes.clear()

    def _register(self, site: Site, quantizer: WeightQuantizer) -> None:
        owner = site.owner(self.model)
        self._places.append((owner, site.attribute, quantizer))
        if owner not in self._orders:
            self._orders[owner] = list(owner._parameters)
            if parametrize.is_parametrized(owner):
                self._classes[owner] = type(owner)
                owner.__class__ = own_class(owner)
            load_hook = owner.register_load_state_dict_pre_hook(_load_plain)  # type: ignore[no-untyped-call]
            self._handles += [load_hook, look_after_load(owner)]
            if isinstance(owner, nn.RNNBase):
                self._handles += hold_in_forward(owner)
        if isinstance(owner, nn.MultiheadAttention):
            quantizer.mode_followers.append(TrainingHold(owner))
        chain = chain_at(owner, site.attribute)
        unsafe = chain.unsafe if chain is not None else True
        parametrize.register_parametrization(owner, site.attribute, quantizer, unsafe=True)
        chains(owner)[site.attribute].unsafe = unsafe
        shorten_reading(owner, site.attribute)
        quantizer.train(owner.training)
        quantizer.mode_followers.append(ModeWatch(owner, site.attribute, quantizer))

    def _chain(self, site: Site, quantizer: WeightQuantizer) -> parametrize.ParametrizationList:
        owner = site.owner(self.model)
        chain = chain_at(owner, site.attribute)
        if chain is None or list(chain)[-1] is not quantizer:
            raise AttachError(site.changed("was replaced or parametrized"))
        return chain

    def _raw_tensor(self, plan: TensorPlan) -> Tensor:
        with whole_parameters(self._chains_of(plan)):
            read = dict.fromkeys(site.read(self.model) for site in plan.sites)
        tensor, *others = (whole(each.detach()) for each in read)
        if not all(torch.equal(other, tensor) for other in others):
            raise AttachError(_untied(plan))
        return tensor

    def _chains_of(self, plan: TensorPlan) -> list[nn.Module]:
        chains = (chain_at(site.owner(self.model), site.attribute) for site in plan.sites)
        return [chain for chain in chains if chain is not None]

    def _weight_to_sample(self, quantizer: WeightQuantizer) -> Tensor:
        """`weight`, found at once where nothing is unusual: many are asked for in each step."""
        site, *others = quantizer.plan.sites
        modules = site.owner(self.model)._modules.get("parametrizations")
        chain: Any = modules._modules.get(site.attribute) if modules is not None else None
        if others or chain is None or list(chain._modules.values()) != [quantizer]:
            return self.weight(quantizer)
        original: Tensor | None = chain._parameters.get("original")
        if original is None or original.shape != quantizer.plan.shape:
            return self.weight(quantizer)
        return original

    def _enter_forward(self, module: nn.Module, args: Any) -> None:
        self.forward_state.running.append(True)
        training = [q for q in self.quantizers if q.training]
        if training:
            # Apart from this function, which torch.compile gives up once it did nothing in eval.
            self._sample(training)

    def _sample(self, quantizers: list[WeightQuantizer]) -> None:
        kinds: dict[type[WeightQuantizer], list[tuple[WeightQuantizer, Tensor]]] = {}
        for quantizer in quantizers:
            if is_managed(quantizer):
                continue  # FSDP's tensors are whole only while their module runs
            pair = quantizer, self._weight_to_sample(quantizer)
            kinds.setdefault(type(quantizer), []).append(pair)
        for kind, pairs in kinds.items():
            constants = kind.sample_all(*zip(*pairs, strict=True))
            for (quantizer, weight), constant in zip(pairs, constants, strict=True):
                quantizer.begin(weight, constant)

    def _leave_forward(self, module: nn.Module, args: Any, output: Any) -> Any:
        # Another hook may have failed before ours could count the entry.
        if self.forward_state.running:
            self.forward_state.running.pop()
        if torch.compiler.is_compiling():
            # What stays on a module would be an output of the compiled code, and be kept.
            take_samples_away(self.quantizers)
            return output
        self.ran = True
        samples = {q: q.current for q in self.quantizers if q.current is not None}
        told = call_before_backward(output, lambda: use_samples(samples))
        # Hooks that are always called run while an exception of the forward is handled.
        if told or sys.exc_info()[0] is not None:
            take_samples_away(samples)
        if is_distributed():
            return tie_to_output(output, [p for q in self.quantizers for p in q.parameters()])
        return output

    def _tie_again(self, module: nn.Module, incompatible_keys: Any) -> None:
        # load_state_dict(assign=True) makes one parameter for each name of a tied one.
        for quantizer in self.quantizers:
            first, *others = quantizer.plan.sites
            for name in original_names(self._chain(first, quantizer)):
                tensor = getattr(self._chain(first, quantizer), name)
                for site in others:
                    setattr(self._chain(site, quantizer), name, tensor)


def _untied(plan: TensorPlan) -> str:
    return (
        f"{' and '.join(plan.names)} were one tensor when the quantizer was made, "
        "and must stay so. Tie them again, or detach() and make a new quantizer."
    )


def _load_plain(owner: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Lets a plain checkpoint load into an attached model; what is learned stays."""
    for name, quantizer in quantizers_at(owner):
        chain = f"{prefix}parametrizations.{name}."
        position = len(chains(owner)[name]) - 1
        if prefix + name in state_dict:
            state_dict[chain + "original"] = state_dict.pop(prefix + name)
        elif position == 0:
            continue
        for key, value in quantizer.state_dict().items():
            state_dict.setdefault(f"{chain}{position}.{key}", value)

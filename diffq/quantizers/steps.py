"""Watches the steps of optimizers: are learned parameters trained, and at their own rate?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from numbers import Real
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from diffq.attach.attachment import Attachment
from diffq.errors import OptimizerError, listed, warn
from diffq.torch_inside.sharding import is_dtensor

#: Steps that an optimizer of the weights may be ahead, as when a GradScaler skips some, and
#: steps for which a schedule may give all groups one rate.
PATIENCE = 20


class StepWatch:
    """Takes notice of the steps of optimizers, for a model whose quantizer learns.

    A hook sees each step of each optimizer of the process, also of those that another one
    wraps. A step of the learned parameters ends a step for what reads the weights, and has the
    cached weights computed again, since fused optimizers leave no trace in versions. Where no
    optimizer with weights of the model steps, the watch stays silent.

    Copies and pickles of a watch go on without the warnings, since their optimizer is unknown.

    Args:
        optimizer: holds the learned parameters from here on.
        attachment: what is on the model.
    """

    def __init__(self, optimizer: Optimizer, attachment: Attachment) -> None:
        self._optimizer: ref[Optimizer] | None = ref(optimizer)
        self._attachment = attachment
        self._given = attachment.learned.parameter
        # Steps of optimizers without learned parameters, since one with them stepped.
        self._steps: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
        self._said: set[str] = set()
        self._had_own_rate = len(set(_rates(optimizer))) > 1
        self._shared_rates: list[float] = []
        self._another_stepped = False
        self._start()

    def _start(self) -> None:
        _register_hook()
        _WATCHING.add(self)

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer that was given the learned parameters, as long as somebody keeps it."""
        return self._optimizer() if self._optimizer is not None else None

    def stop(self) -> None:
        """Ends the watch."""
        _WATCHING.discard(self)

    def note(self, optimizer: Optimizer) -> None:
        """Takes notice of a step.

        Raises:
            OptimizerError: the parameters that the optimizer trains are no longer the model's.
        """
        self._attachment.forget()
        quantizers, learned = self._attachment.quantizers, self._attachment.learned.parameter
        if learned is None or not learned.requires_grad or not any(q.learning for q in quantizers):
            return
        if _holds(optimizer, learned):
            self._all_trained()
            self._end_step()
            if self._optimizer is not None:
                self._compare_holders(optimizer)
                self._compare_rates(optimizer)
        elif self._optimizer is not None:
            steps = self._steps[optimizer] = self._steps.get(optimizer, 0) + 1
            if steps == 1:
                self._compare_parameters(optimizer)
            elif steps >= PATIENCE:
                self._warn_of_neglect(optimizer, steps)

    def _all_trained(self) -> None:
        # Not 0, so that optimizers of other parameters are compared once and not at each step.
        for optimizer in self._steps:
            self._steps[optimizer] = 1

    def _end_step(self) -> None:
        quantizers = self._attachment.quantizers
        if not any(q.readings.in_this_step for q in quantizers):
            return  # what steps without a forward, such as code that fills an optimizer's state
        unread = [q.plan.name for q in quantizers if q.learning and not q.readings.learned]
        for quantizer in quantizers:
            quantizer.readings.end_step()
        unread = [name for name in unread if not self._is_left_out(name)]
        if unread and self._optimizer is not None and "unread" not in self._said:
            warn(
                "Bitwidths and scales learn where training reads quantized weights, but the first "
                f"step did not read {listed(unread)}. Such tensors are in eval mode, under "
                "no_grad, in a layer that the step left out, or in a list that was made before "
                "the quantizer and holds the plain ones. Exclude those that never train, and read "
                "the others through their modules."
            )
        self._said.add("unread")

    def _is_left_out(self, name: str) -> bool:
        """Whether a tensor is in a container that leaves modules out at random."""
        return any(
            getattr(module, "leaves_out", False) and name.startswith(f"{path}.".lstrip("."))
            for path, module in self._attachment.model.named_modules()
        )

    def _is_given(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer is the one that was set up, or a wrapper of it or in it."""
        given = self.optimizer
        # They share their groups.
        groups = {id(group) for group in given.param_groups} if given is not None else set()
        return any(id(group) in groups for group in optimizer.param_groups)

    def _compare_holders(self, optimizer: Optimizer) -> None:
        """Warns if two optimizers step the same learned parameters in turn."""
        if not self._is_given(optimizer):
            self._another_stepped = self._holds_learned(self.optimizer)
        elif self._another_stepped and "holders" not in self._said:
            self._said.add("holders")
            warn(
                "Two optimizers train the same learned parameters: the one that setup_optimizer "
                "was given, and another one that was made of the model's parameters. Make each "
                "optimizer before the quantizer, or leave quantizer.learned_parameters() out."
            )

    def _holds_learned(self, optimizer: Optimizer | None) -> bool:
        return optimizer is not None and _holds(optimizer, self._attachment.learned.parameter)

    def _compare_parameters(self, optimizer: Optimizer) -> None:
        given = self._given if _holds(optimizer, self._given) else None
        # FSDP may leave whole parameters in the places of those that optimizers hold.
        if self._holds_learned(optimizer) or (given is not None and is_dtensor(given)):
            self._all_trained()
            self._compare_holders(optimizer)
        elif given is not None:
            raise OptimizerError(
                "The model's parameters were replaced after the optimizer was made, so its steps "
                "train nothing: fully_shard does that, and load_state_dict(assign=True). Make the "
                "optimizer after them, then call quantizer.setup_optimizer(optimizer)."
            )

    def _warn_of_neglect(self, optimizer: Optimizer, steps: int) -> None:
        # An optimizer that is there, but seldom steps, may be meant so.
        seldom = self._holds_learned(self.optimizer) and steps < 10 * PATIENCE
        if "neglect" in self._said or seldom:
            return
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if held.isdisjoint(map(id, self._attachment.model.parameters())):
            return
        self._said.add("neglect")
        warn(
            f"An optimizer has made {steps} steps with weights of this model, and no step has "
            "trained the parameters that its quantizer learns. Each time you make an optimizer, "
            "call quantizer.setup_optimizer(optimizer). If bitwidths and scales should stay as "
            "they are, call quantizer.no_optimizer()."
        )

    def _compare_rates(self, optimizer: Optimizer) -> None:
        """Warns if a schedule gives all groups one learning rate for some steps."""
        if not self._had_own_rate or "rate" in self._said or not self._is_given(optimizer):
            return
        rates = _rates(optimizer)
        self._shared_rates = [*self._shared_rates, *rates[:1]] if _is_shared(rates) else []
        # Rates that stand still have come to the least one of their schedule, but for SWALR's.
        moving = len(set(self._shared_rates)) > 1 or "swa_lr" in optimizer.param_groups[-1]
        if moving and len(self._shared_rates) >= PATIENCE:
            self._said.add("rate")
            warn(
                "The learning rate that setup_optimizer gave to the learned parameters is lost, "
                "because a schedule has set one rate for all parameter groups. Pass OneCycleLR, "
                "CyclicLR or SWALR a list with one number for each group, such as "
                f"max_lr=[{', '.join(['lr'] * (len(rates) - 1))}, bits_lr], where the last is "
                "the quantizer's. In a loop of your own, scale the rate of each group."
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_optimizer": None, "_steps": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _steps=WeakKeyDictionary())
        self._start()


_WATCHING: WeakSet[StepWatch] = WeakSet()


@cache
def _register_hook() -> None:
    register_optimizer_step_post_hook(_note_step)


def _note_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not torch.compiler.is_compiling():
        for watch in tuple(_WATCHING):
            watch.note(optimizer)


def _holds(optimizer: Optimizer, parameter: Tensor | None) -> bool:
    # The group of learned parameters is most often the last.
    groups = reversed(optimizer.param_groups)
    return any(p is parameter for group in groups for p in group["params"])


def _is_shared(rates: Sequence[float]) -> bool:
    # Where all rates are 0, a warm-up has not begun.
    return len(set(rates)) == 1 and rates[0] != 0


def _rates(optimizer: Optimizer) -> list[float]:
    """The learning rate of each group; nothing where they are no numbers at hand."""
    rates: list[Any] = [group.get("lr") for group in optimizer.param_groups if group["params"]]
    numbers = (r.is_cpu if isinstance(r, Tensor) else isinstance(r, Real) for r in rates)
    return [float(rate) for rate in rates] if all(numbers) else []

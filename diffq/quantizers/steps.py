"""Watches the steps of optimizers: are learned parameters trained, and at their own rate?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from diffq.attach.weight import WeightQuantizer
from diffq.errors import OptimizerError, listed, warn
from diffq.torch_inside.sharding import is_dtensor

#: Steps that an optimizer of the weights may be ahead, as when a GradScaler skips some.
PATIENCE = 20


def still_learned(quantizers: Sequence[WeightQuantizer]) -> Iterator[nn.Parameter]:
    """The parameters of weight quantizers that training still moves."""
    for quantizer in quantizers:
        if quantizer.learning:
            # parameters() takes tens of times as long, and this runs at each step.
            yield from (p for p in quantizer._parameters.values() if p is not None)


def warn_of_unread(quantizers: Sequence[WeightQuantizer]) -> None:
    """Warns of tensors that the first step trained without their quantizers."""
    if quantizers:
        warn(
            "Bitwidths and scales learn where training reads quantized weights, but the first "
            f"step did not read {listed([q.plan.name for q in quantizers])}. Such tensors are in "
            "eval mode, under no_grad, in a layer that the step left out, or in a list that was "
            "made before the quantizer and holds the plain ones. Exclude those that never train, "
            "and read the others through their modules."
        )


def refuse_training(module: nn.Module) -> None:
    """Refuses a forward of a module whose quantizer has no optimizer.

    Raises:
        OptimizerError: in training mode, where gradients are on.
    """
    if module.training and torch.is_grad_enabled():
        raise OptimizerError(
            "The quantizer learns parameters that no optimizer was given. "
            "Call quantizer.setup_optimizer(optimizer) before training; "
            "if they are meant to stay as they are, call quantizer.no_optimizer()."
        )


class OptimizerGuard:
    """Notices that a model is trained without its learned parameters, or at another rate.

    A hook sees each step of each optimizer of the process, also of those that another one
    wraps. Where no optimizer with weights of the model steps, it stays silent.

    Copies and pickles of a guard watch nothing.

    Args:
        optimizer: holds the learned parameters from here on.
        model: the quantized model.
        quantizers: of its tensors.
    """

    def __init__(
        self, optimizer: Optimizer, model: nn.Module, quantizers: Sequence[WeightQuantizer]
    ) -> None:
        self._optimizer: ref[Optimizer] | None = ref(optimizer)
        self._model = model
        self._quantizers = quantizers
        self._given = self._learned()
        # By the id of an optimizer: its steps since one with learned parameters stepped.
        self._steps: dict[int, int] = {}
        self._warned = False
        self._first_step = True
        self._rates = _rates(optimizer)
        self._expect_schedule(None)
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
        for quantizer in self._quantizers:
            quantizer.forget()  # fused optimizers leave no trace in the versions of tensors
        learned = next((p for p in still_learned(self._quantizers) if p.requires_grad), None)
        if learned is None:
            return
        groups = reversed(optimizer.param_groups)
        group = next((g for g in groups if any(p is learned for p in g["params"])), None)
        if group is not None:
            self._all_trained()
            self._end_step()
            self._compare_rates(optimizer, group.get("initial_lr"))
            return
        steps = self._steps[id(optimizer)] = self._steps.get(id(optimizer), 0) + 1
        if steps in (1, PATIENCE):
            self._compare_parameters(optimizer, steps)

    def _all_trained(self) -> None:
        # Not 0, so that optimizers of other parameters are compared once and not at each step.
        self._steps = dict.fromkeys(self._steps, 1)

    def _end_step(self) -> None:
        if self._first_step:
            self._first_step = False
            warn_of_unread([q for q in self._quantizers if q.learning and not q.used])
        if any(quantizer.used for quantizer in self._quantizers):
            for quantizer in self._quantizers:
                quantizer.end_step()

    def _compare_parameters(self, optimizer: Optimizer, steps: int) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        learned = {id(p) for p in self._learned()}
        given = [p for p in self._given if id(p) in held]
        # FSDP may leave whole parameters in the places of those that optimizers hold.
        if held & learned or any(map(is_dtensor, given)):
            self._all_trained()
        elif given:
            raise OptimizerError(
                "The model's parameters were replaced after the optimizer was made, so its steps "
                "train nothing: fully_shard does that, and load_state_dict(assign=True). Make the "
                "optimizer after them, then call quantizer.setup_optimizer(optimizer)."
            )
        elif steps == PATIENCE and not self._warned:
            self._warned = not held.isdisjoint(map(id, self._model.parameters()))
            if self._warned:
                warn(
                    f"An optimizer has made {PATIENCE} steps with weights of this model, and no "
                    "step has trained the parameters that its quantizer learns. Each time you "
                    "make an optimizer, call quantizer.setup_optimizer(optimizer). If bitwidths "
                    "and scales should stay as they are, call quantizer.no_optimizer()."
                )

    def _expect_schedule(self, schedule: object) -> None:
        self._schedule = schedule
        self._shared_rate: float | None = None
        # Without a rate of their own, learned parameters have none to lose.
        self._rates_settled = len(set(self._rates)) < 2

    def _compare_rates(self, optimizer: Optimizer, schedule: object) -> None:
        """Warns if all groups get one learning rate, one step after the other.

        Args:
            optimizer: has just made a step.
            schedule: another object with each scheduler that is made.
        """
        if schedule is not self._schedule:
            self._expect_schedule(schedule)
        if self._rates_settled:
            return
        rates = _rates(optimizer)
        if rates == self._rates:
            return
        if len(set(rates)) > 1:
            self._rates_settled = True
        elif self._shared_rate in (None, rates[0]):
            # It may be the start of a warm-up, or the least rate of a schedule.
            self._shared_rate = rates[0]
        else:
            self._rates_settled = True
            warn(
                "The learning rate that setup_optimizer gave to the learned parameters is lost, "
                "because a schedule has set one rate for all parameter groups. Pass OneCycleLR "
                "or CyclicLR a list with one number for each group, such as "
                f"max_lr=[{', '.join(['lr'] * (len(rates) - 1))}, bits_lr], where the last is "
                "the quantizer's. In a loop of your own, scale the rate of each group."
            )

    def _learned(self) -> list[nn.Parameter]:
        return [p for quantizer in self._quantizers for p in quantizer.parameters()]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_optimizer": None}


_WATCHING: WeakSet[OptimizerGuard] = WeakSet()


@cache
def _register_hook() -> None:
    register_optimizer_step_post_hook(_note_step)


def _note_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not torch.compiler.is_compiling():
        for guard in tuple(_WATCHING):
            guard.note(optimizer)


def _rates(optimizer: Optimizer) -> list[float]:
    """The learning rate of each group; nothing if a device would have to be waited for."""
    rates = [group.get("lr", 0.0) for group in optimizer.param_groups if group["params"]]
    if any(isinstance(rate, Tensor) and not rate.is_cpu for rate in rates):
        return []
    return [float(rate) for rate in rates]

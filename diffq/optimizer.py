"""What a quantizer learns, as a parameter group of the user's optimizer, and only of that."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Adam, AdamW, Optimizer

from diffq.errors import OptimizerError
from diffq.sharding import is_dtensor, is_sharded

_ADAMS = (Adam, AdamW)

_REPLACED = (
    "fully_shard has replaced the parameters that the optimizer was given. Make the "
    "optimizer after fully_shard, then call quantizer.setup_optimizer(optimizer)."
)


def add_extras(
    optimizer: Optimizer,
    model: nn.Module,
    extras: Sequence[nn.Parameter],
    options: Mapping[str, Any],
    earlier: Optimizer | None = None,
) -> None:
    """Gives learned extras a parameter group of their own, without weight decay.

    Extras that this optimizer or the earlier one holds already are moved there.

    Args:
        optimizer: holds the model's parameters.
        model: the quantized model.
        extras: what its quantizer learns; may be empty.
        options: options of the group, such as `lr`.
        earlier: the optimizer that was given the extras before, if it is still there.

    Raises:
        OptimizerError: this is no optimizer, or it holds no parameter of the model.
    """
    if not isinstance(optimizer, Optimizer):
        raise OptimizerError(
            f"setup_optimizer needs a torch.optim.Optimizer, got {type(optimizer).__name__}."
        )
    ids = {id(extra) for extra in extras}
    ours = {id(parameter) for parameter in model.parameters()} - ids
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not ours & held:
        raise OptimizerError(
            "setup_optimizer needs the optimizer that trains this quantizer's model, "
            "but got one that holds none of its parameters. "
            "Make it with model.parameters(), after fully_shard if the model is sharded, "
            "then call setup_optimizer."
        )
    if any("initial_lr" in group for group in optimizer.param_groups) and ids - held:
        raise OptimizerError(
            "The optimizer has a learning rate scheduler, which would not know the new parameter "
            "group. Call setup_optimizer first, then make the scheduler."
        )
    if extras:
        if earlier is not None and earlier is not optimizer:
            _release(earlier, extras)
        _remove(optimizer, ids)
        decay = {"weight_decay": 0.0} if "weight_decay" in optimizer.defaults else {}
        kernel = _in_one_pass(optimizer, extras, options)
        optimizer.add_param_group({"params": list(extras), **decay, **kernel, **options})


def _in_one_pass(
    optimizer: Optimizer, extras: Sequence[nn.Parameter], options: Mapping[str, Any]
) -> dict[str, bool]:
    """Adam's own faster kernel for CPUs, where the user has chosen none.

    The same numbers but for rounding. By default Adam takes a dozen passes there, and a
    group size of 1 doubles what it updates.
    """
    if type(optimizer) not in _ADAMS or any(not e.is_cpu or is_dtensor(e) for e in extras):
        return {}
    asked = {**optimizer.defaults, **options}
    chosen = [asked[name] for name in ("fused", "foreach")]
    special = [asked[name] for name in ("capturable", "differentiable")]
    return {} if chosen != [None, None] or any(special) else {"fused": True}


def _remove(optimizer: Optimizer, ids: set[int]) -> None:
    """Takes parameters out of an optimizer's groups, and groups out that held no others."""
    groups = []
    for group in optimizer.param_groups:
        kept = [p for p in group["params"] if id(p) not in ids]
        if kept or not group["params"]:
            groups.append(group)
        group["params"] = kept
    optimizer.param_groups[:] = groups


def _release(optimizer: Optimizer, extras: Sequence[nn.Parameter]) -> None:
    """Takes extras out of an optimizer for good."""
    ids = {id(extra) for extra in extras}
    for group in optimizer.param_groups:
        # The group stays, though empty: a scheduler has a learning rate for each.
        group["params"] = [p for p in group["params"] if id(p) not in ids]
    for extra in extras:
        optimizer.state.pop(extra, None)


def refuse_training(module: nn.Module, args: Any) -> None:
    """Forward pre-hook of models whose extras no optimizer was given.

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
    """Notices that a model is trained without what its quantizer learns.

    That is so once the optimizer with the extras is gone, or has lost them, while
    another holds weights of the model, and none holds extras. Where optimizers of
    another kind may be at work, because none of torch's holds any, it stays silent.

    Args:
        optimizer: holds the extras now.
        learned: gives the extras that are still learned.
    """

    def __init__(self, optimizer: Optimizer, learned: Callable[[], Iterator[nn.Parameter]]) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._learned = learned
        self._shard = _first_shard(optimizer)
        self._pause = 1
        self._pausing = 0

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer that was given the extras, as long as somebody keeps it."""
        return self._optimizer()

    def check(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook of the model; costs one look at the optimizer's last group.

        Raises:
            OptimizerError: in training, the extras were lost.
        """
        if torch.compiler.is_compiling() or not module.training or not torch.is_grad_enabled():
            return
        extra = next((extra for extra in self._learned() if extra.requires_grad), None)
        optimizer = self.optimizer
        if extra is not None and self._shard is not None:
            # FSDP puts whole parameters in the places of those that optimizers hold.
            extra = self._shard
        if extra is None or (optimizer is not None and _holds(optimizer, extra)):
            return
        if optimizer is not None and is_sharded(module):
            self._shard = _first_shard(optimizer)
            if self._shard is None:
                raise OptimizerError(_REPLACED)
            return
        # To look for other optimizers takes long, so it is done ever more seldom.
        if self._pausing:
            self._pausing -= 1
            return
        found = self._search(module)
        if found is not None:
            self._optimizer = weakref.ref(found)
        else:
            self._pausing = self._pause
            self._pause *= 2

    def _search(self, model: nn.Module) -> Optimizer | None:
        """The optimizer that holds the extras now; None if none holds anything of the model."""
        extras = {id(extra) for extra in self._learned()}
        weights = {id(parameter) for parameter in model.parameters()} - extras
        held = [(optimizer, _held(optimizer)) for optimizer in _live_optimizers()]
        for optimizer, ids in held:
            if ids & extras:
                return optimizer
        if any(ids & weights for _, ids in held):
            raise OptimizerError(
                "An optimizer trains this model without what its quantizer learns: the one that "
                "setup_optimizer was given is gone, or has lost it. Make the optimizer first, "
                "then call quantizer.setup_optimizer(optimizer) on it, each time it is made "
                "anew; if bitwidths and scales are meant to stay, call quantizer.no_optimizer()."
            )
        return None


def _first_shard(optimizer: Optimizer) -> nn.Parameter | None:
    """The first sharded parameter of the group that was added last: the extras'."""
    extras = optimizer.param_groups[-1]["params"]
    return next((extra for extra in extras if is_dtensor(extra)), None)


def _holds(optimizer: Optimizer, extra: nn.Parameter) -> bool:
    """Whether an optimizer has a parameter; quick if it is the first of the last group."""
    groups = reversed(optimizer.param_groups)
    return any(parameter is extra for group in groups for parameter in group["params"])


def _held(optimizer: Optimizer) -> set[int]:
    groups: Iterable[Mapping[str, Any]] = getattr(optimizer, "param_groups", ())
    return {id(parameter) for group in groups for parameter in group.get("params", ())}


def _live_optimizers() -> list[Optimizer]:
    return [thing for thing in gc.get_objects() if issubclass(type(thing), Optimizer)]

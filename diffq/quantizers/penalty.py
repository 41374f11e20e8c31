"""The price of size as a gradient of what is learned, added right before an optimizer's step.

The size's gradient has a closed form, so the loss needs no term for it. At a step, the gradient of
the learned parameter is what all backwards since the last step have left there, reduced over the
ranks, unscaled and clipped, and the price comes on top once:

| what happens before the step | the price |
| --- | --- |
| several backwards (accumulation) | is added once |
| DDP averages gradients | is the same on each rank, and is not averaged |
| FSDP2 shards the learned parameter | each rank adds the part of its numbers |
| gradients are clipped | is added after the clip, and is not part of the norm |
| a GradScaler unscales, or a fused optimizer does so in its step | is in units of the loss |
| a GradScaler skips the step | is left out |
| no forward reads a tensor with gradients | is left out for that tensor |
| the step calls a closure | is added after each backward of the closure |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

from diffq.attach.attachment import Attachment
from diffq.errors import ConfigError, OptimizerError
from diffq.numerics.size import MEGABYTE_BITS
from diffq.torch_inside.graph import uncompiled
from diffq.torch_inside.optimizers import has_step_hooks
from diffq.torch_inside.sharding import gather_from, is_dtensor, layout_of, local_part


class Penalty:
    """Adds the price of size to the gradient of what a model's quantizer learns.

    Copies and pickles have the price, and no optimizer yet.

    Args:
        attachment: what is on the model.
        lam: price of one MB, in units of the loss.
    """

    def __init__(self, attachment: Attachment, lam: float) -> None:
        self.lam = lam
        self._attachment = attachment
        self._handles: list[RemovableHandle] = []

    def start(self, optimizer: Optimizer) -> None:
        """Adds the price to the steps of an optimizer, which `check_optimizer` has accepted."""
        self.stop()
        self._handles = [
            optimizer.register_step_pre_hook(self._before_call),
            optimizer.register_step_post_hook(self._after_call),
        ]

    def stop(self) -> None:
        """Ends what `start` began."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @property
    def sets_gradient(self) -> bool:
        """Whether steps add the size's gradient, so that no backward of the size may."""
        return bool(self._handles)

    @property
    def price(self) -> float:
        """The price of one MB at the next step."""
        return self.lam

    def begin(self) -> None:
        """Ends a plan, which this price has none of."""
        self._attachment.learned.follow(None)

    def before_step(self, optimizer: Optimizer) -> None:
        """Completes the gradients of a step that is to be made."""
        self._add(optimizer, self.lam)

    def after_step(self) -> None:
        """Takes notice of a step that was made."""

    def _before_call(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if kwargs.get("grad_scaler") is not None:
            raise OptimizerError(
                "lam needs gradients in units of the loss, but "
                f"{type(optimizer).__name__} unscales them itself, in step(grad_scaler=...). Call "
                "scaler.unscale_(optimizer) and optimizer.step() yourself; or leave lam out, and "
                "add lam * quantizer.model_size() to the loss."
            )
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._complete(optimizer)
            return None
        priced = self._after_closure(optimizer, closure)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": priced}
        return (args[0], priced, *args[2:]), kwargs

    @uncompiled
    def _complete(self, optimizer: Optimizer) -> None:
        self.before_step(optimizer)

    @uncompiled
    def _after_call(self, *_: Any) -> None:
        self.after_step()

    def _after_closure(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        def priced() -> Any:
            loss = closure()
            self._complete(optimizer)
            return loss

        return priced

    @torch.no_grad()
    def _add(self, optimizer: Optimizer, lam: float) -> None:
        parameter = self._attachment.learned.learned
        slopes = self._slopes(optimizer) if lam else None
        if slopes is None or parameter is None:
            return
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        _local(parameter.grad).add_(slopes, alpha=lam)

    def _slopes(self, optimizer: Optimizer) -> Tensor | None:
        """MB that each number of this rank gains, as gradients are scaled; None if none learns."""
        attachment = self._attachment
        parameter = attachment.learned.learned
        if parameter is None or not parameter.requires_grad:
            return None
        if not any(q.readings.in_this_step for q in attachment.quantizers):
            return None  # what steps without a forward, such as code that fills a state
        size = attachment.learned_size()
        if size is None or not size.learns:
            return None
        slopes = size.slopes(parameter.detach()) / MEGABYTE_BITS
        # Fused optimizers divide by it in their step.
        scale = getattr(optimizer, "grad_scale", None)
        return slopes if scale is None else slopes.mul_(scale)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": []}


def norm_on_ranks(parameter: Tensor, gradients: Sequence[Tensor]) -> list[float]:
    """Norms of gradients of the learned parameter, of which each rank has its part."""
    squares = torch.stack([_local(each).float().square().sum() for each in gradients])
    if is_dtensor(parameter):
        squares = gather_from(layout_of(parameter), squares).sum(0)
    norms: list[float] = squares.sqrt().tolist()
    return norms


def check_optimizer(optimizer: Optimizer) -> None:
    """Checks that a price can be added to the gradients of an optimizer.

    Raises:
        OptimizerError: it cannot.
    """
    if isinstance(optimizer, LBFGS):
        raise OptimizerError(
            "LBFGS compares losses, and a price that is added to gradients is in none of them. "
            "Pass lam=0, and add lam * quantizer.model_size() to the loss; or give the "
            "learned parameters an optimizer of their own, such as Adam."
        )
    if not has_step_hooks(optimizer):
        raise OptimizerError(
            f"A price of size needs an optimizer whose steps have hooks, and "
            f"{type(optimizer).__name__} wraps one that has. Call setup_optimizer on the inner "
            "optimizer."
        )


def check_learns_bits(attachment: Attachment, argument: str) -> None:
    """Raises ConfigError if a quantizer has no bitwidths to put a price on."""
    if all(quantizer.fineness is None for quantizer in attachment.quantizers):
        raise ConfigError(
            f"{argument} puts a price on bitwidths or steps that are learned, and "
            f"{type(attachment.face).__name__} learns none on this model. Leave {argument} out, "
            "or use a DiffQuantizer without bits=, or an EntropyQuantizer, on tensors above its "
            "min_size."
        )


def refuse_second_price(lam: float) -> None:
    """Raises OptimizerError in a backward of the size, whose price is in the gradient already."""
    raise OptimizerError(
        "The size has one price, in the loss or in setup_optimizer, but setup_optimizer was given "
        f"one (lam={lam:g} at this step) and a backward of model_size() came on top. Leave "
        "lam * quantizer.model_size() out of the loss; or call "
        "quantizer.setup_optimizer(optimizer, lam=0) to keep it there."
    )


def _local(tensor: Tensor) -> Tensor:
    return local_part(tensor) if is_dtensor(tensor) else tensor

"""The mean loss of a model over batches, under the same conditions in every pass."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffq.errors import ConfigError
from diffq.torch_inside.modules import buffers_in

#: Called with the model and a batch; returns the mean loss of the batch.
Loss = Callable[[nn.Module, Any], Tensor | float]

_EXAMPLE = "loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])"


class Evaluation:
    """Passes over the same batches, in eval mode and without gradients.

    Args:
        model: the model. Each pass restores its modes, its buffers and the random states.
        batches: can be gone through again and again.
        loss: the mean loss of a batch; None for the `loss` of the model's own output.

    Raises:
        ConfigError: the batches can be gone through only once, or are a batch themselves.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Any], loss: Loss | None) -> None:
        _check_batches(batches)
        self._model, self._batches = model, batches
        self._loss = _own_loss if loss is None else loss
        self._count: int | None = None

    def mean_loss(self) -> float:
        """The mean of the batches' losses; NaN or infinite if one of them is.

        Raises:
            ConfigError: there are no batches, another number of them than in the pass
                before, or a loss is no number.
        """
        model = self._model
        with torch.no_grad(), _kept_modes(model), _kept_draws(model), _kept_buffers(model):
            losses = [_number(self._loss(model, batch)) for batch in self._batches]
        self._check_count(len(losses))
        return sum(losses) / len(losses)

    def _check_count(self, count: int) -> None:
        if not count and self._count is None:
            raise ConfigError("The loss is a mean over batches, got none. Pass one batch or more.")
        if self._count not in (None, count):
            raise ConfigError(
                f"Each pass must go through the same batches, got {self._count} in the first and "
                f"{count} in a later one. Pass list(batches), or a DataLoader over a fixed dataset."
            )
        self._count = count


def check_finite_loss(loss: float) -> None:
    """Raises ConfigError for the loss of a model that was not sound to begin with."""
    if not math.isfinite(loss):
        raise ConfigError(
            f"The loss must be finite before anything is quantized, got {loss}. "
            "Evaluate the batches one by one, and leave out those without a finite loss."
        )


def _check_batches(batches: Any) -> None:
    if isinstance(batches, Mapping | Tensor | str) or not isinstance(batches, Iterable):
        raise ConfigError(
            f"batches must be a list or a DataLoader of batches, got {type(batches).__name__}. "
            "Pass [batch] for a single one."
        )
    if isinstance(batches, Iterator):
        raise ConfigError(
            "batches are gone through once for each tensor and bitwidth, got a "
            f"{type(batches).__name__}, which ends after the first pass. Pass list(batches)."
        )


def _own_loss(model: nn.Module, batch: Any) -> Any:
    """The loss that a model computes itself from a dict with labels, as in transformers."""
    if not isinstance(batch, Mapping):
        raise ConfigError(
            "Without a loss, batches are dicts of the model's arguments, got a batch of type "
            f"{type(batch).__name__}. Pass a loss, such as {_EXAMPLE}."
        )
    loss = getattr(model(**batch), "loss", None)
    if loss is None:
        raise ConfigError(
            "Without a loss, the model's output must have one, as those of transformers do if "
            f"the batch holds labels. Add them, or pass a loss, such as {_EXAMPLE}."
        )
    return loss


def _number(loss: Any) -> float:
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return float(loss)
    if isinstance(loss, Real):
        return float(loss)
    got = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
    raise ConfigError(
        f"loss must return one number for each batch, got {got}. Return the mean over the batch."
    )


@contextmanager
def _kept_modes(model: nn.Module) -> Iterator[None]:
    """Eval mode within; afterwards each module is in its own mode again."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        # Classes may do more in train() than set a flag, such as undoing what eval() merged.
        model.train(modes[model])
        for module, training in modes.items():
            module.training = training


@contextmanager
def _kept_draws(model: nn.Module) -> Iterator[None]:
    """Afterwards, the generators of random numbers draw what they would have drawn.

    These are the generators of Python, of NumPy, and of torch on the CPU and on GPUs. So each
    pass draws the same: shuffled batches come in the same order, and random crops are the same.
    """
    states = random.getstate(), np.random.get_state()
    devices = {tensor.device for tensor in model.parameters() if tensor.is_cuda}
    try:
        with torch.random.fork_rng(sorted(device.index for device in devices), device_type="cuda"):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextmanager
def _kept_buffers(model: nn.Module) -> Iterator[None]:
    """Afterwards, the buffers are the same tensors with the same values."""
    kept = [
        (buffers_in(module), name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in buffers_in(module).items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for buffers, name, buffer, values in kept:
            if buffers[name] is not buffer:
                buffers[name] = buffer
            buffer.data.copy_(values)

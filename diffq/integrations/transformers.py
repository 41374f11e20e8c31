"""A callback that compresses the model of transformers' `Trainer` while it trains.

A callback hears of the optimizer when the scheduler knows it and the checkpoint is in it, which is
too late for another parameter group. So this one puts methods in front of the trainer's own, those
that its documentation gives for overriding:

| method | besides |
| --- | --- |
| `call_model_init` | a quantizer is attached to the new model |
| `create_optimizer` | bitwidths get their group, before the scheduler is made and a state loaded |
| `log` | size, mean bitwidth and price stand in the log |
| `save_model` | the quantized weights are written beside the float ones |
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

from torch import nn
from torch.optim import Optimizer

from diffq.errors import AttachError, missing_package
from diffq.format.container import Codec
from diffq.integrations.compression import Compression, check_end, is_settled
from diffq.integrations.hub import is_peft, write
from diffq.quantizers.base import quantizer_of

try:
    from transformers import (
        Trainer,
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )
except ImportError as error:
    raise missing_package(
        "transformers", "diffq.integrations.transformers", "transformers"
    ) from error


class DiffQCallback(TrainerCallback):
    """Compresses the model of a `Trainer` to a size, or with a price.

    The model gets a `DiffQuantizer` when the trainer is made, or keeps the quantizer that it has.
    The trainer's logs contain `size_mb`, `mean_bits` and `lam`. Each checkpoint, and the output
    folder in the end, gets a file `model.diffq` with the quantized weights. With
    `load_best_model_at_end`, the best model is one whose bitwidths are settled.

    Example:
        >>> callback = DiffQCallback(target_mb=5.0)
        >>> trainer = Trainer(model, args, train_dataset=dataset, callbacks=[callback])
        >>> trainer.train()

    Args:
        target_mb: MB of the file in the end, or up to 1 % less.
        lam: price of one MB in units of the loss, in place of `target_mb`.
        float_share: share of the steps in plain float; by default half of them for `target_mb`,
            and none for `lam`. Pass 0 to finetune.
        lr: learning rate of the bitwidths; see `DiffQuantizer.setup_optimizer`.
        codec: of the files; see `diffq.save`.
        **options: of the `DiffQuantizer`, such as `noise` and `group_size`.

    Raises:
        ConfigError: when the trainer is made or begins, an argument breaks a rule.
        AttachError: the trainer wraps or shards the model in a way that is not supported.
    """

    def __init__(
        self,
        *,
        target_mb: float | None = None,
        lam: float | None = None,
        float_share: float | None = None,
        lr: float | None = None,
        codec: Codec = "rans",
        **options: Any,
    ) -> None:
        self.compression = Compression(target_mb, lam, float_share, lr, options)
        self.codec = codec
        self._has_joined = False

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attaches the quantizer, and puts methods in front of the trainer's."""
        trainer = _trainer_being_made()
        _check_trainer(trainer)
        self.compression.attach(trainer.model)
        base: Any = type(trainer)
        trainer.__class__ = _compressing(base)
        trainer.diffq_callback = self
        self._has_joined = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuses to begin if the trainer was made without the callback."""
        if not self._has_joined:
            raise AttachError(
                "DiffQCallback has to be there when the trainer is made, but came later, after the "
                "optimizer. Pass it to the trainer itself: Trainer(..., callbacks=[callback])."
            )

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Forgets the best model while none has the size of the plan: the largest is no winner."""
        if state.best_metric is not None and model and not is_settled(quantizer_of(model)):
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes the file of the model that training ends with."""
        if model is not None and args.should_save:
            check_end(quantizer_of(model))
            write(model, args.output_dir or ".", self.codec)


class _Compressing:
    """Methods in front of those of a trainer that has the callback."""

    diffq_callback: DiffQCallback

    def call_model_init(self: Any, *args: Any, **kwargs: Any) -> nn.Module:
        model: nn.Module = super().call_model_init(*args, **kwargs)  # type: ignore[misc]
        self.diffq_callback.compression.attach(model)
        return model

    def create_optimizer(self: Any, *args: Any, **kwargs: Any) -> Optimizer:
        optimizer: Optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        # Before training, the number of steps is not known, and the method is called again.
        if self.is_in_train:
            _check_resume(self)
            inner = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps those it knows.
            compression, steps = self.diffq_callback.compression, self.state.max_steps
            compression.setup(quantizer_of(self.model), inner, steps)
        return optimizer

    def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.is_in_train and "loss" in logs:
            readings = self.diffq_callback.compression.readings(quantizer_of(self.model))
            logs = {**logs, **readings}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def save_model(self: Any, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        super().save_model(output_dir, *args, **kwargs)  # type: ignore[misc]
        if self.args.should_save:
            write(self.model, output_dir or self.args.output_dir, self.diffq_callback.codec)


@cache
def _compressing(base: Any) -> Any:
    """The class of a trainer with the methods of `_Compressing` in front, under the same name."""
    members = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (_Compressing, base), members)


def _trainer_being_made() -> Any:
    """The trainer that calls from its `__init__`, which passes callbacks no reference to it."""
    frame = sys._getframe(1)
    while not isinstance(found := frame.f_locals.get("self"), Trainer):
        if frame.f_back is None:
            raise AttachError(
                "DiffQCallback belongs to a Trainer of transformers, but none has called it. Pass "
                "it to the trainer: Trainer(..., callbacks=[callback])."
            )
        frame = frame.f_back
    return found


def _check_trainer(trainer: Any) -> None:
    sharding = [
        name
        for name, used in {
            "FSDP": trainer.is_fsdp_enabled,
            "DeepSpeed": trainer.is_deepspeed_enabled,
            "DataParallel": trainer.args.n_gpu > 1,
        }.items()
        if used
    ]
    if sharding:
        raise AttachError(
            "DiffQCallback trains on one device or with DDP, but this trainer uses "
            f"{sharding[0]}. Start one process for each GPU, with torchrun or accelerate launch. "
            "For models that need FSDP, write the loop with fully_shard."
        )
    if trainer.args.load_best_model_at_end:
        _check_whole(trainer, "load_best_model_at_end")


def _check_resume(trainer: Any) -> None:
    if trainer.state.global_step:
        _check_whole(trainer, "resume_from_checkpoint")


def _check_whole(trainer: Any, asked: str) -> None:
    if is_peft(trainer.model):
        raise AttachError(
            f"A checkpoint of a PEFT model holds its adapters, without the bitwidths that {asked} "
            "needs. Leave it out; or train the whole model, without PEFT."
        )

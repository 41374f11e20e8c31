"""What the callbacks of all trainers do: attach, set the optimizer up, read sizes, look at the end.

A trainer's callback says when. The numbers are its arguments, checked by what they are passed to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from diffq.attach.attachment import attachment_of
from diffq.errors import ConfigError, warn
from diffq.quantizers.base import BaseQuantizer, quantizer_of
from diffq.quantizers.diffq import DiffQuantizer
from diffq.quantizers.target import Phase

#: The name of the file with a model's quantized weights, in the folder of a checkpoint or model.
FILE = "model.diffq"


class Compression:
    """What a user asks of a callback.

    Args:
        target_mb: MB of the file in the end; see `DiffQuantizer.setup_optimizer`.
        lam: price of one MB, in place of a target.
        float_share: share of the steps in plain float.
        lr: learning rate of the bitwidths.
        options: of the `DiffQuantizer` that the callback makes.
    """

    def __init__(
        self,
        target_mb: float | None,
        lam: float | None,
        float_share: float | None,
        lr: float | None,
        options: Mapping[str, Any],
    ) -> None:
        self.target_mb, self.lam, self.float_share, self.lr = target_mb, lam, float_share, lr
        self.options = options
        self._made: BaseQuantizer[Any] | None = None

    def attach(self, model: nn.Module) -> BaseQuantizer[Any]:
        """The quantizer of a model: the one that it has, or a new `DiffQuantizer`.

        Raises:
            ConfigError: the model has a quantizer and there are options for another, or there is
                nothing for a new one to learn from.
            AttachError: the model cannot be quantized.
        """
        if attachment_of(model) is not None:
            found = quantizer_of(model)
            if self.options and found is not self._made:
                raise ConfigError(
                    "The model has a quantizer, which the callback takes, and got options for "
                    f"another one: {', '.join(self.options)}. Leave them out, or pass the plain "
                    "model."
                )
            return found
        if self.target_mb is None and self.lam is None:
            raise ConfigError(
                "Bitwidths learn from a size or from a price, and the callback got neither. Pass "
                "target_mb=, the MB of the file in the end, or lam=, the price of one MB. To train "
                "with another quantizer, attach it to the model before you make the trainer."
            )
        self._made = DiffQuantizer(model, **self.options)
        return self._made

    def setup(self, quantizer: BaseQuantizer[Any], optimizer: Optimizer, steps: float) -> None:
        """Has an optimizer learn the bitwidths, over a training of so many steps.

        Raises:
            ConfigError: the training has no end, and a plan needs one; or a number breaks a rule.
            OptimizerError: the optimizer cannot take what is learned.
        """
        planned = self.target_mb is not None or self.float_share is not None
        if planned and not (math.isfinite(steps) and steps > 0):
            raise ConfigError(
                "A plan for the size needs to know when training ends, and the trainer does not "
                f"say, got {steps} steps. Give the trainer a number of steps (max_steps)."
            )
        quantizer.setup_optimizer(
            optimizer,
            self.lr,
            lam=self.lam,
            target_mb=self.target_mb,
            steps=int(steps) if planned else None,
            float_share=self.float_share,
        )

    def readings(self, quantizer: BaseQuantizer[Any]) -> dict[str, float]:
        """Size, mean bitwidth and price, for the log. A collective if the model is sharded."""
        target = quantizer.target
        size = quantizer.model_size().item() if target is None else target.size_mb
        price = self.lam if target is None else target.lam
        found = {"size_mb": size, "mean_bits": quantizer.mean_bits()}
        if price is not None:
            found["lam"] = float(price)
        return {name: value for name, value in found.items() if math.isfinite(value)}


def is_settled(quantizer: BaseQuantizer[Any]) -> bool:
    """Whether the file has the size of the plan, if the plan has one."""
    target = quantizer.target
    if target is None or target.target_mb is None:
        return True
    return target.phase in (Phase.SETTLE, Phase.DONE)


def check_end(quantizer: BaseQuantizer[Any]) -> None:
    """Warns of a training that ended before its plan."""
    target = quantizer.target
    if target is not None and target.step < target.steps:
        warn(
            f"Training ended at step {target.step} of the {target.steps} of its plan, in the "
            f"phase {target.phase!r}, and the file has {target.size_mb:.4g} MB. It stopped early, "
            "or a GradScaler skipped steps. Resume it, or train with fewer steps."
        )

"""The learned parameters of a quantizer in an optimizer, and training without one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from diffq.attach.attachment import Attachment
from diffq.quantizers.optimizer import add_learned, release
from diffq.quantizers.steps import StepWatch
from diffq.torch_inside.sharding import reshard


class OptimizerSetup:
    """Adds `learned_parameters`, `setup_optimizer` and `no_optimizer` to a quantizer."""

    _step_watch: StepWatch | None = None

    @property
    @abstractmethod
    def _attachment(self) -> Attachment:
        """What is on the model."""

    def learned_parameters(self) -> Iterator[nn.Parameter]:
        """The parameter that the quantizer adds to the model, such as logits of bitwidths.

        One for all tensors, `_diffq.learned` of the model, or none if nothing is learned.

        For an optimizer of their own, beside one that cannot take them (`LBFGS`, `Muon`):

            >>> bits_optimizer = torch.optim.Adam(quantizer.learned_parameters(), lr=1e-2)
            >>> quantizer.setup_optimizer(bits_optimizer)
        """
        return self._attachment.learned.parameters()

    def setup_optimizer(
        self, optimizer: Optimizer, lr: float | Tensor | None = None, **overrides: Any
    ) -> None:
        """Adds the learned parameters to an optimizer, as a parameter group of their own.

        The optimizer holds parameters of the model, or the `learned_parameters()` alone. If
        it was made from `model.parameters()` after the quantizer, the learned parameters
        move to their own group. If they have one already, the group stays, and only the
        given options change. The group has no weight decay. On a CPU, Adam and AdamW update
        it by their `fused` kernel, unless they were made with `fused` or `foreach`. An
        optimizer that was set up before loses the learned parameters. Where nothing is
        learned, this only checks that the optimizer belongs to the model.

        Call it after `fully_shard`, before you make a scheduler, and again for each new
        optimizer. A `DiffqWarning` tells you if another optimizer trains the model without
        the learned parameters, or if a scheduler overwrites their learning rate.

        Args:
            optimizer: holds the model's parameters.
            lr: learning rate of the learned parameters. By default 1e-3, or the present one
                where they have a group or an optimizer of their own.
            **overrides: further options of their parameter group, such as `betas`.

        Raises:
            OptimizerError: the optimizer holds no parameter of the model, cannot take the
                group, or has a scheduler that would not know it. It stays as it was.
            ConfigError: the optimizer knows no such option, or `lr` is no learning rate.
            AttachError: the quantizer was detached.
        """
        attachment = self._attachment
        reshard(attachment.model)
        options = overrides if lr is None else {"lr": lr, **overrides}
        learned = list(self.learned_parameters())
        add_learned(optimizer, attachment.model, learned, options, self._optimizer)
        self._end_checks()
        if learned:
            self._step_watch = StepWatch(optimizer, attachment)

    def no_optimizer(self) -> None:
        """Allows training without `setup_optimizer`: the learned parameters stay as they are.

        The optimizer that was set up before loses them. One that you make afterwards from
        `model.parameters()` holds them, unless you leave out the `learned_parameters()`.
        """
        optimizer = self._optimizer
        if optimizer is not None:
            release(optimizer, list(self.learned_parameters()))
        self._end_checks()

    @property
    def _optimizer(self) -> Optimizer | None:
        """The optimizer that was set up, as long as somebody keeps it."""
        return self._step_watch.optimizer if self._step_watch is not None else None

    def _end_checks(self) -> None:
        """Ends all checks of training."""
        self._attachment.forwards.expects_optimizer = False
        if self._step_watch is not None:
            self._step_watch.stop()
        self._step_watch = None

    def _expect_optimizer(self) -> None:
        """Refuses training until the learned parameters have an optimizer, if there are any."""
        self._attachment.forwards.expects_optimizer = True

"""The learned parameters of a quantizer in an optimizer, and training without one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from diffq.attach.attachment import Attachment
from diffq.checks import check_number, plain
from diffq.quantizers.course import Course
from diffq.quantizers.landing import check_reachable
from diffq.quantizers.optimizer import DEFAULT_LR, add_learned, release
from diffq.quantizers.penalty import (
    Penalty,
    check_learns_bits,
    check_optimizer,
    refuse_second_price,
)
from diffq.quantizers.steps import StepWatch
from diffq.quantizers.target import Plan, Target, make_plan
from diffq.torch_inside.sharding import reshard


class OptimizerSetup:
    """Adds `learned_parameters`, `setup_optimizer` and `no_optimizer` to a quantizer."""

    _step_watch: StepWatch | None = None
    _penalty: Penalty | None = None

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
        self,
        optimizer: Optimizer,
        lr: float | Tensor | None = None,
        *,
        lam: float | None = None,
        target_mb: float | None = None,
        steps: int | None = None,
        float_share: float | None = None,
        **overrides: Any,
    ) -> None:
        """Adds the learned parameters to an optimizer, as a parameter group of their own.

        The optimizer holds parameters of the model, or the `learned_parameters()` alone. If
        it was made from `model.parameters()` after the quantizer, the learned parameters
        move to their own group. If they have one already, the group stays, and only the
        given options change. The group has no weight decay. On a CPU, Adam and AdamW update
        it by their `fused` kernel, unless they were made with `fused` or `foreach`. An
        optimizer that was set up before loses the learned parameters. Where nothing is
        learned, this only checks that the optimizer belongs to the model.

        With `lam`, the loss needs no term for the size: each step adds the gradient of
        `lam * model_size()` to that of the learned parameters, after gradients are accumulated,
        reduced, unscaled and clipped. It stays for later calls that name none, also with another
        optimizer, and `lam=0` or `no_optimizer()` ends it. A backward of `model_size()` raises
        an OptimizerError meanwhile, because the size would have two prices.

        With `target_mb` and `steps`, training ends with a file of `target_mb`, or up to 1 % less.
        It begins in plain float; then the size goes to the target, by a price that is found on
        the way; the last steps train with fixed bitwidths (see `diffq.quantizers.target`). The
        learning rate is by default one that fits the length. The plan is part of the model's
        state dict, and `quantizer.target` tells where it stands.

        Call it after `fully_shard`, before you make a scheduler, and again for each new
        optimizer. A `DiffqWarning` tells you if another optimizer trains the model without
        the learned parameters, or if a scheduler overwrites their learning rate.

        Args:
            optimizer: holds the model's parameters.
            lr: learning rate of the learned parameters. By default 1e-3, or the present one
                where they have a group or an optimizer of their own.
            lam: price of one MB, in units of the loss, that each step adds to the gradients.
            target_mb: MB of the file in the end, in place of a price.
            steps: steps that this optimizer will make in all. With `lam`, the price rises from 0.
            float_share: share of the steps in plain float, 0 to 0.8; 0.5 by default. Pass 0 to
                finetune.
            **overrides: further options of their parameter group, such as `betas`.

        Raises:
            OptimizerError: the optimizer holds no parameter of the model, cannot take the
                group or the price, or has a scheduler that would not know it. It stays as it was.
            ConfigError: the optimizer knows no such option, `lr` is no learning rate, `lam` is no
                price, arguments contradict each other, no bitwidths are learned, or the target
                is below the least size.
            AttachError: the quantizer was detached.
        """
        attachment = self._attachment
        penalty = self._new_penalty(lam, make_plan(lam, target_mb, steps, float_share))
        reshard(attachment.model)
        options = overrides if lr is None else {"lr": lr, **overrides}
        learned = list(self.learned_parameters())
        if penalty is not None and isinstance(optimizer, Optimizer):
            check_optimizer(optimizer)
        default_lr = penalty.plan.bits_lr if isinstance(penalty, Course) else DEFAULT_LR
        add_learned(optimizer, attachment.model, learned, options, self._optimizer, default_lr)
        self._end_checks()
        if learned:
            self._step_watch = StepWatch(optimizer, attachment)
        self._penalty = penalty
        if penalty is None:
            attachment.learned.follow(None)
        else:
            penalty.start(optimizer)
            penalty.begin()

    def no_optimizer(self) -> None:
        """Allows training without `setup_optimizer`: the learned parameters stay as they are.

        The optimizer that was set up before loses them. One that you make afterwards from
        `model.parameters()` holds them, unless you leave out the `learned_parameters()`.
        """
        optimizer = self._optimizer
        if optimizer is not None:
            release(optimizer, list(self.learned_parameters()))
        self._end_checks()
        self._penalty = None
        self._attachment.learned.follow(None)

    @property
    def target(self) -> Target | None:
        """Where the plan of `setup_optimizer(..., steps=...)` stands; None without a plan.

        The phase, the step, the size and its goal in MB, and the price, for the log. Reads the
        size back from the device. A collective if the model is sharded.
        """
        return self._penalty.read() if isinstance(self._penalty, Course) else None

    def _new_penalty(self, lam: float | None, plan: Plan | None) -> Penalty | None:
        """The price that a call of `setup_optimizer` sets; without arguments, the present one."""
        attachment = self._attachment
        if lam is not None:
            check_number(lam, "lam", 0)
            check_learns_bits(attachment, "lam")
        if plan is None:
            if lam is None:
                return self._penalty
            return Penalty(attachment, plain(lam)) if lam else None
        if plan.target is not None:
            check_learns_bits(attachment, "target_mb")
            check_reachable(attachment, self.model_size, self.compressed_model_size, plan.target)
        return Course(attachment, self, plan)

    @abstractmethod
    def model_size(self) -> Tensor:
        """MB of packed bitwidths."""

    @abstractmethod
    def compressed_model_size(self) -> float:
        """MB of the file."""

    def _note_size_used(self, attachment: Attachment) -> None:
        """Takes notice of a backward of the size; refuses it where steps add its gradient."""
        # After a backward comes a step, and fused optimizers leave no trace of theirs.
        attachment.forget()
        if self._penalty is not None and self._penalty.sets_gradient:
            refuse_second_price(self._penalty.price)

    @property
    def _optimizer(self) -> Optimizer | None:
        """The optimizer that was set up, as long as somebody keeps it."""
        return self._step_watch.optimizer if self._step_watch is not None else None

    def _end_checks(self) -> None:
        """Ends all checks of training, and the price of size."""
        self._attachment.forwards.expects_optimizer = False
        if self._step_watch is not None:
            self._step_watch.stop()
        self._step_watch = None
        if self._penalty is not None:
            self._penalty.stop()

    def _expect_optimizer(self) -> None:
        """Refuses training until the learned parameters have an optimizer, if there are any."""
        self._attachment.forwards.expects_optimizer = True

"""Keeps a training to its plan: counts steps, controls the price, and fixes bitwidths in the end.

All that changes is in `Progress`, a tensor of the model's state dict, so that a training resumes
from any step bit for bit. On several ranks each number is the same on all of them.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from diffq.attach.attachment import Attachment
from diffq.attach.learned import PLAN
from diffq.errors import OptimizerError
from diffq.quantizers.landing import land, largest_on_ranks
from diffq.quantizers.optimizer import forget_state
from diffq.quantizers.penalty import Penalty, norm_on_ranks
from diffq.quantizers.target import FIRST_SHARE, Phase, Plan, Target, log_price, next_sum

# MB; far below any file.
_LEAST_SIZE = 1e-9


class Measured(Protocol):
    """A quantizer whose model has a size."""

    def model_size(self) -> Tensor:
        """MB of packed bitwidths."""

    def compressed_model_size(self) -> float:
        """MB of the file."""


class Progress(NamedTuple):
    """Where a plan stands: the numbers of `_diffq.schedule`, float64.

    Attributes:
        plain: 1 while training reads the plain weights, else 0. `Learned` reads it.
        steps: of the plan, as the next three; 0 for what a plan does not have. They are at `PLAN`.
        float_share: of the plan.
        target: of the plan.
        lam: of the plan.
        step: steps made.
        start: MB of the file at the first quantized step; 0 before.
        ratio: MB of the file over MB of packed bitwidths, as last measured.
        base: logarithm of the first price.
        total: sum of the control.
        price: of one MB, for the next step.
    """

    plain: float
    steps: float
    float_share: float
    target: float
    lam: float
    step: float = 0.0
    start: float = 0.0
    ratio: float = 1.0
    base: float = 0.0
    total: float = 0.0
    price: float = 0.0


class Course(Penalty):
    """A price that follows a plan.

    Args:
        attachment: what is on the model.
        quantizer: measures sizes.
        plan: the plan.
    """

    def __init__(self, attachment: Attachment, quantizer: Measured, plan: Plan) -> None:
        super().__init__(attachment, 0.0)
        self.plan = plan
        self._quantizer = quantizer

    def begin(self) -> None:
        """Begins the plan, or goes on where it stands, also in a state that was loaded before."""
        learned = self._attachment.learned
        waiting, first = learned.schedule, self._first
        resumes = waiting is not None and torch.equal(waiting[PLAN], self._numbers(first)[PLAN])
        learned.follow(waiting if resumes else self._numbers(first))

    @property
    def progress(self) -> Progress:
        """Where the plan stands."""
        numbers = self._attachment.learned.schedule
        return self._first if numbers is None else Progress(*numbers.tolist())

    @property
    def _first(self) -> Progress:
        plan = self.plan
        return Progress(0.0, plan.steps, plan.float_share, plan.target or 0.0, plan.lam or 0.0)

    @property
    def price(self) -> float:
        """The price of one MB at the next step."""
        return self.progress.price

    def before_step(self, optimizer: Optimizer) -> None:
        """Adds the price; in the float phase, keeps what is learned as it is."""
        self._refuse_capture()
        now = self.progress
        phase = self.plan.phase(int(now.step))
        if phase is Phase.FLOAT:
            self._keep(optimizer)
            return
        if now.step == self.plan.begin > 0:
            forget_state(optimizer, list(self._attachment.learned.parameters()))
        with self._attachment.unchanged():
            if self.plan.target is not None and phase in (Phase.PATH, Phase.HOLD):
                now = self._controlled(now, optimizer)
            self._add(optimizer, now.price)

    def after_step(self) -> None:
        """Counts the step, and begins the next phase."""
        now = self.progress
        now = now._replace(step=now.step + 1)
        before, phase = (self.plan.phase(int(step)) for step in (now.step - 1, now.step))
        if self.plan.target is None:
            now = now._replace(price=self.plan.price(int(now.step)))
        self._store(now)
        if phase is not before and before is Phase.FLOAT:
            self._attachment.restart()
        if phase is not before and phase in (Phase.SETTLE, Phase.DONE):
            self._land(last=phase is Phase.DONE)

    def read(self) -> Target:
        """Where the plan stands, for users."""
        now, plan = self.progress, self.plan
        size = self._packed_size() * now.ratio
        step = int(now.step)
        goal = plan.goal(now.start, step) if plan.target is not None and now.start else None
        phase = plan.phase(step).value
        return Target(phase, step, plan.steps, size, goal, plan.target, now.price)

    def _keep(self, optimizer: Optimizer) -> None:
        """Leaves a step nothing to learn, and has the first one fill the optimizer's state.

        `torch.distributed.checkpoint` wants a state of each parameter. The path begins anew.
        """
        for parameter in self._attachment.learned.parameters():
            filled = parameter in optimizer.state
            parameter.grad = None if filled else torch.zeros_like(parameter)

    @torch.no_grad()
    def _controlled(self, now: Progress, optimizer: Optimizer) -> Progress:
        """Where the plan stands with the price for this step, by the size at its start."""
        step = int(now.step)
        if not self.plan.controls(step):
            return now
        base = now.base if now.start else self._first_price(optimizer)
        if base is None:
            return now
        packed = self._packed_size()
        if self.plan.calibrates(step) or not now.start:
            now = now._replace(ratio=self._file_size() / packed)
        size = packed * now.ratio
        now = now._replace(start=now.start or size, base=base)
        error = math.log(size / self.plan.goal(now.start, step))
        now = now._replace(total=next_sum(now.total, error, self.plan.gain))
        now = now._replace(price=math.exp(log_price(now.base, now.total, error)))
        self._store(now)
        return now

    def _first_price(self, optimizer: Optimizer) -> float | None:
        """Logarithm of a price whose gradient is a tenth of that of the loss.

        None where the gradients are not finite, as in the first steps of a GradScaler.
        """
        parameter, slopes = self._attachment.learned.learned, self._slopes(optimizer)
        if parameter is None or parameter.grad is None or slopes is None:
            return None
        loss, size = norm_on_ranks(parameter, [parameter.grad, slopes])
        if not math.isfinite(loss) or not size:
            return None
        return math.log(FIRST_SHARE * loss / size) if loss else 0.0

    def _packed_size(self) -> float:
        # Levels that are all zero have no entropy, and logarithms are taken of sizes.
        return max(self._quantizer.model_size().item(), _LEAST_SIZE)

    def _file_size(self) -> float:
        return largest_on_ranks(self._attachment, self._quantizer.compressed_model_size())

    def _land(self, last: bool) -> None:
        """Fixes the bitwidths for a file just below the target."""
        size = land(self._attachment, self._file_size, self.plan.target or 0.0, last)
        packed = self._packed_size()
        self._store(self.progress._replace(ratio=size / packed, price=0.0))

    def _store(self, now: Progress) -> None:
        self._attachment.learned.follow(self._numbers(now))

    def _numbers(self, now: Progress) -> Tensor:
        plain = self.plan.phase(int(now.step)) is Phase.FLOAT
        numbers = now._replace(plain=float(plain))
        return torch.tensor(numbers, dtype=torch.float64, device="cpu")

    def _refuse_capture(self) -> None:
        parameter = self._attachment.learned.parameter
        on_gpu = parameter is not None and parameter.is_cuda
        if on_gpu and torch.cuda.is_current_stream_capturing():
            raise OptimizerError(
                "A plan counts steps and reads sizes, which a CUDA graph cannot replay. Leave "
                "optimizer.step() out of the graph, or pass lam= without steps=."
            )

"""A plan for the steps of a training: float first, then the size on a path, then held.

| phase | steps, of all | training forwards read | price of size | bitwidths |
| --- | --- | --- | --- | --- |
| float | up to `float_share` | the plain weights | none | stay as they are |
| path | up to 80 % | noise | rises, or is controlled along the path | learned |
| hold | up to 95 % | noise | stays, or is controlled at the target | learned |
| settle | up to the end | true rounding | none | fixed, for a file just below the target |
| done | after the end | true rounding | none | fixed |

Without a target, the price rises from 0 along the path and then stays: hold has no end.

The size goes straight in its logarithm, from that of the first quantized step to the target. A
price from the first step on, while weights are noise, would prune what never comes back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from diffq.checks import check_number, check_whole
from diffq.errors import ConfigError

#: Shares of all steps at which the path and the learning of bitwidths end.
PATH_END, LEARNING_END = 0.8, 0.95

DEFAULT_FLOAT_SHARE = 0.5

#: How often the encoder is asked for the size while bitwidths are learned.
CALIBRATIONS = 16

#: Gains of the control of the price's logarithm by that of the size over its goal: at once, and
#: summed over the steps from the first quantized one to the end of learning.
PROPORTIONAL, INTEGRAL = 15.0, 60.0

#: Norm of the gradient of the first price, over that of the loss.
FIRST_SHARE = 0.1

_LARGEST_ERROR, _LARGEST_SUM = 1.0, 12.0


class Phase(str, Enum):
    """What training does at a step."""

    FLOAT = "float"
    PATH = "path"
    HOLD = "hold"
    SETTLE = "settle"
    DONE = "done"


@dataclass(frozen=True)
class Plan:
    """What a training of a known length does at each step.

    Attributes:
        steps: steps of the optimizer in all.
        float_share: share of them in plain float.
        target: MB of the file in the end; None for a plan with a price.
        lam: price of one MB from the path's end on; None for a plan with a target.
    """

    steps: int
    float_share: float
    target: float | None = None
    lam: float | None = None

    @property
    def begin(self) -> int:
        """The first quantized step."""
        return round(self.float_share * self.steps)

    @property
    def path_end(self) -> int:
        """The first step of hold."""
        return max(self.begin, round(PATH_END * self.steps))

    @property
    def settle(self) -> int:
        """The first step with fixed bitwidths, where there is a target."""
        return min(max(self.path_end, round(LEARNING_END * self.steps)), self.steps - 1)

    def phase(self, step: int) -> Phase:
        """The phase of a step, from 0."""
        if step < self.begin:
            return Phase.FLOAT
        if self.target is not None and step >= self.settle:
            return Phase.SETTLE if step < self.steps else Phase.DONE
        return Phase.PATH if step < self.path_end else Phase.HOLD

    def path_share(self, step: int) -> float:
        """How much of the path a step has behind it, 0 to 1."""
        length = self.path_end - self.begin
        return min(max((step - self.begin) / length, 0.0), 1.0) if length else 1.0

    def price(self, step: int) -> float:
        """The price of one MB at a step, for a plan with a price."""
        return (self.lam or 0.0) * self.path_share(step)

    def goal(self, start: float, step: int) -> float:
        """MB that the size should have at a step, for a plan with a target.

        Args:
            start: MB at the first quantized step.
            step: from 0.
        """
        target, left = self.target or 0.0, 1 - self.path_share(step)
        return target * math.exp(left * math.log(start / target))

    @property
    def interval(self) -> int:
        """Steps from one reading of the size to the next, which waits for the device."""
        return max(1, self.steps // 2000)

    def controls(self, step: int) -> bool:
        """Whether the size is read before a step."""
        return self.begin <= step < self.settle and (step - self.begin) % self.interval == 0

    def calibrates(self, step: int) -> bool:
        """Whether the encoder is asked for the size before a step."""
        every = max(1, (self.settle - self.begin) // CALIBRATIONS)
        return self.begin <= step < self.settle and (step - self.begin) % every == 0

    @property
    def gain(self) -> float:
        """What the sum gains per reading and unit of error."""
        return INTEGRAL * self.interval / max(1, self.settle - self.begin)

    @property
    def bits_lr(self) -> float:
        """A learning rate that takes bitwidths along the path, by ten times what Adam needs."""
        length = max(1, self.path_end - self.begin)
        return min(max(30 / length, 1e-3), 0.1)


def make_plan(
    lam: float | None, target_mb: float | None, steps: int | None, float_share: float | None
) -> Plan | None:
    """The plan that arguments of `setup_optimizer` ask for; None for a price without a plan.

    Raises:
        ConfigError: an argument breaks a rule, or two contradict each other.
    """
    if lam is not None and target_mb is not None:
        raise ConfigError(
            "lam is a price for which a size is found, and target_mb a size for which a price is "
            f"found: pass one of them, got lam={lam!r} and target_mb={target_mb!r}."
        )
    if steps is None:
        for name, value in (("target_mb", target_mb), ("float_share", float_share)):
            if value is not None:
                raise ConfigError(
                    f"{name} needs to know when training ends: pass steps=, the number of steps "
                    f"that the optimizer will make, got {name}={value!r} alone."
                )
        return None
    check_whole(steps, "steps")
    if lam is None and target_mb is None:
        raise ConfigError(
            "steps is the length of a plan for the size: pass target_mb=, the MB of the file in "
            f"the end, or lam=, the price of one MB, with steps={steps!r}."
        )
    share = DEFAULT_FLOAT_SHARE if float_share is None else float_share
    check_number(share, "float_share", 0, PATH_END)
    if target_mb is None:
        return Plan(int(steps), float(share), lam=lam)
    check_number(target_mb, "target_mb", 0)
    if steps < 10:
        raise ConfigError(
            "A target needs 10 steps or more, to learn bitwidths and to settle with them, got "
            f"steps={steps!r}."
        )
    return Plan(int(steps), float(share), target=float(target_mb))


def next_sum(total: float, error: float, gain: float) -> float:
    """The sum of the control after another reading of the size.

    Args:
        total: the sum so far.
        error: logarithm of the size over its goal.
        gain: of the plan.
    """
    return _clamped(total + gain * _clamped(error, _LARGEST_ERROR), _LARGEST_SUM)


def log_price(base: float, total: float, error: float) -> float:
    """Logarithm of the price of one MB.

    Args:
        base: of the first price.
        total: what `next_sum` gave.
        error: logarithm of the size over its goal.
    """
    return base + total + PROPORTIONAL * _clamped(error, _LARGEST_ERROR)


def _clamped(value: float, most: float) -> float:
    return max(-most, min(most, value)) if math.isfinite(value) else 0.0


@dataclass(frozen=True)
class Target:
    """Where a plan stands; `str` and `repr` say it in one line.

    Attributes:
        phase: "float", "path", "hold", "settle" or "done".
        step: steps made.
        steps: steps in all.
        size_mb: MB of the file, as estimated from the bitwidths.
        goal_mb: MB that it should have at this step; None without a target or before the path.
        target_mb: MB that it should have in the end; None for a plan with a price.
        lam: price of one MB at this step, in units of the loss.
    """

    phase: str
    step: int
    steps: int
    size_mb: float
    goal_mb: float | None
    target_mb: float | None
    lam: float

    def __repr__(self) -> str:
        parts = [f"step {self.step} of {self.steps}", self.phase, f"{self.size_mb:.4g} MB"]
        if self.goal_mb is not None:
            parts.append(f"goal {self.goal_mb:.4g} MB")
        if self.target_mb is not None:
            parts.append(f"target {self.target_mb:.4g} MB")
        return f"Target({', '.join(parts)}, lam {self.lam:.3g})"

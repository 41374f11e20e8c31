"""Schedules that take the learning rate of what is learned away, and schedules that keep it."""

import warnings

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

import diffq
from diffq.quantizers.steps import PATIENCE
from tests.models import QUANTIZERS, mlp, seeded, step

INPUTS = torch.ones(2, 16)
STEPS = 3 * PATIENCE


class _ByHand:
    """A loop that sets one rate for all groups, as many training scripts do."""

    def __init__(self, optimizer, scaled):
        self.optimizer, self.scaled, self.steps = optimizer, scaled, 0

    def step(self):
        self.steps += 1
        for group in self.optimizer.param_groups:
            scale = group["initial"] if self.scaled else 0.1
            group["lr"] = scale * 0.98**self.steps


class _Plateau(lr_scheduler.ReduceLROnPlateau):
    def step(self):
        super().step(1.0)


def _cosine(optimizer):
    return lr_scheduler.CosineAnnealingLR(optimizer, STEPS, eta_min=1e-6)


class _ForAWhile(_ByHand):
    """A warm-up that gives all groups one rate, and then each its own again."""

    def step(self):
        super().step()
        if self.steps >= PATIENCE // 2:
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial"]


LOSING = {
    "onecycle": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=STEPS),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, step_size_up=4),
    "by hand": lambda o: _ByHand(o, scaled=False),
    "averaging": lambda o: SWALR(o, 1e-3, anneal_epochs=5),
}

KEEPING = {
    "none": lambda o: None,
    "onecycle": lambda o: lr_scheduler.OneCycleLR(o, [1e-2, 0.3], total_steps=STEPS),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, [1e-3, 0.1], [1e-2, 0.3], step_size_up=4),
    "cyclic from one base": lambda o: lr_scheduler.CyclicLR(o, 1e-3, [1e-2, 0.3], step_size_up=4),
    "warm-up from 0": lambda o: lr_scheduler.LambdaLR(o, lambda step: max(0, step - 2) / STEPS),
    "to 0": lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, STEPS // 2),
    "cosine": _cosine,
    "plateau": lambda o: _Plateau(o, factor=0.1, patience=0, min_lr=1e-3),
    "constant": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "by hand": lambda o: _ByHand(o, scaled=True),
    "for a while": lambda o: _ForAWhile(o, scaled=False),
    "averaging": lambda o: SWALR(o, [1e-3, 0.1], anneal_epochs=5),
}


def _warnings(schedule, *, lr=0.3, optimizer=None):
    """What training under a schedule warns of."""
    model = seeded(mlp)
    optimizer = (optimizer or torch.optim.SGD)(model.parameters(), 0.1, momentum=0.9)
    quantizer = QUANTIZERS["diffq"](model)
    quantizer.setup_optimizer(optimizer, lr=lr)
    for group in optimizer.param_groups:
        group["initial"] = group["lr"]
    scheduler = schedule(optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(STEPS - 1):
            step(model, optimizer, INPUTS, quantizer)
            if scheduler is not None:
                scheduler.step()
    return [warning for warning in caught if warning.category is diffq.DiffqWarning]


@pytest.mark.parametrize("name", LOSING)
def test_one_rate_for_all_groups(name):
    """A schedule with one rate in place of two is told once, with the remedy."""
    (warning,) = _warnings(LOSING[name])
    assert all(word in str(warning.message) for word in ("OneCycleLR", "list", "[lr, bits_lr]"))


@pytest.mark.parametrize("name", KEEPING)
def test_schedules_that_keep_the_rate(name):
    """Schedules that scale each group's rate, or get one for each, raise no warning."""
    assert _warnings(KEEPING[name]) == []


@pytest.mark.parametrize("name", [*LOSING, *KEEPING])
def test_one_rate_from_the_start(name):
    """Where what is learned was given the weights' rate, it has none of its own to lose."""
    if "cyclic" not in name and name not in ("onecycle", "averaging"):
        assert _warnings({**LOSING, **KEEPING}[name], lr=0.1) == []


def test_rates_that_are_tensors():
    """Rates may be tensors, which schedulers write to in place."""
    one_cycle = LOSING["onecycle"]

    def adam(parameters, lr, momentum):
        return torch.optim.AdamW(parameters, torch.tensor(lr))

    assert len(_warnings(one_cycle, lr=torch.tensor(0.3), optimizer=adam)) == 1
    assert _warnings(_cosine, lr=torch.tensor(0.3), optimizer=adam) == []


def test_a_second_schedule():
    """Each scheduler of an optimizer is looked at: the second one may be the one that loses."""

    class _Phases:
        def __init__(self, optimizer):
            self.optimizer, self.steps = optimizer, 0
            self.now = KEEPING["onecycle"](optimizer)

        def step(self):
            self.steps += 1
            if self.steps == PATIENCE:
                self.now = LOSING["onecycle"](self.optimizer)
            else:
                self.now.step()

    assert len(_warnings(_Phases)) == 1

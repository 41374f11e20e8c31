"""Steps with kernels and steps with torch's operations, on one device."""

from functools import partial

import pytest
import torch
from torch import nn

import diffq
from diffq.quantizers import batches
from tests.compare import close, same_bits
from tests.kernels import backend
from tests.models import SUMS, computed, gradients

DEVICE = backend.device()

#: The interpreter takes long for each program.
WIDTH = 16 if backend.INTERPRETED else 400

#: Quantizers whose training draws no random numbers.
MADE = {
    "rounding": partial(diffq.DiffQuantizer, min_size=0, noise="rounding"),
    "rounding, one bitwidth": partial(
        diffq.DiffQuantizer, min_size=0, noise="rounding", group_size=None
    ),
    "fixed": partial(diffq.DiffQuantizer, min_size=0, noise="rounding", bits=3),
    "qat": partial(diffq.QATQuantizer, min_size=0, bits=4),
    "lsq": partial(diffq.LSQQuantizer, min_size=0, bits=4),
}


@pytest.fixture
def both(monkeypatch):
    """Calls a function with kernels and with torch's operations, and returns both results."""

    def call(function):
        results = []
        for kernels in (True, False):
            monkeypatch.setattr(batches, "available", lambda device, on=kernels: on)
            torch.manual_seed(0)
            results.append(function())
        return results

    return call


def _attached(kind, dtype=torch.float32):
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3))
    with torch.no_grad():
        model[0].weight[0] = 0  # zeros stay zero
    model.to(DEVICE, dtype)
    quantizer = MADE[kind](model)
    quantizer.no_optimizer()
    return model, quantizer, torch.randn(4, WIDTH, device=DEVICE, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", MADE)
def test_values(kind, dtype, both):
    """Both train with the same weights, bit for bit."""

    def values():
        model, *_ = _attached(kind, dtype)
        # Rounding gives zeros of both signs.
        return {name: value + 0 for name, value in computed(model).items()}

    assert same_bits(*both(values))


@pytest.mark.parametrize("kind", MADE)
def test_gradients(kind, both):
    """A step gives the same gradients, but for the order of sums."""

    def step():
        model, quantizer, x = _attached(kind)
        (model(x).square().mean() + 0.1 * quantizer.model_size()).backward()
        return gradients(model)

    assert close(*both(step), SUMS)


@pytest.mark.parametrize("kind", MADE)
def test_second_derivatives(kind, both):
    """The gradients of a gradient are the same."""

    def twice():
        model, _, x = _attached(kind)
        loss = model(x).square().mean()
        parameters = [p for p in model.parameters() if p.requires_grad]
        found = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        sum(grad.square().sum() for grad in found if grad is not None).backward()
        return gradients(model)

    assert close(*both(twice), SUMS)

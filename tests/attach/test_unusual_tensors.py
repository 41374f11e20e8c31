"""Tensors of no dimension, no element or odd strides, and bitwidths at the end of their range."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.compare import same_bits
from tests.holder import quantizers_in
from tests.models import QUANTIZERS, computed, evaluate_alike, restored, seeded, step


class _Odd(nn.Module):
    """Parameters of no dimension, of no element, not contiguous, and of one group and a bit."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(()))
        self.empty = nn.Parameter(torch.empty(0, 16))
        self.turned = nn.Parameter(torch.randn(16, 9).t())
        self.strided = nn.Parameter(torch.randn(10, 32)[::2, ::2])
        self.rest = nn.Parameter(torch.randn(9))

    def forward(self, x):
        wide = torch.cat([F.linear(x, self.turned) + self.rest, F.linear(x, self.empty)], 1)
        return self.scale * wide.sum(1, keepdim=True) + F.linear(x, self.strided)


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_unusual_tensors(kind):
    """0-dim, empty and strided tensors train, evaluate as restored, and keep their layout."""
    model, inputs = seeded(_Odd), torch.randn(4, 16)
    strides = {name: p.stride() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    quantizer = QUANTIZERS[kind](model)
    quantizer.setup_optimizer(optimizer)
    for _ in range(2):
        step(model, optimizer, inputs, quantizer)
    assert evaluate_alike(model, restored(_Odd, quantizer), inputs)
    quantizer.detach()
    assert {name: p.stride() for name, p in model.named_parameters()} == strides


@pytest.mark.parametrize("kind", ["diffq", "diffq-rounding"])
def test_bits_that_round_up_to_the_largest(kind):
    """Real bitwidths that round to max_bits, or half to even, are stored and restored exactly."""

    def _make():
        return nn.Linear(5, 4, bias=False)

    model = seeded(_make)
    quantizer = QUANTIZERS[kind](model, min_bits=1, max_bits=15)
    real = torch.tensor([14.6, 14.4, 1.4, 2.5, 3.5])
    quantizers_in(model)[0].logits.copy_(torch.logit((real - 1) / 14))
    assert quantizer.bits()["weight"].tolist() == [15, 14, 1, 2, 4]
    assert same_bits(computed(model.eval()), computed(restored(_make, quantizer)))

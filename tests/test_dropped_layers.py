"""Layers that a step does not use: the size penalty can leave their bits alone."""

import pytest
import torch
from torch import nn

import diffq
from tests.models import QUANTIZERS, seeded

INPUTS = torch.ones(2, 8)


class _Dropped(nn.Module):
    """Two layers, of which a forward uses those that it is told to."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, one=True, two=True):
        x = torch.tanh(self.one(x)) if one else x
        return torch.tanh(self.two(x)) if two else x


class _Run:
    """A training in which layers may be dropped."""

    def __init__(self, kind="diffq", prepare=lambda model: None):
        self.model = seeded(_Dropped)
        prepare(self.model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, 0.01)
        self.quantizer = QUANTIZERS[kind](self.model)
        self.quantizer.setup_optimizer(self.optimizer, lr=0.3)

    def step(self, *uses, skip=True):
        """A step on the sum of some forwards; whether the logits of each layer's weight moved."""
        logits = [self._logits(layer) for layer in ("one", "two")]
        before = [tensor.detach().clone() for tensor in logits]
        self.optimizer.zero_grad()
        for used in uses:
            (self.model(INPUTS, *used).square().mean() + self.quantizer.model_size()).backward()
        if skip:
            self.quantizer.skip_unused()
        self.optimizer.step()
        return [not torch.equal(a, b) for a, b in zip(before, logits, strict=True)]

    def _logits(self, layer):
        return getattr(self.model, layer).parametrizations.weight[0].logits


@pytest.mark.parametrize("kind", ["diffq", "diffq-uniform", "diffq-rounding"])
def test_bits_of_dropped_layers_stay(kind):
    """With skip_unused(), momentum and penalty leave dropped layers alone; others learn on."""
    run = _Run(kind)
    assert run.step((True, True)) == [True, True]
    assert run.step((True, False)) == [True, False]
    assert run.step((False, True)) == [False, True]
    assert run.step((True, True)) == [True, True]


def test_bits_of_dropped_layers_drift_otherwise():
    """Without skip_unused(), the penalty lowers the bits of a dropped layer."""
    run = _Run()
    before = run.quantizer.bits()["two.weight"].float().mean()
    for _ in range(5):
        assert run.step((True, False), skip=False) == [True, True]
    assert run.quantizer.bits()["two.weight"].float().mean() < before


def test_layers_used_in_one_of_several_forwards():
    """A layer that any of the accumulated forwards used counts as used."""
    assert _Run().step((True, False), (True, True)) == [True, True]
    assert _Run().step((True, False), (True, False)) == [True, False]


def test_frozen_weights_count_as_used():
    """The bits of a weight that is not trained are learned all the same."""
    run = _Run(prepare=lambda model: model.two.requires_grad_(False))
    assert run.step((True, True)) == [True, True]


@pytest.mark.parametrize("kind", ["qat", "lsq", "diffq-fixed"])
def test_skipping_where_no_bits_are_learned(kind):
    """Where the size has nothing to learn, the call changes nothing that matters."""
    model = seeded(_Dropped)
    quantizer = QUANTIZERS[kind](model)
    quantizer.no_optimizer()
    model(INPUTS, True, False).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    quantizer.skip_unused()
    assert all(p.grad is grads[name] for name, p in model.named_parameters())


def test_skipping_on_a_changed_model():
    """A layer that was replaced is named."""
    model = seeded(_Dropped)
    quantizer = diffq.DiffQuantizer(model, min_size=0)
    model.two = nn.Identity()
    with pytest.raises(diffq.AttachError, match=r"two\.weight"):
        quantizer.skip_unused()

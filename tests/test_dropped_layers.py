"""Layers that a step leaves out: what the size penalty does to their bits."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import diffq
from tests.holder import bits_of, weight_quantizers


class Dropping(nn.Module):
    """Three residual layers, of which `dropped` says which are left out."""

    def __init__(self, use_reentrant=None):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.dropped = set()
        self.use_reentrant = use_reentrant

    def forward(self, x):
        for place, layer in enumerate(self.layers):
            if place in self.dropped:
                continue
            if self.use_reentrant is None:
                x = x + layer(x)
            else:
                x = x + checkpoint(layer, x, use_reentrant=self.use_reentrant)
        return x


def _trained(dropped, used_only, steps=3, use_reentrant=None):
    torch.manual_seed(0)
    model = Dropping(use_reentrant)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    quantizer = diffq.DiffQuantizer(model, min_size=0, exclude=["bias"])
    quantizer.setup_optimizer(optimizer, lr=0.1)
    logits = [q.logits for q in weight_quantizers(model).values()]
    inputs = torch.randn(4, 8, requires_grad=True)
    model.dropped = set(dropped)
    before = [bits_of(part) for part in logits]
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(inputs).square().mean() + quantizer.model_size(used_only=used_only)
        loss.backward()
        optimizer.step()
    return [bits_of(part) != old for part, old in zip(logits, before, strict=True)]


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_bits_of_unused_layers_do_not_drift(use_reentrant):
    """With used_only, the bits of a layer that no step reads stay as they are, to the bit."""
    assert _trained([1], True, use_reentrant=use_reentrant) == [True, False, True]


def test_the_penalty_is_for_all_layers_by_default():
    """Without used_only, the penalty lowers the bits of every layer, used or not."""
    assert _trained([1], False) == [True, True, True]


def test_used_only_looks_at_the_last_forward():
    """A layer counts as used again in the step that reads it; the size itself is the same."""
    model = Dropping()
    quantizer = diffq.DiffQuantizer(model, min_size=0, exclude=["bias"])
    quantizer.no_optimizer()
    logits = [q.logits for q in weight_quantizers(model).values()]
    for dropped in ([0], [2], []):
        model.dropped = set(dropped)
        model(torch.randn(2, 8))
        size = quantizer.model_size(used_only=True)
        assert size.item() == quantizer.model_size().item()
        grads = torch.autograd.grad(size, logits, allow_unused=True)
        assert [place for place, grad in enumerate(grads) if grad is None] == dropped


def test_nothing_is_used_before_the_first_forward():
    """Before a training forward, no bits get a gradient with used_only."""
    quantizer = diffq.DiffQuantizer(Dropping(), min_size=0)
    assert not quantizer.model_size(used_only=True).requires_grad

"""Errors in a forward or backward, after which everything is as before."""

import pytest
import torch
from torch import nn

from tests.compare import close, same_bits
from tests.models import (
    MODELS,
    SUMS,
    First,
    attached,
    encoder,
    gradients,
    mlp,
    nothing_held,
    snapshot_of,
)


class _Fails(nn.Module):
    """Raises while it is told to."""

    def __init__(self):
        super().__init__()
        self.on = False

    def forward(self, x):
        if self.on:
            raise ArithmeticError("made up")
        return x


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["diffq", "qat", "lsq"])
@pytest.mark.parametrize("position", range(4))
def test_exception_in_forward(position, kind, training):
    """An error at any submodule leaves the weights as they were, and the next call works."""

    def _make():
        return nn.Sequential(
            _Fails(),
            nn.LSTM(16, 16),
            First(),
            _Fails(),
            encoder(),
            _Fails(),
            nn.Linear(16, 4),
            _Fails(),
        )

    model, quantizer = attached(_make, kind)
    model.train(training)
    inputs = torch.randn(3, 2, 16)
    torch.manual_seed(3)
    expected = model(inputs)
    before = snapshot_of(model)
    fails = [module for module in model if isinstance(module, _Fails)][position]
    fails.on = True
    with pytest.raises(ArithmeticError, match="made up"):
        model(inputs)
    fails.on = False
    assert same_bits(snapshot_of(model), before)
    assert nothing_held(model)
    torch.manual_seed(3)
    assert close(model(inputs), expected)
    assert quantizer.true_model_size() > 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["lstm", "gru", "encoder"])
def test_exception_inside_a_repeated_reader(name, training):
    """An error inside a recurrent or attention layer, such as a bad shape, leaves nothing held."""
    make, make_input = MODELS[name]
    model, _ = attached(make)
    model.train(training)
    layer = model.rnn if name != "encoder" else model.layers[0].self_attn
    bad = torch.randn(2, 3, 5)
    with pytest.raises((RuntimeError, AssertionError)):
        layer(bad) if name != "encoder" else layer(bad, bad, bad)
    assert nothing_held(model)
    inputs = make_input()
    assert model(inputs).isfinite().all()
    assert close(model(inputs), model(inputs)) is not training


@pytest.mark.parametrize("prepend", [True, False])
def test_exception_in_a_hook(prepend):
    """An error in another hook of the root leaves no forward counted."""
    model, _ = attached(mlp)

    def _failing(*_):
        raise ArithmeticError("made up")

    for register in (model.register_forward_pre_hook, model.register_forward_hook):
        handle = register(_failing, prepend=prepend)
        with pytest.raises(ArithmeticError):
            model(torch.randn(3, 16))
        handle.remove()
        assert nothing_held(model)
    assert model(torch.randn(3, 16)).isfinite().all()


def test_exception_in_backward():
    """An error in a backward leaves the next step as it would have been."""
    grads = []
    for fails in (False, True):
        model, _ = attached(mlp)
        inputs = torch.ones(3, 16)
        if fails:
            outputs = model(inputs)
            outputs.register_hook(lambda grad: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                outputs.sum().backward()
        torch.manual_seed(2)
        model(inputs).sum().backward()
        grads.append(gradients(model))
    assert close(*grads, SUMS)

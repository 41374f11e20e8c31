"""Recurrent layers that read their weights one by one while these are computed."""

import pytest
import torch
from torch import nn

from diffq.torch_inside.recurrent import ReadsWeights, keep_weights

KINDS = [nn.RNN, nn.LSTM, nn.GRU]


def _reading(kind):
    """A layer of torch, and one of the same weights whose first is doubled while it computes."""

    class Reading(ReadsWeights, kind):
        computing = False

        def _computes(self):
            return self.computing

        def __getattr__(self, name):
            value = super().__getattr__(name)
            return value * 2 if self.computing and name == "weight_ih_l0" else value

    torch.manual_seed(0)
    plain = kind(3, 4)
    layer = Reading(3, 4)
    layer.load_state_dict(plain.state_dict())
    return plain, layer


@pytest.mark.parametrize("kind", KINDS)
def test_plain_outside(kind):
    """A layer that computes no weights is torch's: its list holds its Parameters."""
    plain, layer = _reading(kind)
    x = torch.ones(2, 3)
    torch.testing.assert_close(layer(x)[0], plain(x)[0])
    assert all(a is b for a, b in zip(layer._flat_weights, layer.parameters(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_reads_computed_weights(kind):
    """A forward uses the computed weights; afterwards the list holds the Parameters again."""
    plain, layer = _reading(kind)
    x = torch.ones(2, 3)
    layer.computing = True
    output = layer(x)[0]
    layer.computing = False
    with torch.no_grad():
        plain.weight_ih_l0.mul_(2)
    torch.testing.assert_close(output, plain(x)[0])
    assert all(a is b for a, b in zip(layer._flat_weights, layer.parameters(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_keep_weights(kind):
    """`keep_weights` takes new Parameters into the list that forwards read."""
    torch.manual_seed(0)
    layer, other = kind(3, 4), kind(3, 4)
    for name, parameter in other.named_parameters():
        layer._parameters[name] = parameter
    keep_weights(layer)
    assert all(a is b for a, b in zip(layer._flat_weights, other.parameters(), strict=True))
    x = torch.ones(2, 3)
    torch.testing.assert_close(layer(x)[0], other(x)[0])

"""Models that another parametrization sits on, such as weight_norm."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import diffq
from tests.compare import close, same_bits
from tests.holder import weight_quantizers
from tests.models import (
    QUANTIZERS,
    computed,
    computed_weight,
    evaluate_alike,
    fingerprint,
    learned,
    seeded,
    snapshot_of,
    step,
)


def _normed():
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(16, 8)), nn.Linear(8, 4))


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_weight_norm_present(kind):
    """Over weight_norm: gradients to its tensors, quantized in eval, gone after detach."""
    model, inputs = seeded(_normed), torch.randn(3, 16)
    before, keys = fingerprint(model), list(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    quantizer = QUANTIZERS[kind](model)
    quantizer.setup_optimizer(optimizer, lr=0.1)
    step(model, optimizer, inputs, quantizer)
    assert all(p.grad is not None and p.grad.any() for _, p in learned(model))
    plain = seeded(lambda: nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4)))
    model.eval()
    diffq.restore_quantized_state(plain, quantizer.get_quantized_state())
    assert evaluate_alike(model, plain, inputs)
    quantizer.detach()
    model.train()
    assert fingerprint(model) == before
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("kind", ["diffq", "diffq-uniform"])
def test_weight_norm_gets_noise(kind):
    """Over weight_norm, training forwards differ from each other and from the plain weight."""
    model = _normed()
    plain = model[0].weight.detach().clone()
    QUANTIZERS[kind](model).no_optimizer()
    one, two = (computed_weight(model, "0.weight").detach() for _ in range(2))
    assert not same_bits(one, two)
    assert not same_bits(one, plain)


def test_weight_norm_in_inference_mode():
    """Over weight_norm, evaluation under torch.inference_mode works."""
    model, inputs = seeded(_normed).eval(), torch.randn(3, 16)
    diffq.QATQuantizer(model, min_size=0, bits=4)
    with torch.no_grad():
        expected, weights = model(inputs), computed(model)
    with torch.inference_mode():
        assert close(model(inputs), expected)
        assert same_bits(computed(model), weights)


def test_weight_norm_baked():
    """detach(quantized=True) replaces the other parametrization by the quantized weight."""
    model, inputs = seeded(_normed).eval(), torch.randn(3, 16)
    quantizer = diffq.QATQuantizer(model, min_size=0, bits=4)
    expected, weight = model(inputs), computed(model)["0.weight"]
    quantizer.detach(quantized=True)
    assert set(model.state_dict()) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert isinstance(model[0].weight, nn.Parameter)
    assert same_bits(model[0].weight, weight)
    assert close(model(inputs), expected)


def test_spectral_norm_is_left_as_it_was():
    """A chain that checks its parametrizations does so again after detach."""
    model = parametrizations.spectral_norm(nn.Linear(8, 8))
    quantizer = diffq.QATQuantizer(model, min_size=0)
    quantizer.detach()
    assert model.parametrizations.weight.unsafe is False
    assert len(model.parametrizations.weight) == 1


def test_plain_checkpoint_of_a_weight_norm_model():
    """A checkpoint from before the quantizer loads where weight_norm is present."""
    checkpoint = snapshot_of(seeded(_normed, 1))
    model = seeded(_normed, 2)
    quantizer = diffq.DiffQuantizer(model, min_size=0)
    model.load_state_dict(checkpoint)
    quantizer.detach()
    assert same_bits(snapshot_of(model), checkpoint)


def test_weight_norm_checkpoint_resumes():
    """The attached model's own checkpoint loads where weight_norm is present."""
    model, other = seeded(_normed, 1), seeded(_normed, 2)
    first, second = (diffq.DiffQuantizer(m, min_size=0) for m in (model, other))
    weight_quantizers(model)["0.weight"].logits.add_(1)
    other.load_state_dict(model.state_dict())
    assert first.true_model_size() == second.true_model_size()
    assert same_bits(snapshot_of(model), snapshot_of(other))

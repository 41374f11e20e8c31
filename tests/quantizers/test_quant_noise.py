"""QuantNoiseQuantizer: p = 0, p = 1, gradients, observers and files."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

import diffq
from diffq.errors import ConfigError
from tests.compare import close, same_bits
from tests.models import (
    MODELS,
    computed_weight,
    evaluate_alike,
    gradients,
    restored,
    seeded,
    snapshot_of,
    step,
)

OBSERVERS = ["min-max", "histogram", "channel"]


def _dropping():
    """A small network with dropout, which any other use of random numbers would change."""
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 8))


def _trained(attach, steps=4, **options):
    """Losses and final weights of a short training of seeded numbers."""
    model = seeded(_dropping)
    quantizer = attach(model, min_size=0, **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    if quantizer is not None:
        quantizer.setup_optimizer(optimizer)
    torch.manual_seed(1)
    losses = [step(model, optimizer, torch.randn(5, 16)) for _ in range(steps)]
    if quantizer is not None:
        quantizer.detach()
    return losses, snapshot_of(model)


def _attach_nothing(model, **options):
    return None


@pytest.mark.parametrize(("observer", "per_channel"), [("min-max", False), ("channel", True)])
def test_rate_one_is_qat(observer, per_channel):
    """With p=1, losses and weights of several steps are QATQuantizer's, dropout included."""
    noise = _trained(diffq.QuantNoiseQuantizer, bits=3, p=1, observer=observer)
    qat = _trained(diffq.QATQuantizer, bits=3, per_channel=per_channel)
    assert close(noise, qat)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_rate_zero_is_plain_training(observer):
    """With p=0, losses and weights of several steps equal those without a quantizer."""
    noise = _trained(diffq.QuantNoiseQuantizer, bits=2, p=0, observer=observer)
    plain = _trained(_attach_nothing)
    assert close(noise, plain)


def _computed(layer):
    """The weight that a layer computes with in its mode, without graph."""
    return computed_weight(layer, "weight").detach()


def _noisy(p, **options):
    layer = nn.Linear(64, 48)
    original = layer.weight
    diffq.QuantNoiseQuantizer(layer, min_size=0, include=["weight"], bits=3, p=p, **options)
    return layer, original


@pytest.mark.parametrize("observer", OBSERVERS)
def test_each_weight_is_exact_or_quantized(observer):
    """A training weight is the stored one, or with probability p what eval computes with."""
    layer, original = _noisy(0.3, observer=observer)
    quantized = _computed(layer.eval())
    noisy = _computed(layer.train())
    exact, rounded = noisy == original, noisy == quantized
    assert (exact | rounded).all()
    # 3072 draws: the share is known to 0.008.
    assert abs(rounded.double().mean() - 0.3) < 0.04


def test_blocks_are_quantized_together():
    """With block_size, whole blocks of consecutive weights are exact or quantized."""
    layer, original = _noisy(0.5, block_size=8)
    quantized = _computed(layer.eval()).view(-1, 8)
    noisy, original = _computed(layer.train()).view(-1, 8), original.detach().view(-1, 8)
    exact, rounded = (noisy == original).all(1), (noisy == quantized).all(1)
    assert (exact | rounded).all()
    assert 0.4 < rounded.double().mean() < 0.6


def test_each_forward_draws_anew():
    """Two forwards quantize different weights, and every weight is exact in some forward."""

    class Seen(nn.Linear):
        def forward(self, x):
            seen.append(self.weight.detach())
            return super().forward(x)

    seen, layer = [], Seen(64, 48)
    diffq.QuantNoiseQuantizer(layer, min_size=0, bits=3, p=0.5)
    for _ in range(24):
        layer(torch.randn(2, 64))
    exact = torch.stack(seen) == layer.weight
    assert exact.any(0).all()
    assert not any(map(torch.equal, exact, exact[1:]))


@pytest.mark.parametrize("observer", OBSERVERS)
def test_gradients_are_unmodified(observer):
    """The gradient of the stored weight is that of the noisy one, for all weights (Equation 8)."""
    layer, original = _noisy(0.5, observer=observer)
    x = torch.randn(5, 64)
    torch.manual_seed(4)
    layer(x).square().sum().backward()
    torch.manual_seed(4)
    plain = _computed(layer).requires_grad_()
    torch.nn.functional.linear(x, plain, layer.bias).square().sum().backward()
    assert close(original.grad, plain.grad)


def test_nothing_of_the_weight_is_lost():
    """The stored weight never changes in forwards, in training or eval."""
    layer, original = _noisy(0.5)
    before = original.detach().clone()
    for mode in (True, False, True):
        layer.train(mode)(torch.randn(2, 64))
    assert same_bits(original, before)


@pytest.mark.parametrize("name", ["tied-head", "lstm", "encoder", "conv"])
def test_trained_models_come_back(name):
    """After some steps, the state restores what eval computes, for each kind of model."""
    make, inputs = MODELS[name]
    model = make()
    quantizer = diffq.QuantNoiseQuantizer(model, bits=4, p=0.5, observer="histogram", min_size=0)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    quantizer.setup_optimizer(optimizer)
    for _ in range(2):
        step(model, optimizer, inputs())
    assert evaluate_alike(model, restored(make, quantizer), inputs())


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("bits", [1, 4, 8, 15])
def test_files_hold_what_eval_computes(observer, bits, tmp_path):
    """A file gives back the eval weights bit for bit, at every bitwidth and observer."""
    model = _dropping()
    quantizer = diffq.QuantNoiseQuantizer(model, bits=bits, observer=observer, min_size=0)
    diffq.save(quantizer, tmp_path / "model.diffq")
    loaded = diffq.load(tmp_path / "model.diffq")
    model.eval()
    for name in ("0", "3"):
        weight = computed_weight(model, f"{name}.weight")
        assert same_bits(loaded[f"{name}.weight"], weight.detach())


@pytest.mark.parametrize("observer", OBSERVERS)
def test_memory_formats(observer):
    """Weights in channels_last or transposed are quantized as their contiguous copies are."""
    weight = torch.randn(8, 6, 3, 3)
    values = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        conv = nn.Conv2d(6, 8, 3).to(memory_format=memory_format)
        with torch.no_grad():
            conv.weight.copy_(weight)
        options = {"bits": 3, "p": 0.5, "min_size": 0, "observer": observer}
        quantizer = diffq.QuantNoiseQuantizer(conv, **options)
        torch.manual_seed(1)
        values.append((_computed(conv.train()), _computed(conv.eval())))
        state = quantizer.get_quantized_state()
        plain = diffq.restore_quantized_state(nn.Conv2d(6, 8, 3), state)
        assert same_bits(plain.weight.detach(), _computed(conv))
    assert all(same_bits(a, b) for a, b in zip(*values, strict=True))


def test_histogram_is_nearer_than_min_max():
    """With an outlier, the quantized weights are much nearer with the fitted range."""
    plain = nn.Linear(64, 64)
    with torch.no_grad():
        plain.weight[0, 0] = 5.0
    errors = {}
    for observer in OBSERVERS:
        layer = copy.deepcopy(plain)
        diffq.QuantNoiseQuantizer(layer, min_size=0, bits=3, observer=observer)
        errors[observer] = (_computed(layer.eval()) - plain.weight).square().mean()
    assert errors["channel"] < errors["min-max"] / 4
    # The outlier itself is clamped, so what is left is most of all its own error.
    assert errors["histogram"] < errors["min-max"] / 2


def test_histogram_costs_what_min_max_costs():
    """A fitted range is stored as the range of the tensor, so that sizes are equal."""
    sizes = [
        diffq.QuantNoiseQuantizer(_dropping(), min_size=0, observer=observer).true_model_size()
        for observer in OBSERVERS
    ]
    assert sizes[0] == sizes[1] < sizes[2]


def test_finetuning_keeps_the_model():
    """Attaching to a trained model changes nothing until it trains: eval is its quantized self."""
    model = _dropping()
    x = torch.randn(5, 16)
    qat = copy.deepcopy(model)
    diffq.QATQuantizer(qat, bits=4, min_size=0)
    diffq.QuantNoiseQuantizer(model, bits=4, min_size=0)
    assert evaluate_alike(model, qat, x)


def test_gradient_accumulation_uses_each_forwards_mask():
    """Two forwards before one backward each use their own mask in both directions."""
    model = seeded(_dropping)
    quantizer = diffq.QuantNoiseQuantizer(model, bits=2, p=0.5, min_size=0)
    model[2].p = 0.0
    x, y = torch.randn(2, 5, 16)
    separate = []
    for inputs in (x, y):
        torch.manual_seed(int(inputs is y))
        model.zero_grad()
        model(inputs).square().sum().backward()
        separate.append(gradients(model))
    model.zero_grad()
    losses = []
    for inputs in (x, y):
        torch.manual_seed(int(inputs is y))
        losses.append(model(inputs).square().sum())
    sum(losses).backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, separate[0][name] + separate[1][name])
    assert quantizer.mean_bits() == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 1.1}, "p must be a number, from 0 to 1, got 1.1"),
        ({"p": True}, "p must be a number"),
        ({"bits": 0}, "bits must be a whole number from 1 to 15, got 0"),
        ({"observer": "mean"}, "observer must be one of min-max, histogram, channel, got 'mean'"),
        ({"block_size": 0}, "block_size must be a whole number from 1, got 0"),
        ({"overrides": {"0.weight": {"group_size": 8}}}, "may set bits, block_size, observer, p"),
    ],
)
def test_wrong_settings(options, message):
    """A setting out of range is refused, and the model stays plain."""
    model = _dropping()
    with pytest.raises(ConfigError, match=message):
        diffq.QuantNoiseQuantizer(model, **{"min_size": 0, **options})
    assert type(model[0]) is nn.Linear


def test_overrides():
    """Settings of single tensors, the rate included, can differ."""
    model = _dropping()
    make = partial(diffq.QuantNoiseQuantizer, model, min_size=0, bits=2, p=1)
    quantizer = make(overrides={"0.weight": {"p": 0, "bits": 5, "observer": "channel"}})
    assert same_bits(computed_weight(model, "0.weight").detach(), model[0].weight.detach())
    assert not same_bits(computed_weight(model, "3.weight").detach(), model[3].weight.detach())
    assert set(quantizer.bits()["0.weight"].tolist()) == {5}

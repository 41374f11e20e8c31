"""Training and evaluation of many kinds of modules."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diffq
from diffq.attach.attachment import attachment_of
from diffq.quantizers.diffq import NoisyBatch
from tests.compare import close, same_bits
from tests.models import (
    QUANTIZERS,
    ConvNet,
    Recurrent,
    attached,
    computed,
    encoder,
    evaluate_alike,
    gradients,
    mlp,
    nothing_held,
    restored,
    seeded,
    snapshot_of,
    step,
    tokens,
)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize(
    "options",
    [
        {"bidirectional": True},
        {"num_layers": 3},
        {"num_layers": 2, "bidirectional": True, "dropout": 0.5},
        {"bias": False},
        {"proj_size": 4},
    ],
    ids=["bidirectional", "deep", "dropout", "no-bias", "projected"],
)
def test_recurrent_layers(kind, options):
    """Recurrent layers of all forms: gradients everywhere, eval as restored, also for one step."""
    if kind is nn.GRU and "proj_size" in options:
        kind = nn.RNN
        options = {"nonlinearity": "relu"}
    make = partial(Recurrent, kind, **options)
    model, quantizer = attached(make)
    inputs = tokens()
    for _ in range(2):
        (model(inputs).square().mean() + quantizer.model_size()).backward()
    assert all(grad is not None and grad.any() for grad in gradients(model).values())
    fresh = restored(make, quantizer)
    for _ in range(2):
        assert evaluate_alike(model, fresh, inputs)
    assert nothing_held(model)


def test_recurrent_layer_reads_each_weight_once(monkeypatch):
    """In one training forward, a recurrent layer computes each noisy weight once."""
    model, _ = attached(Recurrent)
    connected, connect = [], NoisyBatch.connect

    def _counting(batch, weights, *args):
        connected.extend(map(id, weights))
        return connect(batch, weights, *args)

    monkeypatch.setattr(NoisyBatch, "connect", _counting)
    model(tokens())
    assert len(connected) == len(attachment_of(model).quantizers) == len(set(connected))


@pytest.mark.parametrize("kdim", [None, 6])
@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention(kdim, need_weights):
    """Attention trains all its weights, and evaluates as the restored layer, also when fast."""
    make = partial(nn.MultiheadAttention, 16, 4, batch_first=True, kdim=kdim, vdim=kdim)
    model, quantizer = attached(make)
    query = torch.randn(2, 5, 16)
    key = query if kdim is None else torch.randn(2, 7, kdim)
    model(query, key, key, need_weights=need_weights)[0].square().sum().backward()
    grads = gradients(model)
    assert all(grad is not None for grad in grads.values())
    assert all(grad.any() for name, grad in grads.items() if "bias" not in name)
    fresh = restored(make, quantizer)
    for _ in range(2):
        assert evaluate_alike(model, fresh, query, key, key, need_weights=need_weights)
    assert nothing_held(model)


@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_takes_its_fast_path(monkeypatch, norm_first):
    """An attached encoder in eval mode runs torch's fast kernel, and equals the restored one."""
    make = partial(encoder, norm_first)
    model, quantizer = attached(make)
    inputs = torch.randn(2, 5, 16)
    model(inputs).square().sum().backward()
    fresh = restored(make, quantizer)
    model.eval()
    fast, calls = torch._transformer_encoder_layer_fwd, []

    def _counting(*args):
        calls.append(args)
        return fast(*args)

    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", _counting)
    assert evaluate_alike(model, fresh, inputs)
    assert len(calls) == 4


def test_encoder_with_padding():
    """An attached encoder with nested tensors and a padding mask equals the restored one."""

    def _make():
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        return nn.TransformerEncoder(layer, 2)

    model, quantizer = attached(_make)
    inputs, mask = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    fresh = restored(_make, quantizer)
    assert evaluate_alike(model, fresh, inputs, src_key_padding_mask=mask)


def test_batchnorm_statistics_are_stored():
    """BatchNorm's running statistics move in training, and are restored bit for bit."""
    model, quantizer = attached(ConvNet)
    for _ in range(3):
        model(torch.randn(4, 3, 8, 8))
    fresh = restored(ConvNet, quantizer)
    assert fresh.norm.num_batches_tracked == 3
    assert same_bits(fresh.norm.running_var, model.norm.running_var)
    assert not same_bits(fresh.norm.running_var, ConvNet().norm.running_var)


@pytest.mark.parametrize("kind", ["diffq", "qat", "qat-channel", "lsq"])
def test_channels_last(kind):
    """A channels_last model trains, and evaluates to the values of the plain layout."""
    model, quantizer = attached(ConvNet, kind)
    inputs = torch.randn(4, 3, 8, 8)
    expected = model.eval()(inputs)
    model.to(memory_format=torch.channels_last)
    outputs = model(inputs.to(memory_format=torch.channels_last))
    assert close(outputs, expected)
    weight = computed(model)["down.weight"]
    assert same_bits(weight, restored(ConvNet, quantizer).down.weight)
    model.train()(inputs).sum().backward()
    assert all(grad is not None for grad in gradients(model).values())


def test_frozen_weights():
    """With requires_grad=False on a weight, its bits are still learned, and it stays put."""
    model = seeded(mlp)
    model[0].requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.1)
    quantizer = QUANTIZERS["diffq"](model)
    quantizer.setup_optimizer(optimizer, lr=0.5)
    before, bits = snapshot_of(model), quantizer.bits()
    for _ in range(5):
        step(model, optimizer, torch.randn(3, 16), quantizer, lam=10)
    key = "0.weight"
    assert same_bits(model.state_dict()[key], before[key])
    assert not same_bits(quantizer.bits()["0.weight"], bits["0.weight"])
    assert model[0].weight.grad is None


def test_unused_layer_keeps_its_bits():
    """A layer that no forward uses keeps bits and weights, with the size penalty and without."""
    model = seeded(lambda: nn.ModuleDict({"used": nn.Linear(16, 8), "unused": nn.Linear(16, 8)}))
    model.forward = lambda x: model["used"](x)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    quantizer = QUANTIZERS["diffq"](model)
    quantizer.setup_optimizer(optimizer, lr=0.1)
    before = snapshot_of(model["unused"])
    for penalised in (None, quantizer, None, quantizer):
        step(model, optimizer, torch.randn(3, 16), penalised)
    assert same_bits(snapshot_of(model["unused"]), before)


@pytest.mark.parametrize("kind", ["diffq", "qat", "lsq"])
def test_nothing_to_quantize(kind):
    """Where no tensor is above min_size, everything works and changes nothing."""
    plain, model = seeded(mlp), seeded(mlp)
    inputs = torch.randn(3, 16)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (plain, model)]
    quantizer = QUANTIZERS[kind](model, min_size=1)
    quantizer.setup_optimizer(optimizers[1])
    assert len(optimizers[1].param_groups) == 1
    step(plain, optimizers[0], inputs)
    step(model, optimizers[1], inputs, quantizer)
    assert close(dict(model.named_parameters()), dict(plain.named_parameters()))
    size = sum(p.numel() for p in model.parameters()) * 4 / 2**20
    assert quantizer.true_model_size() == size
    assert quantizer.model_size().item() == pytest.approx(size)
    assert quantizer.bits() == {}
    assert repr(quantizer.mean_bits()) == "nan"
    assert "total" in repr(quantizer)
    assert evaluate_alike(model, restored(mlp, quantizer), inputs)
    assert quantizer.detach(quantized=True) is model


def test_model_without_parameters():
    """A model without any parameter takes a quantizer, of size zero."""
    model = nn.ReLU()
    quantizer = diffq.DiffQuantizer(model, min_size=0)
    assert quantizer.true_model_size() == 0
    assert quantizer.model_size().item() == 0
    assert close(model(torch.ones(2)), torch.ones(2))


# Weights that are the same object in every forward


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_weights_without_gradient(kind):
    """A frozen recurrent layer evaluates again and again with gradients enabled."""
    model, inputs = seeded(lambda: Recurrent(kind)).requires_grad_(False).eval(), tokens()
    diffq.QATQuantizer(model, min_size=0)
    assert close(model(inputs), model(inputs))


@pytest.mark.parametrize(
    "options",
    [{"min_size": 0, "training": False}, {"min_size": 1, "float16": True}],
    ids=["post-training", "float16"],
)
def test_recurrent_weights_that_training_leaves_alone(options):
    """A recurrent layer whose weights are plain in training trains for more than one step."""
    model, inputs = seeded(Recurrent), tokens()
    quantizer = diffq.QATQuantizer(model, **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = snapshot_of(model)
    for _ in range(2):
        step(model, optimizer, inputs, quantizer)
    after = dict(model.named_parameters())
    assert not any(same_bits(before[name], value) for name, value in after.items())


def test_lsq_learns_from_zero():
    """LSQ trains a tensor that was all zero when the quantizer was made."""
    model = nn.Linear(8, 8)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    quantizer = diffq.LSQQuantizer(model, min_size=0)
    quantizer.setup_optimizer(optimizer, lr=0.01)
    inputs, targets = torch.randn(16, 8), torch.randn(16, 8)
    for _ in range(20):
        optimizer.zero_grad()
        F.mse_loss(model(inputs), targets).backward()
        optimizer.step()
    assert model.eval().weight.count_nonzero() > 32


@pytest.mark.parametrize(
    ("make", "make_input"), [(Recurrent, tokens), (encoder, lambda: torch.randn(3, 7, 16))]
)
def test_held_weights_are_no_parameters_of_their_quantizer(make, make_input):
    """Weights that a forward holds as they are do not end up among the quantizer's parameters."""
    model = seeded(make)
    quantizer = diffq.QATQuantizer(model, min_size=0, training=False)
    names = list(model.state_dict())
    model(make_input())
    assert list(model.state_dict()) == names
    assert list(quantizer.learned_parameters()) == []
    assert all("_held" not in q._parameters for q in model.modules())

"""Training and evaluation of many kinds of modules, and of what PyTorch does around them."""

import shutil
import sys
import threading
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import diffq
from diffq import attach
from tests.models import (
    MODELS,
    QUANTIZERS,
    ConvNet,
    Recurrent,
    SharedModule,
    TiedHead,
    TiedModules,
    encoder,
    gradients,
    mlp,
    restored,
    same_tensors,
    seeded,
    snapshot_of,
    step,
    tokens,
)

RANDOM = ["diffq", "diffq-uniform"]


def _attached(make, kind="diffq", **options):
    """A seeded model and its quantizer, which may train without an optimizer."""
    model = seeded(make)
    quantizer = QUANTIZERS[kind](model, **options)
    quantizer.no_optimizer()
    return model, quantizer


def _same_gradients(one, other):
    return one.keys() == other.keys() and all(
        (a is None and b is None) or torch.equal(a, b)
        for a, b in zip(one.values(), other.values(), strict=True)
    )


def _nothing_held(model):
    quantizers = attach.quantizers_in(model)
    return bool(quantizers) and all(
        q._held is None and q.forward_state.depth == 0 for q in quantizers
    )


# Noise


@pytest.mark.parametrize("kind", RANDOM)
@pytest.mark.parametrize("name", MODELS)
def test_training_forwards_differ_and_eval_forwards_do_not(name, kind):
    """Each training forward has its own noise; eval forwards have none."""
    make, make_input = MODELS[name]
    model, _ = _attached(make, kind)
    inputs = make_input()
    assert not torch.equal(model(inputs), model(inputs))
    model.eval()
    assert torch.equal(model(inputs), model(inputs))


@pytest.mark.parametrize("kind", RANDOM)
@pytest.mark.parametrize("name", MODELS)
def test_a_seed_fixes_the_noise(name, kind):
    """The noise comes from torch's generator alone."""
    make, make_input = MODELS[name]
    model, _ = _attached(make, kind)
    inputs, outputs = make_input(), []
    for _ in range(2):
        model.load_state_dict(seeded(make).state_dict())
        torch.manual_seed(7)
        outputs.append(model(inputs))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("kind", ["diffq-rounding", "qat", "lsq"])
@pytest.mark.parametrize("name", ["mlp", "lstm", "encoder"])
def test_rounding_trains_on_the_eval_weights(name, kind):
    """Without random noise, training computes with the weights that eval computes with."""
    make, make_input = MODELS[name]
    model, _ = _attached(make, kind)
    inputs = make_input()
    trained = model(inputs)
    assert torch.allclose(trained, model.eval()(inputs), atol=1e-5)


@pytest.mark.parametrize("kind", RANDOM)
def test_one_sample_per_forward(kind):
    """All reads of a tensor within one forward of the root see one sample."""
    seen = []

    class _Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x):
            first, second = self.linear(x), self.linear(x)
            seen.append((first, second, self.linear.weight, self.linear.weight))
            return first + second

    model, _ = _attached(_Twice, kind)
    model(torch.randn(3, 16))
    model(torch.randn(3, 16))
    for first, second, weight, again in seen:
        assert torch.equal(first, second)
        assert torch.equal(weight, again)
    assert not torch.equal(seen[0][2], seen[1][2])


@pytest.mark.parametrize("kind", RANDOM)
@pytest.mark.parametrize("make", [TiedModules, SharedModule])
def test_ties_see_one_sample(make, kind):
    """Both places of a tied tensor compute with the same noisy weight."""
    model, _ = _attached(make, kind)
    seen = []
    names = ("embed", "head") if make is TiedModules else ("first", "second")
    model.register_forward_hook(
        lambda *_: seen.extend(getattr(model, name).weight for name in names), prepend=True
    )
    model(tokens() if make is TiedModules else torch.randn(3, 16))
    assert torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("kind", RANDOM)
def test_weight_read_outside_its_module(kind):
    """A head that reads the embedding's weight gets the noisy one, then the quantized one."""
    model, quantizer = _attached(TiedHead, kind)
    chain, seen = model.embed.parametrizations.weight, []
    original = F.linear

    def _linear(x, weight, *rest):
        seen.append(weight.detach().clone())
        return original(x, weight, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "linear", _linear)
        model(tokens()).sum().backward()
        assert not torch.equal(seen[-1], chain.original)
        assert chain[0].logits.grad.any()
        model.eval()(tokens())
    assert torch.equal(seen[-1], restored(TiedHead, quantizer).embed.weight)


def test_submodule_called_directly():
    """A submodule called without its root has noise in training and is quantized in eval."""
    model, quantizer = _attached(mlp)
    inputs = torch.randn(3, 16)
    assert not torch.equal(model[0](inputs), model[0](inputs))
    model[0](inputs).sum().backward()
    assert model[0].parametrizations.weight[0].logits.grad.any()
    assert torch.equal(model.eval()[0](inputs), restored(mlp, quantizer)[0](inputs))


def test_submodule_has_its_own_noise_after_a_root_forward():
    """A direct call after a forward of the root does not use that forward's sample again."""
    model, _ = _attached(mlp)
    inputs = torch.randn(3, 16)
    model(inputs)
    assert not torch.equal(model[0](inputs), model[0](inputs))


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
    model, quantizer = _attached(make)
    inputs = tokens()
    for _ in range(2):
        (model(inputs).square().mean() + quantizer.model_size()).backward()
    assert all(grad is not None and grad.any() for grad in gradients(model).values())
    with torch.no_grad():
        expected = model.eval()(inputs)
        assert torch.equal(restored(make, quantizer)(inputs), expected)
        assert torch.equal(model(inputs), expected)
    assert _nothing_held(model)


def test_recurrent_layer_reads_each_weight_once():
    """In one training forward, a recurrent layer computes each noisy weight once."""
    model, _ = _attached(Recurrent)
    counts = {}
    for quantizer in attach.quantizers_in(model):
        train_weight = quantizer.train_weight

        def _counting(*args, name=quantizer.plan.name, train_weight=train_weight):
            counts[name] = counts.get(name, 0) + 1
            return train_weight(*args)

        quantizer.train_weight = _counting
    model(tokens())
    assert set(counts.values()) == {1}


@pytest.mark.parametrize("kdim", [None, 6])
@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention(kdim, need_weights):
    """Attention trains all its weights, and evaluates as the restored layer, also when fast."""
    make = partial(nn.MultiheadAttention, 16, 4, batch_first=True, kdim=kdim, vdim=kdim)
    model, quantizer = _attached(make)
    query = torch.randn(2, 5, 16)
    key = query if kdim is None else torch.randn(2, 7, kdim)
    model(query, key, key, need_weights=need_weights)[0].square().sum().backward()
    grads = gradients(model)
    assert all(grad is not None for grad in grads.values())
    assert all(grad.any() for name, grad in grads.items() if "bias" not in name)
    fresh = restored(make, quantizer)
    model.eval()
    with torch.no_grad():
        for _ in range(2):
            outputs = model(query, key, key, need_weights=need_weights)
            expected = fresh(query, key, key, need_weights=need_weights)
            assert torch.equal(outputs[0], expected[0])
    assert _nothing_held(model)


@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_takes_its_fast_path(monkeypatch, norm_first):
    """An attached encoder in eval mode runs torch's fast kernel, and equals the restored one."""
    make = partial(encoder, norm_first)
    model, quantizer = _attached(make)
    inputs = torch.randn(2, 5, 16)
    model(inputs).square().sum().backward()
    fresh = restored(make, quantizer)
    model.eval()
    fast, calls = torch._transformer_encoder_layer_fwd, []

    def _counting(*args):
        calls.append(args)
        return fast(*args)

    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", _counting)
    with torch.no_grad():
        expected = fresh(inputs)
        assert len(calls) == 2
        assert torch.equal(model(inputs), expected)
        assert len(calls) == 4


def test_encoder_with_padding():
    """An attached encoder with nested tensors and a padding mask equals the restored one."""

    def _make():
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        return nn.TransformerEncoder(layer, 2)

    model, quantizer = _attached(_make)
    inputs, mask = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    fresh = restored(_make, quantizer)
    model.eval()
    with torch.no_grad():
        expected = fresh(inputs, src_key_padding_mask=mask)
        assert torch.equal(model(inputs, src_key_padding_mask=mask), expected)


def test_batchnorm_statistics_are_stored():
    """BatchNorm's running statistics move in training, and are restored bit for bit."""
    model, quantizer = _attached(ConvNet)
    for _ in range(3):
        model(torch.randn(4, 3, 8, 8))
    fresh = restored(ConvNet, quantizer)
    assert fresh.norm.num_batches_tracked == 3
    assert torch.equal(fresh.norm.running_var, model.norm.running_var)
    assert not torch.equal(fresh.norm.running_var, ConvNet().norm.running_var)


@pytest.mark.parametrize("kind", ["diffq", "qat", "qat-channel", "lsq"])
def test_channels_last(kind):
    """A channels_last model trains, and evaluates to the values of the plain layout."""
    model, quantizer = _attached(ConvNet, kind)
    inputs = torch.randn(4, 3, 8, 8)
    expected = model.eval()(inputs)
    model.to(memory_format=torch.channels_last)
    outputs = model(inputs.to(memory_format=torch.channels_last))
    assert torch.allclose(outputs, expected, atol=1e-5)
    assert torch.equal(model.down.weight, restored(ConvNet, quantizer).down.weight)
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
    key = "0.parametrizations.weight.original"
    assert torch.equal(model.state_dict()[key], before[key])
    assert not torch.equal(quantizer.bits()["0.weight"], bits["0.weight"])
    assert model[0].parametrizations.weight.original.grad is None


def test_unused_layer_keeps_its_bits():
    """A layer that no forward uses keeps bits and weights while the size penalty is off."""
    model = seeded(lambda: nn.ModuleDict({"used": nn.Linear(16, 8), "unused": nn.Linear(16, 8)}))
    model.forward = lambda x: model["used"](x)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    quantizer = QUANTIZERS["diffq"](model)
    quantizer.setup_optimizer(optimizer, lr=0.1)
    before = snapshot_of(model["unused"])
    for _ in range(3):
        step(model, optimizer, torch.randn(3, 16))
    assert same_tensors(snapshot_of(model["unused"]), before)
    step(model, optimizer, torch.randn(3, 16), quantizer)
    assert not same_tensors(snapshot_of(model["unused"]), before)


@pytest.mark.parametrize("kind", ["diffq", "qat", "lsq"])
def test_nothing_to_quantize(kind):
    """Where no tensor is above min_size, everything works and changes nothing."""
    plain, model = seeded(mlp), seeded(mlp)
    inputs = torch.randn(3, 16)
    optimizers = [torch.optim.Adam(m.parameters(), 0.1) for m in (plain, model)]
    quantizer = QUANTIZERS[kind](model, min_size=1)
    quantizer.setup_optimizer(optimizers[1])
    assert len(optimizers[1].param_groups) == 1
    step(plain, optimizers[0], inputs)
    step(model, optimizers[1], inputs, quantizer)
    assert same_tensors(snapshot_of(model), snapshot_of(plain))
    size = sum(p.numel() for p in model.parameters()) * 4 / 2**20
    assert quantizer.true_model_size() == size
    assert quantizer.model_size().item() == pytest.approx(size)
    assert quantizer.bits() == {}
    assert repr(quantizer.mean_bits()) == "nan"
    assert "total" in repr(quantizer)
    assert torch.equal(model.eval()(inputs), restored(mlp, quantizer)(inputs))
    assert quantizer.detach(quantized=True) is model


def test_model_without_parameters():
    """A model without any parameter takes a quantizer, of size zero."""
    model = nn.ReLU()
    quantizer = diffq.DiffQuantizer(model, min_size=0)
    assert quantizer.true_model_size() == 0
    assert quantizer.model_size().item() == 0
    assert torch.equal(model(torch.ones(2)), torch.ones(2))


# Backward


class _First(nn.Module):
    """The output of a recurrent layer without its state."""

    def forward(self, pair):
        return pair[0]


def _checkpointed(make, use_reentrant):
    """A root whose forward runs `make`'s module under activation checkpointing."""

    class _Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(16, 16)
            self.body = make()

        def forward(self, x):
            x = self.first(x)
            if use_reentrant is None:
                return self.body(x)
            return checkpoint(self.body, x, use_reentrant=use_reentrant)

    return _Root


class _Attention(nn.Module):
    """Self-attention."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


def _lstm():
    return nn.Sequential(nn.LSTM(16, 8, 2, batch_first=True), _First(), nn.Linear(8, 4))


def _gru():
    return nn.Sequential(nn.GRU(16, 8, 2, batch_first=True), _First(), nn.Linear(8, 4))


def _convolution():
    return nn.Sequential(nn.Conv1d(5, 4, 3), nn.Flatten(), nn.Linear(56, 3))


def _checkpointed_gradients(make, use_reentrant, kind, backward):
    model, _ = _attached(_checkpointed(make, use_reentrant), kind)
    inputs = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    backward(model, inputs)
    return gradients(model)


def _one_forward(model, inputs):
    model(inputs).square().mean().backward()


def _accumulated(model, inputs):
    for part in (inputs, 2 * inputs):
        _one_forward(model, part)


def _evaluated_between(model, inputs):
    loss = model(inputs).square().mean()
    with torch.no_grad():
        model.eval()(inputs)
    model.train()
    loss.backward()


def _two_forwards(model, inputs):
    (model(inputs).square().mean() + model(2 * inputs).square().mean()).backward()


def _two_forwards_two_backwards(model, inputs):
    losses = [model(part).square().mean() for part in (inputs, 2 * inputs)]
    for loss in losses:
        loss.backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("make", [mlp, _Attention, _convolution])
@pytest.mark.parametrize("kind", ["diffq", "diffq-uniform", "diffq-rounding", "qat", "lsq"])
@pytest.mark.parametrize("backward", [_one_forward, _accumulated, _evaluated_between])
def test_activation_checkpointing(make, use_reentrant, kind, backward):
    """Gradients with activation checkpointing are bit-equal to those without."""
    plain = _checkpointed_gradients(make, None, kind, backward)
    assert all(grad is not None for grad in plain.values())
    assert _same_gradients(_checkpointed_gradients(make, use_reentrant, kind, backward), plain)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("make", [mlp, _Attention, _gru])
@pytest.mark.parametrize("kind", [*RANDOM, "diffq-rounding"])
@pytest.mark.parametrize("backward", [_two_forwards, _two_forwards_two_backwards])
def test_activation_checkpointing_of_two_forwards(make, use_reentrant, kind, backward):
    """Two checkpointed forwards before a backward are each recomputed with their own noise."""
    plain = _checkpointed_gradients(make, None, kind, backward)
    recomputed = _checkpointed_gradients(make, use_reentrant, kind, backward)
    # Not bit-equal: the order of the sum over both forwards differs, in plain models too.
    assert all(torch.allclose(recomputed[n], plain[n], rtol=1e-3, atol=1e-7) for n in plain)


@pytest.mark.parametrize("make", [_lstm, _gru])
def test_activation_checkpointing_of_recurrent_layers(make):
    """Recurrent layers have bit-equal gradients with use_reentrant=False, and close ones with True.

    torch chooses other kernels where a weight needs no gradient, and these round differently.
    """
    plain, exact, close = (
        _checkpointed_gradients(make, mode, "diffq", _accumulated) for mode in (None, False, True)
    )
    assert _same_gradients(plain, exact)
    assert all(torch.allclose(close[n], plain[n], rtol=1e-3, atol=1e-7) for n in plain)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_root(use_reentrant):
    """A root that is itself called under checkpointing gives bit-equal gradients."""
    grads = []
    for checkpointed in (False, True):
        model, _ = _attached(mlp)
        inputs = torch.ones(3, 16, requires_grad=True)
        torch.manual_seed(2)
        if checkpointed:
            outputs = checkpoint(model, inputs, use_reentrant=use_reentrant)
        else:
            outputs = model(inputs)
        outputs.square().mean().backward()
        grads.append(gradients(model))
    assert _same_gradients(*grads)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_submodule_without_root(use_reentrant):
    """A submodule called under checkpointing without its root gives bit-equal gradients."""
    grads = []
    for checkpointed in (False, True):
        model, _ = _attached(mlp)
        inputs = torch.ones(3, 16, requires_grad=True)
        model(inputs)
        torch.manual_seed(2)
        if checkpointed:
            outputs = checkpoint(model[0], inputs, use_reentrant=use_reentrant)
        else:
            outputs = model[0](inputs)
        outputs.square().mean().backward()
        grads.append(gradients(model))
    assert _same_gradients(*grads)


def test_two_forwards_before_one_backward():
    """The gradient of a sum of two losses is the sum of the gradients, each with its noise."""
    inputs = torch.randn(2, 3, 16)
    joint, _ = _attached(mlp)
    torch.manual_seed(4)
    (joint(inputs[0]).square().sum() + joint(inputs[1]).square().sum()).backward()
    single, _ = _attached(mlp)
    torch.manual_seed(4)
    for part in inputs:
        single(part).square().sum().backward()
    for name, grad in gradients(joint).items():
        assert torch.allclose(grad, gradients(single)[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("kind", ["diffq", "diffq-rounding", "qat", "lsq"])
def test_gradient_in_eval_mode(kind):
    """In eval mode the gradient passes straight through to the weights, and to nothing else."""
    model, quantizer = _attached(mlp, kind)
    fresh = restored(mlp, quantizer).requires_grad_(True)
    inputs = torch.randn(3, 16)
    model.eval()(inputs).square().sum().backward()
    fresh(inputs).square().sum().backward()
    for name, parameter in fresh.named_parameters():
        module, _, attribute = name.partition(".")
        chain = model.get_submodule(module).parametrizations[attribute]
        assert torch.equal(chain.original.grad, parameter.grad)
        assert all(extra.grad is None for extra in chain[0].parameters())


def test_inference_mode_then_gradient():
    """After an evaluation under inference_mode, evaluation with gradients works, and vice versa."""
    model, _ = _attached(mlp)
    inputs = torch.randn(3, 16)
    model.eval()
    with torch.inference_mode():
        first = model(inputs).clone()
    outputs = model(inputs)
    outputs.sum().backward()
    with torch.inference_mode():
        assert torch.equal(model(inputs), first)
    assert torch.equal(outputs, first)
    assert all(
        p.grad is not None for name, p in model.named_parameters() if name.endswith("original")
    )


def test_training_after_inference_mode_in_training_mode():
    """A training forward under inference_mode leaves nothing that breaks the next one."""
    model, _ = _attached(mlp)
    with torch.inference_mode():
        model(torch.randn(3, 16))
    model(torch.randn(3, 16)).sum().backward()
    assert all(grad is not None for grad in gradients(model).values())


# Errors in a forward


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
            _First(),
            _Fails(),
            encoder(),
            _Fails(),
            nn.Linear(16, 4),
            _Fails(),
        )

    model, quantizer = _attached(_make, kind)
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
    assert same_tensors(snapshot_of(model), before)
    assert _nothing_held(model)
    torch.manual_seed(3)
    assert torch.equal(model(inputs), expected)
    assert quantizer.true_model_size() > 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["lstm", "gru", "encoder"])
def test_exception_inside_a_repeated_reader(name, training):
    """An error inside a recurrent or attention layer, such as a bad shape, leaves nothing held."""
    make, make_input = MODELS[name]
    model, _ = _attached(make)
    model.train(training)
    layer = model.rnn if name != "encoder" else model.layers[0].self_attn
    bad = torch.randn(2, 3, 5)
    with pytest.raises((RuntimeError, AssertionError)):
        layer(bad) if name != "encoder" else layer(bad, bad, bad)
    assert _nothing_held(model)
    inputs = make_input()
    assert model(inputs).isfinite().all()
    assert torch.equal(model(inputs), model(inputs)) is not training


@pytest.mark.parametrize("prepend", [True, False])
def test_exception_in_a_hook(prepend):
    """An error in another hook of the root leaves no forward counted."""
    model, _ = _attached(mlp)

    def _failing(*_):
        raise ArithmeticError("made up")

    for register in (model.register_forward_pre_hook, model.register_forward_hook):
        handle = register(_failing, prepend=prepend)
        with pytest.raises(ArithmeticError):
            model(torch.randn(3, 16))
        handle.remove()
        assert _nothing_held(model)
    assert model(torch.randn(3, 16)).isfinite().all()


def test_exception_in_backward():
    """An error in a backward leaves the next step as it would have been."""
    grads = []
    for fails in (False, True):
        model, _ = _attached(mlp)
        inputs = torch.ones(3, 16)
        if fails:
            outputs = model(inputs)
            outputs.register_hook(lambda grad: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                outputs.sum().backward()
        torch.manual_seed(2)
        model(inputs).sum().backward()
        grads.append(gradients(model))
    assert _same_gradients(*grads)


# The cache of eval


def _counted(model):
    """Counts the quantizations of all tensors of a model from here on."""
    calls = []
    for quantizer in attach.quantizers_in(model):
        eval_weight = quantizer.eval_weight

        def _counting(weight, eval_weight=eval_weight, name=quantizer.plan.name):
            calls.append(name)
            return eval_weight(weight)

        quantizer.eval_weight = _counting
    return calls


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("name", ["mlp", "tied-modules", "lstm", "encoder"])
def test_eval_quantizes_each_weight_once(name, kind):
    """The second eval forward, with or without gradients, quantizes nothing."""
    make, make_input = MODELS[name]
    model, _ = _attached(make, kind)
    model.eval()
    inputs, calls = make_input(), _counted(model)
    with torch.no_grad():
        model(inputs)
    # The fast path of attention may leave some unread in one mode and not in the other.
    model(inputs)
    assert len(calls) == len(set(calls)) == len(attach.quantizers_in(model))
    for context in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with context():
            model(inputs)
    assert len(calls) == len(set(calls))


def _by_optimizer(model, quantizer):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0)
    model(torch.ones(2, 16)).square().sum().backward()
    optimizer.step()


def _by_load(model, quantizer):
    model.load_state_dict(seeded(mlp, 9).state_dict())


def _by_assign(model, quantizer):
    model.load_state_dict(seeded(mlp, 9).state_dict(), assign=True)


def _in_place(model, quantizer):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)


def _by_data(model, quantizer):
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.5


def _by_cast(model, quantizer):
    model.half().float()


def _by_training(model, quantizer):
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    quantizer.setup_optimizer(optimizer, lr=5.0)
    for _ in range(3):
        step(model.train(), optimizer, torch.ones(2, 16), quantizer, lam=100)
    model.eval()


def _by_bits(model, quantizer):
    with torch.no_grad():
        for weight_quantizer in attach.quantizers_in(model):
            for parameter in weight_quantizer.parameters():
                parameter.sub_(1.0)


@pytest.mark.parametrize("kind", ["diffq", "qat", "lsq"])
@pytest.mark.parametrize(
    "change",
    [_by_optimizer, _by_load, _by_assign, _in_place, _by_data, _by_cast, _by_training, _by_bits],
)
def test_eval_notices_changes(change, kind):
    """After a change of weights or bits, eval computes with the new ones, as the state has them."""
    if change is _by_bits and kind == "qat":
        pytest.skip("QAT learns no bits")
    model, quantizer = _attached(mlp, kind)
    inputs = torch.randn(3, 16)
    with torch.no_grad():
        before = model.eval()(inputs)
    change(model, quantizer)
    with torch.no_grad():
        after = model(inputs)
        assert not torch.equal(after, before)
        assert torch.equal(restored(mlp, quantizer)(inputs), after)


def test_sizes_and_states_leave_the_mode():
    """Sizes, bits, states and the table work in both modes and change nothing."""
    model, quantizer = _attached(mlp)
    before, seen = snapshot_of(model), []
    for training in (True, False):
        model.train(training)
        state = torch.get_rng_state()
        seen.append((quantizer.true_model_size(), quantizer.mean_bits(), repr(quantizer)))
        quantizer.get_quantized_state()
        assert torch.equal(torch.get_rng_state(), state)
        assert all(module.training is training for module in model.modules())
    assert seen[0] == seen[1]
    assert same_tensors(snapshot_of(model), before)


# Around the model


@pytest.mark.parametrize("name", ["mlp", "lstm", "encoder"])
def test_threads_evaluate_at_once(name):
    """Threads that evaluate one model at once get the outputs of a single thread."""
    make, make_input = MODELS[name]
    model, _ = _attached(make)
    model.eval()
    inputs = [make_input() for _ in range(8)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    wrong = []

    def _evaluate():
        with torch.no_grad():
            for _ in range(10):
                for x, y in zip(inputs, expected, strict=True):
                    if not torch.equal(model(x), y):
                        wrong.append(x)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        model.train()
        model.eval()
        threads = [threading.Thread(target=_evaluate) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []
    assert _nothing_held(model)


@pytest.mark.parametrize("kind", ["diffq", "diffq-rounding", "qat", "lsq"])
def test_autocast(kind):
    """Under bf16 autocast the master weights stay float32, train, and evaluate as restored."""
    model = seeded(mlp)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    quantizer = QUANTIZERS[kind](model)
    quantizer.setup_optimizer(optimizer, lr=0.1)
    inputs = torch.randn(4, 16)
    before = snapshot_of(model)
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(inputs)
            loss = outputs.float().square().mean() + quantizer.model_size()
        assert outputs.dtype == torch.bfloat16
        assert loss.dtype == torch.float32
        loss.backward()
        optimizer.step()
    after = snapshot_of(model)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == [name for name in before if not name.endswith("_extra_state")]
    assert all(p.dtype == torch.float32 for p in model.parameters())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        outputs = model.eval()(inputs)
        assert torch.equal(restored(mlp, quantizer)(inputs), outputs)


@pytest.mark.parametrize("kind", ["diffq", "diffq-rounding", "lsq"])
def test_size_under_autocast(kind):
    """model_size() is the same float32 number under autocast."""
    _, quantizer = _attached(mlp, kind)
    size = quantizer.model_size()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer.model_size(), size)


def test_skipped_steps_change_nothing():
    """A step that GradScaler skips for an infinite gradient changes no weight, bit or moment."""
    model = seeded(mlp)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    quantizer = QUANTIZERS["diffq"](model)
    quantizer.setup_optimizer(optimizer, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    inputs = torch.randn(4, 16)

    def _step(factor):
        optimizer.zero_grad()
        loss = model(inputs).square().mean() * factor + quantizer.model_size()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    _step(1.0)
    before, bits = snapshot_of(model), quantizer.bits()
    moments = [m.clone() for s in optimizer.state.values() for m in s.values()]
    _step(float("inf"))
    assert same_tensors(snapshot_of(model), before)
    assert all(torch.equal(bits[name], widths) for name, widths in quantizer.bits().items())
    after = [m for s in optimizer.state.values() for m in s.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))
    _step(1.0)
    assert not same_tensors(snapshot_of(model), before)


@pytest.fixture
def _compiler():
    """Skips without a C compiler, and forgets compiled code before and after."""
    if not any(map(shutil.which, ("gcc", "g++", "clang", "cc"))):
        pytest.skip("torch.compile needs a C compiler, and none is on the path")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "kind",
    [
        "diffq",
        "diffq-rounding",
        pytest.param("qat", marks=pytest.mark.slow),
        pytest.param("lsq", marks=pytest.mark.slow),
    ],
)
def test_compiled_model(kind, backend):
    """A compiled model trains, evaluates like eager, and compiles once in each mode."""
    model = seeded(mlp)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    quantizer = QUANTIZERS[kind](model)
    quantizer.setup_optimizer(optimizer, lr=0.1)
    compiled = torch.compile(model, backend=backend)
    inputs = torch.randn(4, 16)

    def _both_modes():
        model.train()
        step(compiled, optimizer, inputs, quantizer)
        model.eval()
        with torch.no_grad():
            return compiled(inputs)

    before = snapshot_of(model)
    for _ in range(2):
        _both_modes()
    with torch._dynamo.config.patch(error_on_recompile=True):
        outputs = [_both_modes() for _ in range(3)]
    assert not same_tensors(snapshot_of(model), before)
    assert not torch.equal(outputs[0], outputs[1])
    with torch.no_grad():
        assert torch.allclose(model(inputs), outputs[-1], atol=1e-5)
    assert all(grad is not None for grad in gradients(model).values())


@pytest.mark.usefixtures("_compiler")
def test_compiled_model_in_one_graph():
    """A compiled training forward is one graph, and its noise differs between steps."""
    model, _ = _attached(mlp)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    inputs = torch.randn(4, 16)
    assert not torch.equal(compiled(inputs), compiled(inputs))


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize("make", [TiedModules, pytest.param(Recurrent, marks=pytest.mark.slow)])
def test_compiled_ties_and_recurrent_layers(make):
    """Compiled models with ties or a recurrent layer train and evaluate like eager ones."""
    model, quantizer = _attached(make)
    compiled = torch.compile(model, backend="aot_eager")
    inputs = tokens()
    (compiled(inputs).square().mean() + quantizer.model_size()).backward()
    assert all(grad is not None and grad.any() for grad in gradients(model).values())
    model.eval()
    with torch.no_grad():
        assert torch.allclose(compiled(inputs), model(inputs), atol=1e-5)


# Distributed


class _PartlyUsed(nn.Module):
    """Uses its second layer when it is told to."""

    def __init__(self):
        super().__init__()
        self.always, self.sometimes = nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, x, both):
        return self.always(x) + (self.sometimes(x) if both else 0)


def _train_distributed(rank, *, find_unused, skipping=False, freezing=False):
    """Trains for four steps; returns the model's state and bits."""
    model = seeded(_PartlyUsed)
    quantizer = QUANTIZERS["diffq"](model)
    wrapped = DistributedDataParallel(model, find_unused_parameters=find_unused)
    optimizer = torch.optim.Adam(wrapped.parameters(), 0.05)
    quantizer.setup_optimizer(optimizer, lr=0.3)
    torch.manual_seed(rank)
    for index in range(4):
        if freezing and index == 2:
            quantizer.freeze_bits(rounding=True)
        optimizer.zero_grad()
        outputs = wrapped(torch.randn(4, 16), both=not skipping or index % 2 == 0)
        (outputs.square().mean() + quantizer.model_size()).backward()
        optimizer.step()
    return snapshot_of(model), {name: bits.tolist() for name, bits in quantizer.bits().items()}


_SETTINGS = {
    "all-used": {"find_unused": False},
    "find-unused": {"find_unused": True},
    "some-unused": {"find_unused": True, "skipping": True},
    "bits-frozen": {"find_unused": False, "freezing": True},
}


def _run_rank(rank, folder):
    """Trains in each setting and writes what came of it; errors as text."""
    torch.set_num_threads(1)
    results = {}
    for name, settings in _SETTINGS.items():
        store = f"file://{folder}/{name}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
        try:
            results[name] = _train_distributed(rank, **settings)
        except RuntimeError as error:
            results[name] = str(error)
        finally:
            dist.destroy_process_group()
    torch.save(results, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The results of two ranks; one pair of processes runs all settings."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this build of torch has no gloo")
    folder = tmp_path_factory.mktemp("ddp")
    mp.start_processes(_run_rank, args=(folder,), nprocs=2, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("setting", _SETTINGS)
def test_distributed_data_parallel(ranks, setting):
    """Under DDP, with a size penalty, both ranks end with the same weights and learned bits."""
    one, other = (rank[setting] for rank in ranks)
    assert not isinstance(one, str), one
    assert same_tensors(one[0], other[0])
    assert one[1] == other[1]
    assert len({width for widths in one[1].values() for width in widths}) > 1

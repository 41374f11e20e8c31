"""Quantizers on a model, what they leave of it, and copies, casts and loads of it."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel

import diffq
from diffq import attach
from tests.models import (
    MODELS,
    QUANTIZERS,
    Recurrent,
    TiedHead,
    TiedModules,
    TwoNames,
    gradients,
    mlp,
    restored,
    same_tensors,
    seeded,
    snapshot_of,
    step,
    tokens,
)


def _fingerprint(model):
    """All that a quantizer could leave behind: classes, attributes, hooks, parameters."""
    return [
        (
            path,
            type(module),
            sorted(module.__dict__),
            [(name, id(p)) for name, p in module._parameters.items()],
            [(name, id(b)) for name, b in module._buffers.items()],
            list(module._modules),
            {key: len(value) for key, value in module.__dict__.items() if "hooks" in key},
            [id(weight) for weight in getattr(module, "_flat_weights", ())],
        )
        for path, module in model.named_modules(remove_duplicate=False)
    ]


def _trained(name="mlp", quantizer="diffq", steps=2, **options):
    """A model after some steps, its quantizer and an input."""
    make, make_input = MODELS[name]
    model = seeded(make)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    quantizer = QUANTIZERS[quantizer](model, **options)
    quantizer.setup_optimizer(optimizer, lr=0.2)
    inputs = make_input()
    for _ in range(steps):
        step(model, optimizer, inputs, quantizer)
    return model, quantizer, inputs


# Attach


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_trains_evaluates_restores_and_detaches(name, kind):
    """Every quantizer on every model: gradients everywhere, eval equals restored, no trace left."""
    make, make_input = MODELS[name]
    model = seeded(make)
    inputs = make_input()
    before, plain_keys = _fingerprint(model), list(model.state_dict())
    plain = {key: id(p) for key, p in model.named_parameters(remove_duplicate=False)}
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    quantizer = QUANTIZERS[kind](model)
    quantizer.setup_optimizer(optimizer, lr=0.2)
    for _ in range(2):
        step(model, optimizer, inputs, quantizer)
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # The key's bias of attention shifts all scores alike; nothing else may be without gradient.
    assert missing == []
    model.eval()
    with torch.no_grad():
        expected = model(inputs)
    fresh = restored(make, quantizer)
    with torch.no_grad():
        assert torch.equal(fresh(inputs), expected)
    assert quantizer.detach() is model
    model.train()
    assert _fingerprint(model) == before
    assert list(model.state_dict()) == plain_keys
    assert {key: id(p) for key, p in model.named_parameters(remove_duplicate=False)} == plain
    step(model, torch.optim.SGD(model.parameters(), 0.1), inputs)


@pytest.mark.parametrize("kind", ["diffq", "qat", "lsq"])
def test_attach_keeps_parameters(kind):
    """The Parameter objects and their values are the same after attaching."""
    model = mlp()
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    QUANTIZERS[kind](model)
    for name, (identity, value) in before.items():
        module, _, attribute = name.partition(".")
        original = model.get_submodule(module).parametrizations[attribute].original
        assert id(original) == identity
        assert torch.equal(original, value)


def test_optimizer_made_before_trains_the_model():
    """An optimizer from before the quantizer moves the weights and nothing else of the model."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    ids = {id(p) for p in model.parameters()}
    quantizer = diffq.QATQuantizer(model, min_size=0)
    before = snapshot_of(model)
    step(model, optimizer, torch.randn(4, 16), quantizer)
    assert {id(p) for p in model.parameters()} == ids
    assert not any(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_attach_draws_no_random_numbers():
    """Making a quantizer leaves the random number generator where it was."""
    torch.manual_seed(3)
    model = mlp()
    before = torch.get_rng_state()
    diffq.DiffQuantizer(model, min_size=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_new_modules_take_their_owners_mode():
    """Attached to a model in eval mode, the quantizer is in eval mode, module by module."""
    model = mlp().eval()
    model[2].train()
    quantizer = diffq.DiffQuantizer(model, min_size=0)
    plain = model[0].parametrizations.weight.original
    assert not torch.equal(model[0].weight, plain)
    assert model[2].weight.grad_fn is not None
    assert torch.equal(model[0].weight, restored(mlp, quantizer)[0].weight)


@pytest.mark.parametrize("position", [0, 1, 3])
@pytest.mark.parametrize("make", [mlp, Recurrent, TiedModules])
def test_failure_while_attaching_leaves_no_trace(monkeypatch, make, position):
    """An error after some tensors were parametrized takes everything back."""
    model = make()
    before = _fingerprint(model)
    register, calls = parametrize.register_parametrization, []

    def _failing(*args, **options):
        calls.append(args)
        if len(calls) > position:
            raise MemoryError("made up")
        return register(*args, **options)

    monkeypatch.setattr(parametrize, "register_parametrization", _failing)
    with pytest.raises(MemoryError, match="made up"):
        diffq.DiffQuantizer(model, min_size=0)
    monkeypatch.undo()
    assert _fingerprint(model) == before
    assert diffq.DiffQuantizer(model, min_size=0).detach() is model


def test_failure_while_making_a_quantizer_leaves_no_trace(monkeypatch):
    """An error for a late tensor comes before the first one is touched."""
    model = mlp()
    before = _fingerprint(model)
    with torch.no_grad():
        model[2].bias[0] = float("nan")
    with pytest.raises(diffq.WeightError, match=r"2\.bias"):
        diffq.DiffQuantizer(model, min_size=0)
    assert _fingerprint(model) == before


def test_interrupt_while_attaching_leaves_no_trace(monkeypatch):
    """Ctrl-C while attaching takes everything back too."""
    model = mlp()
    before = _fingerprint(model)

    def _interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patch.setattr(nn.Module, "register_forward_hook", _interrupted)
        diffq.DiffQuantizer(model, min_size=0)
    assert _fingerprint(model) == before


def test_parameter_lists_and_dicts():
    """Parameters in containers are quantized where the model reads them by index or key."""

    class _Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.items = nn.ParameterList([torch.randn(16, 16) for _ in range(2)])
            self.named = nn.ParameterDict({"a": torch.randn(8, 16)})

        def forward(self, x):
            for weight in self.items:
                x = torch.tanh(F.linear(x, weight))
            return F.linear(x, self.named["a"])

    model, inputs = seeded(_Model), torch.randn(3, 16)
    before = _fingerprint(model)
    quantizer = diffq.DiffQuantizer(model, min_size=0)
    quantizer.no_optimizer()
    assert not torch.equal(model(inputs), model(inputs))
    model(inputs).sum().backward()
    assert all(grad is not None for grad in gradients(model).values())
    assert torch.equal(model.eval()(inputs), restored(_Model, quantizer)(inputs))
    quantizer.detach()
    assert _fingerprint(model) == before


def test_module_named_like_parametrizations():
    """A submodule whose name ends in 'parametrizations' is a module like any other."""
    model = nn.ModuleDict({"reparametrizations": nn.Linear(8, 8)})
    quantizer = diffq.QATQuantizer(model, min_size=0)
    assert sorted(quantizer.bits()) == ["reparametrizations.bias", "reparametrizations.weight"]


# Detach


def test_detach_keeps_trained_values():
    """detach() gives the full-precision weights, as the optimizer left them."""
    model, quantizer, _ = _trained()
    trained = [p.detach().clone() for p in (model[0].parametrizations.weight.original,)]
    quantizer.detach()
    assert torch.equal(model[0].weight, trained[0])


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("name", ["mlp", "tied-modules", "two-names", "lstm"])
def test_detach_quantized_bakes_the_eval_values(name, kind):
    """detach(quantized=True) puts the values that eval used into the same Parameter objects."""
    make, make_input = MODELS[name]
    model = seeded(make)
    ids = {key: id(p) for key, p in model.named_parameters(remove_duplicate=False)}
    quantizer = QUANTIZERS[kind](model)
    inputs = make_input()
    with torch.no_grad():
        expected = model.eval()(inputs)
    fresh = restored(make, quantizer)
    quantizer.detach(quantized=True)
    assert {key: id(p) for key, p in model.named_parameters(remove_duplicate=False)} == ids
    assert same_tensors(dict(model.state_dict()), dict(fresh.state_dict()))
    with torch.no_grad():
        assert torch.equal(model(inputs), expected)


def test_detach_quantized_in_training_mode():
    """detach(quantized=True) bakes the true quantized values, not noisy ones, in any mode."""
    model = mlp()
    quantizer = diffq.DiffQuantizer(model, min_size=0)
    expected = restored(mlp, quantizer).state_dict()
    assert same_tensors(dict(quantizer.detach(quantized=True).state_dict()), dict(expected))


def test_detach_quantized_bakes_float16():
    """detach(quantized=True) bakes what float16 keeps of the other parameters."""
    model = mlp()
    quantizer = diffq.QATQuantizer(model, min_size=0, exclude=["bias"], float16=True)
    bias = model[0].bias.detach().clone()
    quantizer.detach(quantized=True)
    assert torch.equal(model[0].bias, bias.half().float())
    assert model[0].bias.dtype == torch.float32


def test_detach_quantized_of_a_bad_weight_changes_nothing():
    """detach(quantized=True) with a NaN raises, and the quantizer stays attached and working."""
    model, quantizer, inputs = _trained()
    bad = model[2].parametrizations.weight.original
    good = bad.detach().clone()
    with torch.no_grad():
        bad[0, 0] = float("nan")
    before = _fingerprint(model)
    with pytest.raises(diffq.WeightError, match=r"2\.weight"):
        quantizer.detach(quantized=True)
    assert _fingerprint(model) == before
    with torch.no_grad():
        bad.copy_(good)
    assert model.eval()(inputs).isfinite().all()


def test_detach_leaves_foreign_hooks():
    """Hooks of others are kept by detach, in their order."""
    model, seen = mlp(), []
    model.register_forward_hook(lambda *_: seen.append("before"))
    quantizer = diffq.DiffQuantizer(model, min_size=0)
    model.register_forward_hook(lambda *_: seen.append("after"))
    quantizer.detach()
    model(torch.randn(2, 16))
    assert seen == ["before", "after"]


def test_detach_forgets_the_model():
    """After detach, neither the model nor the quantizer keeps the other alive."""
    model, quantizer, _ = _trained()
    quantizer.detach()
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_attach_again_after_detach():
    """A detached model takes another quantizer, of another kind."""
    model, quantizer, inputs = _trained()
    quantizer.detach()
    second = diffq.QATQuantizer(model, min_size=0, bits=3)
    with torch.no_grad():
        assert torch.equal(model.eval()(inputs), restored(mlp, second)(inputs))


def test_training_goes_on_after_detach():
    """The optimizer trains the detached model's own parameters."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    quantizer = diffq.DiffQuantizer(model, min_size=0)
    quantizer.setup_optimizer(optimizer)
    step(model, optimizer, torch.randn(3, 16), quantizer)
    quantizer.detach()
    before = snapshot_of(model)
    step(model, optimizer, torch.randn(3, 16))
    assert not any(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_backward_after_detach():
    """A graph from before detach still gives its gradients."""
    model = mlp()
    quantizer = diffq.DiffQuantizer(model, min_size=0)
    quantizer.no_optimizer()
    loss = model(torch.randn(3, 16)).sum()
    quantizer.detach()
    loss.backward()
    assert all(grad is not None for grad in gradients(model).values())


# Another parametrization


def _normed():
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(16, 8)), nn.Linear(8, 4))


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_weight_norm_present(kind):
    """Over weight_norm: gradients to its tensors, quantized in eval, gone after detach."""
    model, inputs = seeded(_normed), torch.randn(3, 16)
    before, keys = _fingerprint(model), list(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    quantizer = QUANTIZERS[kind](model)
    quantizer.setup_optimizer(optimizer, lr=0.1)
    step(model, optimizer, inputs, quantizer)
    assert all(grad is not None and grad.any() for grad in gradients(model).values())
    plain = seeded(lambda: nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4)))
    model.eval()
    diffq.restore_quantized_state(plain, quantizer.get_quantized_state())
    assert torch.equal(model[0].weight, plain[0].weight)
    assert torch.equal(model(inputs), plain(inputs))
    quantizer.detach()
    model.train()
    assert _fingerprint(model) == before
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("kind", ["diffq", "diffq-uniform"])
def test_weight_norm_gets_noise(kind):
    """Over weight_norm, training forwards differ from each other and from the plain weight."""
    model = _normed()
    plain = model[0].weight.detach().clone()
    QUANTIZERS[kind](model)
    one, two = model[0].weight, model[0].weight
    assert not torch.equal(one, two)
    assert not torch.equal(one, plain)


def test_weight_norm_in_inference_mode():
    """Over weight_norm, evaluation under torch.inference_mode works."""
    model, inputs = seeded(_normed).eval(), torch.randn(3, 16)
    diffq.QATQuantizer(model, min_size=0, bits=4)
    with torch.no_grad():
        expected = model(inputs)
    with torch.inference_mode():
        assert torch.equal(model(inputs), expected)


def test_weight_norm_baked():
    """detach(quantized=True) replaces the other parametrization by the quantized weight."""
    model, inputs = seeded(_normed).eval(), torch.randn(3, 16)
    quantizer = diffq.QATQuantizer(model, min_size=0, bits=4)
    expected = model(inputs)
    quantizer.detach(quantized=True)
    assert set(model.state_dict()) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert isinstance(model[0].weight, nn.Parameter)
    assert torch.equal(model(inputs), expected)


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
    assert same_tensors(snapshot_of(model), checkpoint)


def test_weight_norm_checkpoint_resumes():
    """The attached model's own checkpoint loads where weight_norm is present."""
    model, other = seeded(_normed, 1), seeded(_normed, 2)
    first, second = (diffq.DiffQuantizer(m, min_size=0) for m in (model, other))
    with torch.no_grad():
        model[0].parametrizations.weight[1].logits.add_(1)
    other.load_state_dict(model.state_dict())
    assert first.true_model_size() == second.true_model_size()
    assert same_tensors(snapshot_of(model), snapshot_of(other))


# Weights that are the same object in every forward


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_weights_without_gradient(kind):
    """A frozen recurrent layer evaluates again and again with gradients enabled."""
    model, inputs = seeded(lambda: Recurrent(kind)).requires_grad_(False).eval(), tokens()
    diffq.QATQuantizer(model, min_size=0)
    assert torch.equal(model(inputs), model(inputs))


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
    assert not any(torch.equal(before[name], value) for name, value in model.state_dict().items())


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


# Copies


def _train_on(model, quantizer, inputs):
    """Trains with a new optimizer; returns the final state."""
    torch.manual_seed(5)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    quantizer.setup_optimizer(optimizer, lr=0.1)
    for _ in range(2):
        step(model, optimizer, inputs, quantizer)
    return snapshot_of(model)


@pytest.mark.parametrize("name", ["mlp", "tied-modules", "two-names", "lstm-deep", "encoder"])
@pytest.mark.parametrize("kind", ["diffq", "lsq"])
def test_deepcopy_of_model_and_quantizer(name, kind):
    """A deep copy of both is independent, and trains exactly like the original."""
    model, quantizer, inputs = _trained(name, kind)
    before = snapshot_of(model)
    other, other_quantizer = copy.deepcopy((model, quantizer))
    assert other_quantizer.model is other
    trained = _train_on(other, other_quantizer, inputs)
    assert same_tensors(snapshot_of(model), before)
    assert not same_tensors(trained, before)
    assert same_tensors(_train_on(model, quantizer, inputs), trained)


@pytest.mark.parametrize("name", MODELS)
def test_deepcopy_after_forward_and_backward(name):
    """A model that has just been trained can be copied, and the copy evaluates the same."""
    model, _, inputs = _trained(name)
    model(inputs)
    other = copy.deepcopy(model)
    with torch.no_grad():
        expected = model.eval()(inputs)
        assert torch.equal(other.eval()(inputs), expected)
        assert torch.equal(copy.deepcopy(model)(inputs), expected)


def test_deepcopy_keeps_ties():
    """Tied tensors of a copy are tied, with one quantizer."""
    model, quantizer, _ = _trained("tied-modules")
    other, other_quantizer = copy.deepcopy((model, quantizer))
    chains = [m.parametrizations.weight for m in (other.embed, other.head)]
    assert chains[0].original is chains[1].original
    assert chains[0][0] is chains[1][0]
    assert chains[0].original is not model.embed.parametrizations.weight.original
    assert other_quantizer.true_model_size() == quantizer.true_model_size()


@pytest.mark.parametrize("name", ["mlp", "lstm", "encoder"])
def test_detaching_the_original_leaves_a_copy_whole(name):
    """A copy of an attached model works on after the original is detached."""
    model, quantizer, inputs = _trained(name)
    other = copy.deepcopy(model).eval()
    with torch.no_grad():
        expected = other(inputs)
        quantizer.detach()
        assert torch.equal(copy.deepcopy(other)(inputs), expected)
        assert torch.equal(other(inputs), expected)
    assert attach.quantizers_in(other)


@pytest.mark.parametrize("name", ["mlp", "lstm", "encoder"])
def test_detaching_a_copy_leaves_the_original_whole(name):
    """The original works on after a copy is detached, and the copy is plain."""
    model, quantizer, inputs = _trained(name)
    make, _ = MODELS[name]
    other, other_quantizer = copy.deepcopy((model, quantizer))
    with torch.no_grad():
        expected = model.eval()(inputs)
        other_quantizer.detach()
        assert torch.equal(model(inputs), expected)
    assert [type(m) for m in other.modules()] == [type(m) for m in make().modules()]
    assert torch.equal(restored(make, quantizer)(inputs), expected)


def test_copies_hold_no_sample():
    """A copy neither shares nor copies noise and cached weights."""
    model, _, inputs = _trained()
    model(inputs)
    other = copy.deepcopy(model)
    for quantizer in attach.quantizers_in(other):
        assert quantizer.noise is None
        assert quantizer._cached is None


def test_averaged_model():
    """An EMA of an attached model averages the weights and evaluates them quantized."""
    model, quantizer, inputs = _trained()
    ema = AveragedModel(model, avg_fn=lambda average, value, _: 0.5 * average + 0.5 * value)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        step(model, optimizer, inputs, quantizer)
        ema.update_parameters(model)
    average = snapshot_of(ema.module)
    assert not same_tensors(average, snapshot_of(model))
    with torch.no_grad():
        expected = ema.eval()(inputs)
    model.load_state_dict(average)
    with torch.no_grad():
        assert torch.equal(model.eval()(inputs), expected)
        assert torch.equal(restored(mlp, quantizer)(inputs), expected)


def test_averaged_model_exports_itself():
    """quantizer_of() finds the quantizer of an EMA, which stores the average."""
    model, quantizer, inputs = _trained()
    ema = AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(3):
        step(model, optimizer, inputs, quantizer)
        ema.update_parameters(model)
    own = diffq.quantizer_of(ema)
    assert own.model is ema.module
    assert diffq.quantizer_of(model) is quantizer
    with torch.no_grad():
        expected = ema.eval()(inputs)
        assert torch.equal(restored(mlp, own)(inputs), expected)
        assert not torch.equal(restored(mlp, quantizer)(inputs), expected)
    own.detach()
    assert quantizer.model is model


def test_quantizer_of_a_plain_model():
    """quantizer_of() refuses a model without a quantizer, before and after."""
    model = mlp()
    with pytest.raises(diffq.AttachError, match="no quantizer"):
        diffq.quantizer_of(model)
    diffq.QATQuantizer(model, min_size=0).detach()
    with pytest.raises(diffq.AttachError, match="no quantizer"):
        diffq.quantizer_of(model)


def test_quantizer_of_a_part():
    """quantizer_of() finds the quantizer of a part of the model."""
    model = mlp()
    quantizer = diffq.QATQuantizer(model[2], min_size=0)
    assert diffq.quantizer_of(model) is quantizer


def test_copy_made_before_setup_can_be_trained():
    """A copy made before setup_optimizer is trained through its own quantizer."""
    model = mlp()
    diffq.DiffQuantizer(model, min_size=0)
    other = copy.deepcopy(model)
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    diffq.quantizer_of(other).setup_optimizer(optimizer)
    before = snapshot_of(other)
    step(other, optimizer, torch.randn(3, 16))
    assert not same_tensors(snapshot_of(other), before)


# Casts


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_cast_after_attaching(kind, dtype):
    """A model cast after attaching trains in its dtype, and eval equals the restored model."""
    model = seeded(mlp)
    inputs = torch.randn(5, 16, dtype=dtype)
    quantizer = QUANTIZERS[kind](model)
    model.to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    quantizer.setup_optimizer(optimizer)
    step(model, optimizer, inputs, quantizer)
    assert model(inputs).dtype == dtype
    assert model[0].parametrizations.weight.original.dtype == dtype
    with torch.no_grad():
        outputs = model.eval()(inputs)
    assert torch.equal(outputs, restored(lambda: mlp().to(dtype), quantizer)(inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("make", [diffq.DiffQuantizer, diffq.QATQuantizer, diffq.LSQQuantizer])
def test_cast_keeps_every_bitwidth_exact(make, dtype):
    """At each bitwidth, a model cast after attaching evaluates to what is stored, bit for bit."""
    wrong = []
    for bits in range(2 if make is diffq.LSQQuantizer else 1, 16):
        model = seeded(lambda: nn.Linear(64, 32))
        quantizer = make(model, bits=bits, min_size=0)
        model.to(dtype).eval()
        try:
            fresh = restored(lambda: nn.Linear(64, 32, dtype=dtype), quantizer)
            exact = torch.equal(model.weight, fresh.weight)
        except diffq.DiffqError:
            exact = False
        wrong += [] if exact else [bits]
    assert wrong == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["diffq", "qat", "lsq"])
def test_cast_before_attaching(kind, dtype):
    """A model in another dtype trains in it, and eval equals the restored model."""
    make = lambda: mlp().to(dtype)  # noqa: E731
    model, inputs = seeded(make), torch.randn(5, 16, dtype=dtype)
    quantizer = QUANTIZERS[kind](model)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    quantizer.setup_optimizer(optimizer)
    step(model, optimizer, inputs, quantizer)
    assert model(inputs).dtype == dtype
    with torch.no_grad():
        assert torch.equal(model.eval()(inputs), restored(make, quantizer)(inputs))


def test_sizes_follow_a_cast():
    """After a cast, the sizes count tensors without levels at their new width."""
    model = mlp()
    quantizer = diffq.QATQuantizer(model, min_size=0, exclude=["bias"])
    before = quantizer.true_model_size()
    model.half()
    assert round((before - quantizer.true_model_size()) * 2**23) == 40 * 16
    assert round((before - quantizer.model_size().item()) * 2**23) == 40 * 16


def test_cast_after_evaluation_is_noticed():
    """A cast after an evaluation gives weights of the new dtype."""
    model, inputs = mlp().eval(), torch.randn(2, 16)
    diffq.QATQuantizer(model, min_size=0)
    model(inputs)
    assert model.double()(inputs.double()).dtype == torch.float64


def test_functional_call():
    """torch.func.functional_call computes with the tensors it is given."""
    model, quantizer, inputs = _trained()
    model.eval()
    other = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    with torch.no_grad():
        before = model(inputs)
        outputs = torch.func.functional_call(model, other, (inputs,))
        assert torch.equal(model(inputs), before)
        model.load_state_dict({**model.state_dict(), **other})
        assert torch.equal(model(inputs), outputs)
    assert quantizer.true_model_size() > 0


# Loading


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("assign", [False, True])
def test_plain_checkpoint_into_attached_model(name, assign):
    """A checkpoint of the plain model loads strictly into an attached one."""
    make, make_input = MODELS[name]
    checkpoint, inputs = snapshot_of(seeded(make, 1)), make_input()
    model = seeded(make, 2)
    quantizer = QUANTIZERS["diffq"](model)
    keys = model.load_state_dict(copy.deepcopy(checkpoint), assign=assign)
    assert (keys.missing_keys, keys.unexpected_keys) == ([], [])
    with torch.no_grad():
        expected = model.eval()(inputs)
        assert torch.equal(restored(make, quantizer)(inputs), expected)
    quantizer.detach()
    assert same_tensors(snapshot_of(model), checkpoint)


@pytest.mark.parametrize("kind", ["diffq", "qat", "lsq"])
@pytest.mark.parametrize("name", ["mlp", "tied-modules", "shared-module", "two-names", "lstm"])
@pytest.mark.parametrize("assign", [False, True])
def test_attached_checkpoint_into_attached_model(name, kind, assign):
    """A checkpoint of an attached model loads strictly into another attached one."""
    make, _ = MODELS[name]
    trained, first, inputs = _trained(name, kind)
    model = seeded(make, 2)
    second = QUANTIZERS[kind](model)
    keys = model.load_state_dict(copy.deepcopy(trained.state_dict()), assign=assign)
    assert (keys.missing_keys, keys.unexpected_keys) == ([], [])
    assert same_tensors(snapshot_of(model), snapshot_of(trained))
    assert second.true_model_size() == first.true_model_size()
    with torch.no_grad():
        assert torch.equal(model.eval()(inputs), trained.eval()(inputs))


@pytest.mark.parametrize("name", ["mlp", "tied-modules", "two-names", "lstm"])
def test_training_after_assign(name):
    """After load_state_dict(assign=True) the new tensors, and what is learned, are trained."""
    make, make_input = MODELS[name]
    trained, _, _ = _trained(name)
    model, inputs = seeded(make, 2), make_input()
    quantizer = QUANTIZERS["diffq"](model)
    model.load_state_dict(copy.deepcopy(trained.state_dict()), assign=True)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    quantizer.setup_optimizer(optimizer, lr=0.1)
    before = snapshot_of(model)
    step(model, optimizer, inputs, quantizer)
    after = snapshot_of(model)
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert changed == [key for key in before if not key.endswith("_extra_state")]
    with torch.no_grad():
        assert torch.equal(restored(make, quantizer)(inputs), model.eval()(inputs))


def test_checkpoint_is_not_changed_by_loading():
    """Loading a plain checkpoint into an attached model leaves the dict as it was."""
    checkpoint = mlp().state_dict()
    before = dict(checkpoint)
    model = mlp()
    diffq.DiffQuantizer(model, min_size=0)
    model.load_state_dict(checkpoint)
    assert list(checkpoint) == list(before)
    assert all(checkpoint[name] is before[name] for name in before)


def test_plain_checkpoint_keeps_what_is_learned():
    """A plain checkpoint replaces the weights and leaves the bitwidths as they are."""
    model, quantizer, _ = _trained(steps=5)
    bits = quantizer.bits()
    model.load_state_dict(seeded(mlp, 9).state_dict())
    assert all(torch.equal(bits[name], widths) for name, widths in quantizer.bits().items())


def test_strict_loading_still_checks():
    """A checkpoint with missing, unknown or misshapen entries is refused as in a plain model."""
    model = mlp()
    diffq.DiffQuantizer(model, min_size=0)
    plain = mlp().state_dict()
    missing = {key: value for key, value in plain.items() if key != "0.weight"}
    for bad, message in (
        (missing, "0.*weight"),
        ({**plain, "other": torch.zeros(1)}, "other"),
        ({**plain, "0.weight": torch.zeros(1, 2)}, "size mismatch"),
    ):
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict(bad)


def test_untied_tensors_are_refused():
    """Where a tie was broken behind the quantizer's back, the error names both tensors."""
    model = TiedModules()
    quantizer = diffq.DiffQuantizer(model, min_size=0)
    chain = model.head.parametrizations.weight
    chain.original = nn.Parameter(chain.original.detach().clone() + 1)
    with pytest.raises(diffq.AttachError, match=r"embed\.weight and head\.weight"):
        quantizer.get_quantized_state()


def test_foreign_parametrization_on_top_is_refused():
    """A parametrization that others put over the quantizer's gives an error with the name."""
    model = mlp()
    quantizer = diffq.DiffQuantizer(model, min_size=0)
    parametrizations.weight_norm(model[0])
    with pytest.raises(diffq.AttachError, match=r"0\.weight.*detach"):
        quantizer.get_quantized_state()


# Ties


@pytest.mark.parametrize(("make", "inputs"), [(TiedModules, tokens), (TwoNames, None)])
def test_ties_share_one_quantizer(make, inputs):
    """Tied tensors have one logit per group, one sample per forward, and one stored copy."""
    model = seeded(make)
    quantizer = diffq.DiffQuantizer(model, min_size=0)
    shared = [q for q in attach.quantizers_in(model) if len(q.plan.names) == 2]
    assert len(shared) == 1
    state = quantizer.get_quantized_state()
    ((alias, target),) = state["aliases"].items()
    assert target in state["tensors"]
    assert alias not in state["tensors"]


def test_tie_gets_the_sum_of_gradients():
    """With rounding noise, a tied model has the same gradients as reading one weight twice."""
    torch.manual_seed(0)
    tied, read = TiedModules(), TiedHead()
    read.load_state_dict({k: v for k, v in tied.state_dict().items() if k != "head.weight"})
    inputs = tokens()
    grads = []
    for model in (tied, read):
        quantizer = diffq.DiffQuantizer(model, min_size=0, noise="rounding")
        quantizer.no_optimizer()
        model(inputs).square().sum().backward()
        chain = model.embed.parametrizations.weight
        grads.append((chain.original.grad, chain[0].logits.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.allclose(grads[0][1], grads[1][1])

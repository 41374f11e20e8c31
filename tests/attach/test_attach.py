"""Quantizers put on a model: what changes in it, and what does not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import diffq
from tests.compare import close, same_bits
from tests.holder import quantizers_in
from tests.models import (
    MODELS,
    QUANTIZERS,
    SUMS,
    Recurrent,
    TiedHead,
    TiedModules,
    TwoNames,
    evaluate_alike,
    fingerprint,
    gradients,
    learned,
    mlp,
    restored,
    seeded,
    snapshot_of,
    step,
    tokens,
)


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_trains_evaluates_restores_and_detaches(name, kind):
    """Every quantizer on every model: gradients everywhere, eval equals restored, no trace left."""
    make, make_input = MODELS[name]
    model = seeded(make)
    inputs = make_input()
    before, plain_keys = fingerprint(model), list(model.state_dict())
    plain = {key: id(p) for key, p in model.named_parameters(remove_duplicate=False)}
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    quantizer = QUANTIZERS[kind](model)
    quantizer.setup_optimizer(optimizer, lr=0.2)
    for _ in range(2):
        step(model, optimizer, inputs, quantizer)
    missing = [n for n, p in learned(model) if p.grad is None or not p.grad.any()]
    # The key's bias of attention shifts all scores alike; nothing else may be without gradient.
    assert missing == []
    model.eval()
    assert evaluate_alike(model, restored(make, quantizer), inputs)
    assert quantizer.detach() is model
    model.train()
    assert fingerprint(model) == before
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
        assert same_bits(original, value)


def test_optimizer_made_before_trains_the_model():
    """An optimizer from before the quantizer moves the weights and nothing else of the model."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    ids = {id(p) for p in model.parameters()}
    quantizer = diffq.QATQuantizer(model, min_size=0)
    before = snapshot_of(model)
    step(model, optimizer, torch.randn(4, 16), quantizer)
    assert {id(p) for p in model.parameters()} == ids
    assert not any(same_bits(before[name], value) for name, value in model.state_dict().items())


def test_attach_draws_no_random_numbers():
    """Making a quantizer leaves the random number generator where it was."""
    torch.manual_seed(3)
    model = mlp()
    before = torch.get_rng_state()
    diffq.DiffQuantizer(model, min_size=0)
    assert same_bits(torch.get_rng_state(), before)


def test_new_modules_take_their_owners_mode():
    """Attached to a model in eval mode, the quantizer is in eval mode, module by module."""
    model = mlp().eval()
    model[2].train()
    quantizer = diffq.DiffQuantizer(model, min_size=0)
    plain = model[0].weight
    assert not same_bits(model[0].weight, plain)
    assert model[2].weight.grad_fn is not None
    assert same_bits(model[0].weight, restored(mlp, quantizer)[0].weight)


@pytest.mark.parametrize("position", [0, 1, 3])
@pytest.mark.parametrize("make", [mlp, Recurrent, TiedModules])
def test_failure_while_attaching_leaves_no_trace(monkeypatch, make, position):
    """An error after some tensors were parametrized takes everything back."""
    model = make()
    before = fingerprint(model)
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
    assert fingerprint(model) == before
    assert diffq.DiffQuantizer(model, min_size=0).detach() is model


def test_failure_while_making_a_quantizer_leaves_no_trace(monkeypatch):
    """An error for a late tensor comes before the first one is touched."""
    model = mlp()
    before = fingerprint(model)
    with torch.no_grad():
        model[2].bias[0] = float("nan")
    with pytest.raises(diffq.WeightError, match=r"2\.bias"):
        diffq.DiffQuantizer(model, min_size=0)
    assert fingerprint(model) == before


def test_interrupt_while_attaching_leaves_no_trace(monkeypatch):
    """Ctrl-C while attaching takes everything back too."""
    model = mlp()
    before = fingerprint(model)

    def _interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patch.setattr(nn.Module, "register_forward_hook", _interrupted)
        diffq.DiffQuantizer(model, min_size=0)
    assert fingerprint(model) == before


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
    before = fingerprint(model)
    quantizer = diffq.DiffQuantizer(model, min_size=0)
    quantizer.no_optimizer()
    assert not close(model(inputs), model(inputs))
    model(inputs).sum().backward()
    assert all(grad is not None for grad in gradients(model).values())
    assert evaluate_alike(model, restored(_Model, quantizer), inputs)
    quantizer.detach()
    assert fingerprint(model) == before


def test_module_named_like_parametrizations():
    """A submodule whose name ends in 'parametrizations' is a module like any other."""
    model = nn.ModuleDict({"reparametrizations": nn.Linear(8, 8)})
    quantizer = diffq.QATQuantizer(model, min_size=0)
    assert sorted(quantizer.bits()) == ["reparametrizations.bias", "reparametrizations.weight"]


# Ties


@pytest.mark.parametrize(("make", "inputs"), [(TiedModules, tokens), (TwoNames, None)])
def test_ties_share_one_quantizer(make, inputs):
    """Tied tensors have one logit per group, one sample per forward, and one stored copy."""
    model = seeded(make)
    quantizer = diffq.DiffQuantizer(model, min_size=0)
    shared = [q for q in quantizers_in(model) if len(q.plan.names) == 2]
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
    assert close(*grads, SUMS)

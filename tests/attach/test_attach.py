"""Quantizers put on a model: what changes in it, and what does not."""

import inspect
import sys
from functools import partial
from itertools import count

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import diffq
from tests.compare import close, same_bits
from tests.holder import bits_of, quantizers_in, weight_quantizers
from tests.models import (
    MODELS,
    QUANTIZERS,
    SUMS,
    TiedHead,
    TiedModules,
    TwoNames,
    computed,
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
    """Attaching leaves the Parameter objects, their names and their values as they are."""
    model = mlp()
    before = {name: (id(p), bits_of(p)) for name, p in model.named_parameters()}
    QUANTIZERS[kind](model)
    for training in (True, False):
        model.train(training)
        for name, (identity, value) in before.items():
            module, _, attribute = name.partition(".")
            parameter = getattr(model.get_submodule(module), attribute)
            assert id(parameter) == id(model.get_parameter(name)) == identity
            assert bits_of(parameter) == value


def test_optimizer_made_before_trains_the_model():
    """An optimizer from before the quantizer moves the weights and nothing else of the model."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    ids = {id(p) for p in model.parameters()}
    quantizer = diffq.QATQuantizer(model, min_size=0)
    before = {name: bits_of(p) for name, p in model.named_parameters()}
    step(model, optimizer, torch.randn(4, 16), quantizer)
    assert {id(p) for p in model.parameters()} == ids
    assert not any(before[name] == bits_of(p) for name, p in model.named_parameters())


def test_attach_draws_no_random_numbers():
    """Making a quantizer leaves the random number generator where it was."""
    torch.manual_seed(3)
    model = mlp()
    before = torch.get_rng_state()
    diffq.DiffQuantizer(model, min_size=0)
    assert same_bits(torch.get_rng_state(), before)


def test_quantizers_take_the_mode_of_their_modules():
    """Where only some modules are in eval mode, those compute with quantized weights at once."""
    model = mlp().eval()
    model[2].train()
    quantizer = diffq.DiffQuantizer(model, min_size=0)
    quantizer.no_optimizer()
    plain, quantized = snapshot_of(model), computed(restored(mlp, quantizer))
    one, two = computed(model), computed(model)
    assert same_bits(
        [one[n] for n in ("0.weight", "0.bias")], [quantized[n] for n in ("0.weight", "0.bias")]
    )
    for name in ("2.weight", "2.bias"):
        assert not any(same_bits(one[name], other[name]) for other in (two, plain, quantized))
    assert not same_bits(one["0.weight"], plain["0.weight"])


#: The modules that change a model when a quantizer is attached to it.
_ATTACHING = {
    f"diffq.attach.{name}" for name in ("attachment", "checkpoints", "classes", "learned")
}


class _Raises:
    """Raises an error at one of the calls of functions and methods that attach.

    Attributes:
        raised: whether there were as many calls.
    """

    def __init__(self, error, position):
        self.error, self.left, self.raised = error, position, False

    def __call__(self, frame, event, arg):
        # Python drops the errors of generators that it closes.
        if event != "call" or frame.f_code.co_flags & inspect.CO_GENERATOR:
            return
        if frame.f_globals["__name__"] in _ATTACHING:
            self.left -= 1
            if self.left < 0:
                self.raised = True
                raise self.error("made up")

    def attach(self, make, model):
        """Attaches a quantizer, as far as it comes."""
        sys.setprofile(self)
        try:
            make(model)
        except self.error:
            pass
        finally:
            sys.setprofile(None)


def _normed():
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 2)), nn.Linear(2, 2))


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("make", [mlp, partial(nn.LSTM, 2, 2), TiedModules, TwoNames, _normed])
def test_failure_while_attaching_leaves_no_trace(make, error):
    """An error or Ctrl-C anywhere while tensors are covered takes everything back."""
    model, attach = make(), partial(diffq.DiffQuantizer, min_size=0)
    before = fingerprint(model)
    for position in count():
        raises = _Raises(error, position)
        raises.attach(attach, model)
        if not raises.raised:
            break
        assert fingerprint(model) == before, position
    assert diffq.quantizer_of(model).detach() is model
    assert fingerprint(model) == before


def test_failure_while_making_a_quantizer_leaves_no_trace():
    """An error for a late tensor comes before the first one is touched."""
    model = mlp()
    before = fingerprint(model)
    with torch.no_grad():
        model[2].bias[0] = float("nan")
    with pytest.raises(diffq.WeightError, match=r"2\.bias"):
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
        grads.append((model.embed.weight.grad, weight_quantizers(model)["embed.weight"].grad))
    assert close(*grads, SUMS)

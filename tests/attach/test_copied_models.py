"""Copies, pickles and averages of attached models and of their parts."""

import copy
import itertools
import pickle
from itertools import cycle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import diffq
from tests.compare import close, same_bits
from tests.holder import by_pickle, by_torch
from tests.models import (
    MODELS,
    QUANTIZERS,
    ConvNet,
    TiedModules,
    after_steps,
    attached,
    encoder,
    evaluate_alike,
    mlp,
    pairs,
    snapshot_of,
    step,
)
from tests.readers import (
    COARSE,
    Reader,
    computes_with_what_is_stored,
    readers,
    reads_parameters,
    x16,
)

WAYS = [copy.deepcopy, by_torch, by_pickle]


@pytest.mark.parametrize(
    ("kind", "name", "way"),
    [(*pair, way) for pair, way in zip(pairs(QUANTIZERS, MODELS), cycle(WAYS), strict=False)],
)
def test_whole_models(kind, name, way):
    """A copy has the state, the classes and the quantizer, trains, and detaches to plain."""
    model, quantizer, inputs = after_steps(name, kind)
    model(inputs)
    other = way(model)
    own = diffq.quantizer_of(other)
    assert own is not quantizer
    assert own.model is other
    assert same_bits(snapshot_of(other), snapshot_of(model))
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    assert evaluate_alike(other, model, inputs)
    assert computes_with_what_is_stored(MODELS[name][0], other, own)
    before = snapshot_of(model)
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    own.setup_optimizer(optimizer)
    step(other.train(), optimizer, inputs, own)
    assert same_bits(snapshot_of(model), before)
    assert reads_parameters(other)
    own.detach()
    assert {type(m) for m in other.modules()} == {type(m) for m in MODELS[name][0]().modules()}
    assert computes_with_what_is_stored(MODELS[name][0], model.eval(), quantizer)


@pytest.mark.parametrize("way", WAYS)
def test_parts(way):
    """A copied part reads its own Parameters, under plain names, and can be attached by itself."""
    model, _ = attached(readers, **COARSE)
    model(x16())
    part = way(model[0])
    assert reads_parameters(part)
    assert same_bits(part[0].weight.detach(), model[0][0].weight.detach())
    assert [n for n, _ in part.named_parameters()] == [n for n, _ in model[0].named_parameters()]
    holder = nn.Sequential(part, nn.Linear(16, 4))
    quantizer = diffq.QATQuantizer(holder, bits=4, min_size=0)
    holder(x16()).sum().backward()
    assert part[0].weight.grad.any()
    assert model[0][0].weight.grad is None
    assert diffq.quantizer_of(holder) is quantizer
    quantizer.detach()
    assert type(part[0]) is Reader


def test_detaching_the_original_leaves_copied_parts():
    """A part that was copied can be used and attached after the original is detached."""
    model, quantizer = attached(readers)
    part = copy.deepcopy(model[0])
    quantizer.detach()
    part(x16()).sum().backward()
    assert reads_parameters(part)
    diffq.QATQuantizer(part, min_size=0).detach()
    for layer in (part[0], model[0][0]):
        layer(x16())
        assert same_bits(layer.seen[-1], layer.weight.detach())


@pytest.mark.parametrize("training", [True, False])
def test_copies_inside_of_a_forward(training):
    """A copy that a forward makes on its way reads Parameters, and evaluates by itself."""

    class Copying(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()

        def forward(self, x):
            self.kept = [copy.deepcopy(self.body), pickle.dumps(self.body)]
            return self.body(x)

    model, _ = attached(Copying, **COARSE)
    model.train(training)(x16())
    copied, pickled = model.kept
    for body in (copied, pickle.loads(pickled)):  # noqa: S301
        assert reads_parameters(body)
        assert same_bits(snapshot_of(body), snapshot_of(model.body))
        body(x16())


def test_copies_in_inference_mode():
    """A copy made under inference mode evaluates there as often as it is called."""
    model, _ = attached(mlp, **COARSE)
    model.eval()
    inputs = x16()
    with torch.inference_mode():
        other = copy.deepcopy(model)
        assert close(other(inputs), model(inputs))
        assert close(other(inputs), model(inputs))
    model.train()(inputs).sum().backward()


def test_shallow_copies_share_the_parameters():
    """`copy.copy` of a layer is the layer's class with the same Parameter."""
    model, _ = attached(mlp)
    layer = copy.copy(model[0])
    assert isinstance(layer, nn.Linear)
    assert layer.weight is model[0].weight


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("kind", ["diffq", "lsq"])
def test_averages_go_on_when_bits_freeze(kind, buffers):
    """torch's averaged model follows a training through the freeze of its bits."""
    model, quantizer = attached(ConvNet, kind)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=buffers)
    optimizer, inputs = torch.optim.SGD(model.parameters(), 0.05), torch.randn(4, 3, 8, 8)
    for place in range(6):
        average = {n: p.detach().clone() for n, p in ema.module.named_parameters()}
        step(model, optimizer, inputs, quantizer)
        if place == 3 and kind == "diffq":
            quantizer.freeze_bits()
        ema.update_parameters(model)
        if place:
            wanted = 0.5 * average["down.weight"] + 0.5 * model.down.weight.detach()
            assert close(ema.module.down.weight.detach(), wanted)
    own = diffq.quantizer_of(ema)
    ema.eval()
    assert ema(inputs).isfinite().all()
    assert computes_with_what_is_stored(ConvNet, ema.module, own)


def test_averages_over_the_state_dict():
    """An average over the entries of the state dict follows through a freeze too."""
    model, quantizer = attached(mlp)
    ema = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for place in range(4):
        step(model, optimizer, x16(), quantizer)
        if place == 2:
            quantizer.freeze_bits()
        with torch.no_grad():
            pairs = zip(ema.state_dict().values(), model.state_dict().values(), strict=True)
            for average, value in pairs:
                average.copy_((0.5 * average + 0.5 * value).to(average.dtype))
    ema.eval()
    assert computes_with_what_is_stored(mlp, ema, diffq.quantizer_of(ema))
    ema.load_state_dict(ema.state_dict())


@pytest.mark.parametrize("kind", ["diffq", "qat", "lsq"])
def test_a_teacher_that_averages_by_data(kind):
    """A teacher in eval that is averaged through `.data` changes with each step."""
    model, _ = attached(mlp, kind)
    teacher = copy.deepcopy(model).eval()
    own, inputs = diffq.quantizer_of(teacher), x16()
    with torch.no_grad():
        targets = [teacher(inputs)]
        for _ in range(3):
            for p in model.parameters():
                p.add_(torch.randn_like(p))
            for a, b in zip(teacher.parameters(), model.parameters(), strict=True):
                a.data.mul_(0.5).add_(b.data, alpha=0.5)
            targets.append(teacher(inputs))
            assert computes_with_what_is_stored(mlp, teacher, own)
    assert not any(close(a, b) for a, b in itertools.pairwise(targets))


def test_ties_of_copies():
    """Ties of a copy are ties, and each copy has its own."""
    model, _ = attached(TiedModules)
    for way in WAYS:
        other = way(model)
        assert other.head.weight is other.embed.weight
        assert other.head.weight is not model.head.weight


def test_many_copies_of_a_layer():
    """Layers that torch copies from an attached one, as encoders do, are plain layers."""
    model, _ = attached(encoder)
    layer = model.layers[0]
    stack = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    assert reads_parameters(stack)
    stack.eval()(torch.randn(2, 5, 16))
    quantizer = diffq.QATQuantizer(stack, bits=4, min_size=0)
    stack.train()(torch.randn(2, 5, 16)).sum().backward()
    quantizer.detach()

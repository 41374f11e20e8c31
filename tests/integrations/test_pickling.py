"""Whole models through `torch.save`, pickle, other processes, and deep copies of them and parts."""

import copy

import pytest
import torch
from torch import multiprocessing, nn

import diffq
from tests.compare import close, same_bits
from tests.holder import by_pickle, by_torch
from tests.integrations.tiny import (
    KINDS,
    evaluates_as_shipped,
    floats,
    perturb,
    prepared,
    same_weights,
    shipped,
)
from tests.models import (
    QUANTIZERS,
    ConvNet,
    Recurrent,
    TiedModules,
    encoder,
    seeded,
    snapshot_of,
    step,
    tokens,
)


def images():
    """A batch for ConvNet."""
    return torch.randn(4, 3, 8, 8)


def sequences():
    """A batch for the encoder."""
    return torch.randn(3, 7, 16)


MODELS = {
    "conv": (ConvNet, images),
    "tied": (TiedModules, tokens),
    "lstm": (Recurrent, tokens),
    "encoder": (encoder, sequences),
}


def types(model):
    """The names of the classes of all modules."""
    return [(name, type(module).__name__) for name, module in model.named_modules()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", [by_torch, by_pickle, copy.deepcopy])
def test_whole_model(way, name, kind):
    """A model that went whole through a file evaluates as before, and trains on its own."""
    make, make_input = MODELS[name]
    model, _ = prepared(make, kind)
    perturb(model)
    x = make_input()
    assert evaluates_as_shipped(model, make, x)  # there is a cache, which must not travel
    before = snapshot_of(model)
    loaded = way(model)
    assert types(loaded) == types(model)
    assert isinstance(loaded, make if isinstance(make, type) else nn.TransformerEncoder)
    assert same_bits(snapshot_of(loaded), before)
    assert evaluates_as_shipped(loaded, make, x)
    optimizer = torch.optim.Adam(loaded.parameters(), 1e-2)
    quantizer = diffq.quantizer_of(loaded)
    quantizer.setup_optimizer(optimizer, lr=0.1)
    step(loaded.train(), optimizer, x, quantizer)
    assert not close(floats(loaded), floats(model))
    assert same_bits(snapshot_of(model), before)
    assert same_weights(quantizer.detach(), loaded)
    plain = {module.__class__ for module in make().modules()}
    assert {module.__class__ for module in loaded.modules()} == plain


@pytest.mark.parametrize("way", [by_torch, by_pickle])
def test_in_training(way):
    """A model whose optimizer is set up goes whole through a file, between steps."""
    model = seeded(TiedModules)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    quantizer = QUANTIZERS["diffq"](model)
    quantizer.setup_optimizer(optimizer, lr=0.1)
    inputs = tokens()
    step(model, optimizer, inputs, quantizer)
    loaded = way(model)
    assert loaded.training
    assert same_bits(snapshot_of(loaded), snapshot_of(model))
    step(model, optimizer, inputs, quantizer)
    assert evaluates_as_shipped(loaded, TiedModules, inputs)
    assert evaluates_as_shipped(model, TiedModules, inputs)


def test_plain_after_detaching():
    """A detached model is pickled as if it had never been attached."""
    model, quantizer = prepared(TiedModules)
    quantizer.detach()
    loaded = by_pickle(model)
    assert type(loaded) is TiedModules
    assert same_bits(snapshot_of(loaded), snapshot_of(seeded(TiedModules)))


def _evaluate(model, x, pipe):
    """What the other process does: evaluates the model, and says what it is."""
    with torch.no_grad():
        output = model.eval()(x)
    pipe.send((types(model), output.numpy(), diffq.quantizer_of(model).mean_bits()))
    pipe.close()


def test_spawned_process():
    """An attached model is an argument of a spawned process, which evaluates it as here."""
    model, quantizer = prepared(TiedModules)
    perturb(model)
    inputs = tokens()
    context = multiprocessing.get_context("spawn")
    mine, other = context.Pipe(duplex=False)
    process = context.Process(target=_evaluate, args=(model, inputs, other))
    process.start()
    other.close()
    found, output, bits = mine.recv()
    process.join()
    assert process.exitcode == 0
    assert found == types(model)
    assert bits == quantizer.mean_bits()
    assert close(torch.from_numpy(output), shipped(quantizer, TiedModules())(inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_copy_of_a_part(kind):
    """A copied part is a plain module with the float weights, and takes a quantizer of its own."""

    def make():
        return nn.Sequential(nn.Sequential(nn.Linear(16, 32), nn.Tanh()), nn.Linear(32, 8))

    model, _ = prepared(make, kind)
    x, before = torch.randn(5, 16), snapshot_of(model)
    assert evaluates_as_shipped(model, make, x)
    part = copy.deepcopy(model[0])
    wanted = dict(seeded(make)[0].state_dict())
    assert same_bits(dict(part.state_dict()), wanted)
    plain = make()[0]
    plain.load_state_dict(wanted)
    with torch.no_grad():
        assert close(part(x), plain(x))
    quantizer = QUANTIZERS[kind](part)
    assert evaluates_as_shipped(part, lambda: make()[0], x)
    quantizer.no_optimizer()
    part.train()(x).sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert same_bits(snapshot_of(model), before)
    assert evaluates_as_shipped(model, make, x)


def test_copy_of_a_layer():
    """A copied layer is what a copy of the plain layer is: its class, its values, its training."""
    model, _ = prepared(ConvNet)
    layer = copy.deepcopy(model.down)
    assert isinstance(layer, nn.Conv2d)
    assert isinstance(layer.weight, nn.Parameter)
    assert layer.weight is not model.down.weight
    assert same_bits(layer.weight.detach(), seeded(ConvNet).down.weight.detach())
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    step(layer, optimizer, images())
    assert not same_bits(layer.weight.detach(), seeded(ConvNet).down.weight.detach())
    assert same_bits(model.down.weight.detach(), seeded(ConvNet).down.weight.detach())


@pytest.mark.parametrize("way", [by_torch, by_pickle])
def test_part_through_a_file(way):
    """A part that goes through a file alone holds the float weights."""
    model, _ = prepared(ConvNet)
    loaded = way(model.down)
    assert same_bits(dict(loaded.state_dict()), dict(seeded(ConvNet).down.state_dict()))
    assert loaded(images()).shape == (4, 8, 4, 4)

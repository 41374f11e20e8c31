"""Methods that compute with a module's own tensors, and blocks in which reads are computed."""

import pytest
import torch
from torch import nn

from tests.compare import close, same_bits
from tests.models import QUANTIZERS, TiedHead, attached, mlp, restored, tokens
from tests.readers import (
    COARSE,
    LEARNED,
    Reader,
    computes_with_what_is_stored,
    learned_in,
    readers,
    reads_parameters,
    stored,
    x16,
)


class Clip(nn.Module):
    """Two encoders, whose methods read the model's own projection and gain."""

    def __init__(self):
        super().__init__()
        self.body = Reader()
        self.projection = nn.Parameter(torch.randn(16, 16) / 4)
        self.gain = nn.Parameter(torch.randn(16))
        self.seen = []

    def encode_text(self, text, scale=1.0):
        self.seen.append(self.projection.detach().clone())
        return self.body(text) @ self.projection * scale

    def encode_image(self, *, image):
        self.seen.append(self.projection.detach().clone())
        return (image * self.gain) @ self.projection

    def both(self, x):
        return self.encode_text(x) + self.encode_image(image=x)

    def forward(self, x):
        return self.both(x)

    def reset(self, scale=0.5):
        with torch.no_grad():
            self.projection.mul_(scale)
        return self.projection

    @property
    def transposed(self):
        return self.projection.t()


def _text(model, x):
    return model.encode_text(x)


def _image(model, x):
    return model.encode_image(image=x)


@pytest.mark.parametrize("call", [_text, _image])
@pytest.mark.parametrize("kind", ["diffq", "diffq-uniform", "diffq-fixed", "quant-noise"])
def test_methods_train_on_noise(call, kind):
    """A method that is called with a tensor computes with its own noise, and passes gradients."""
    model, _ = attached(Clip, kind)
    for _ in range(2):
        call(model, x16()).square().sum().backward()
        assert reads_parameters(model)
    one, two = model.seen
    assert not same_bits(one, two)
    assert not same_bits(one, model.projection.detach())
    assert model.projection.grad.any()
    if kind != "diffq-fixed" and LEARNED in dict(model.named_parameters()):
        assert learned_in(model).grad.any()


@pytest.mark.parametrize("call", [_text, _image])
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_methods_evaluate_what_is_stored(call, kind):
    """In eval mode a method computes with the stored values."""
    model, quantizer = attached(Clip, kind)
    model.eval()
    fresh, inputs = restored(Clip, quantizer), x16()
    for context in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with context():
            assert close(call(model, inputs).detach(), call(fresh, inputs).detach())
        assert same_bits(model.seen[-1], fresh.projection.detach())
        assert reads_parameters(model)


def test_methods_share_the_sample_of_the_forward():
    """Methods that a forward calls, or that call each other, read the forward's one sample."""
    model, _ = attached(Clip)
    model(x16())
    assert same_bits(*model.seen)
    model.seen.clear()
    model(x16())
    assert same_bits(*model.seen)


def test_methods_without_tensors_read_parameters():
    """A method that gets no tensor is no forward: what it writes lasts, and it gives Parameters."""
    for training in (True, False):
        model, quantizer = attached(Clip, **COARSE)
        model.train(training)
        before = model.projection.detach().clone()
        assert model.reset() is model._parameters["projection"]
        assert model.reset(scale=0.5) is model._parameters["projection"]
        assert same_bits(model.projection.detach(), before * 0.25)
        assert close(model.transposed.detach(), (before * 0.25).t())
        model.eval()
        assert computes_with_what_is_stored(Clip, model, quantizer)


def test_inherited_and_overridden_methods():
    """Methods of base classes, and those that call them by `super()`, compute as well."""

    class Base(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(16, 16))

        def look(self, x):
            return x @ self.table

        def plain(self, x):
            return 2 * x

    class Derived(Base):
        def look(self, x):
            return super().look(x) + 1

        def other(self, x):
            return self.look(x) @ self.table

        def forward(self, x):
            return self.other(x)

    model, quantizer = attached(Derived, **COARSE)
    inputs = x16()
    for method in ("look", "other"):
        assert not close(*(getattr(model, method)(inputs) for _ in range(2)))
    assert close(model.plain(inputs), 2 * inputs)
    model.eval()
    fresh = restored(Derived, quantizer)
    for method in ("look", "other"):
        assert close(getattr(model, method)(inputs), getattr(fresh, method)(inputs))


def test_methods_that_step_keep_one_copy():
    """A method that reads a weight at each of many steps keeps one noisy copy for backward."""

    class Rolling(nn.Module):
        def __init__(self):
            super().__init__()
            self.recurrent = nn.Parameter(torch.randn(64, 64) / 8)

        def roll(self, x):
            for _ in range(40):
                x = torch.tanh(x @ self.recurrent)
            return x

        def forward(self, x):
            return self.roll(x)

    model, _ = attached(Rolling)
    kept = {}
    for call in (model, model.roll):
        kept[call] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, found=kept[call]: found.setdefault(t.data_ptr(), t), lambda t: t
        ):
            call(torch.randn(2, 64))
    whole, method = (sum(t.numel() for t in found.values()) for found in kept.values())
    assert method == whole
    assert whole < 20 * 64 * 64


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_computing_in_eval(kind):
    """In a block of `computing()`, reads in eval mode give the stored values."""
    model, quantizer = attached(readers, kind)
    model.eval()
    assert computes_with_what_is_stored(readers, model, quantizer)
    assert reads_parameters(model)
    with torch.no_grad():
        model[0][0].weight.mul_(0.5)
    assert computes_with_what_is_stored(readers, model, quantizer)


@pytest.mark.parametrize("kind", ["diffq", "diffq-fixed", "quant-noise"])
def test_computing_in_training(kind):
    """In training a block has one sample, which forwards in it share, and the next has another."""
    model, quantizer = attached(readers, kind)
    layer, seen = model[0][0], []
    for _ in range(2):
        with quantizer.computing():
            first = layer.weight.detach().clone()
            model(x16())
            layer(x16())
            assert same_bits(first, layer.seen[-1])
            assert same_bits(first, layer.seen[-2])
            assert same_bits(first, layer.weight.detach())
        seen.append(first)
        assert reads_parameters(model)
    assert not same_bits(*seen)


def test_gradients_of_a_block():
    """A loss that reads weights in a block trains them and their bits."""
    model, quantizer = attached(TiedHead)
    with quantizer.computing():
        loss = (tokens().float() @ torch.ones(7, 24) @ model.embed.weight).square().sum()
    loss.backward()
    assert model.embed.weight.grad.any()
    assert learned_in(model).grad.any()
    assert reads_parameters(model)


def test_blocks_in_blocks():
    """A block in a block is the outer one's, and ends without ending it."""
    model, quantizer = attached(mlp, **COARSE)
    with quantizer.computing():
        outer = model[0].weight.detach().clone()
        with quantizer.computing():
            assert same_bits(model[0].weight.detach(), outer)
        assert same_bits(model[0].weight.detach(), outer)
    assert reads_parameters(model)


def test_a_block_in_a_forward():
    """A block inside of a forward is the forward's, with its sample, and does not end it."""

    class Computing(Looking):
        def forward(self, x):
            self.look()
            with self.quantizers[0].computing():
                self.look()
            self.look()
            return self.layer(x)

    model, quantizer = attached(Computing, **COARSE)
    model.quantizers.append(quantizer)
    model(x16())
    assert all(same_bits(weight, model.layer.seen[0]) for weight in model.seen)
    assert reads_parameters(model)


class Looking(nn.Module):
    """A model that notes its layer's weight, and can hold its quantizer."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen, self.quantizers = Reader(), [], []

    def look(self):
        self.seen.append(self.layer.weight.detach().clone())


def test_a_wrapper_that_reads_a_part():
    """An unattached model around reads Parameters, unless it says that it computes."""

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Linear(16, 16)
            self.quantizer = None

        def forward(self, x):
            plain = self.part.weight
            with self.quantizer.computing():
                computed = self.part.weight
                return plain, computed, x @ computed.t()

    model = Wrapper()
    model.quantizer = QUANTIZERS["diffq"](model.part, **COARSE)
    model.quantizer.no_optimizer()
    model.eval()
    plain, weight, _ = model(x16())
    assert plain is model.part._parameters["weight"]
    values = stored(lambda: nn.Linear(16, 16), model.quantizer)
    assert all(map(torch.equal, [weight], [values["weight"]]))

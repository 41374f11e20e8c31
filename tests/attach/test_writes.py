"""Writes to quantized tensors: inside of a forward they cannot last, outside they count at once."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import diffq
from tests.compare import close, same_bits
from tests.models import attached, mlp, restored, seeded, snapshot_of
from tests.readers import computes_with_what_is_stored, reads_parameters, x16


def _normalizes(layer):
    with torch.no_grad():
        layer.weight.copy_(F.normalize(layer.weight, dim=1))


def _scales(layer):
    with torch.no_grad():
        layer.weight.mul_(0.5)


def _scales_the_bias(layer):
    with torch.no_grad():
        layer.bias.add_(1)


def _sets_a_row(layer):
    with torch.no_grad():
        layer.weight[0] = 0


def _initializes(layer):
    nn.init.zeros_(layer.weight)


def _writes_through_a_view(layer):
    layer.weight.detach().view(-1)[:3].zero_()


def _writes_to_data(layer):
    layer.weight.data.mul_(0.5)


def _sets_data(layer):
    layer.weight.data = torch.renorm(layer.weight.data, 2, 0, 0.3)


WRITES = [
    _normalizes,
    _scales,
    _scales_the_bias,
    _sets_a_row,
    _initializes,
    _writes_through_a_view,
    _writes_to_data,
    _sets_data,
]


class Own(nn.Linear):
    """A layer that writes to its own tensors before it computes, from the n-th forward on."""

    def __init__(self, write, after=0):
        super().__init__(16, 16)
        self.write, self.left = write, after

    def forward(self, x):
        self.left -= 1
        if self.left < 0:
            self.write(self)
        return super().forward(x)


class Parent(nn.Module):
    """A model that writes to its layer's tensors after it computes, as codebooks do."""

    def __init__(self, write, after=0):
        super().__init__()
        self.layer, self.write, self.left = nn.Linear(16, 16), write, after

    def forward(self, x):
        x = self.layer(x)
        self.left -= 1
        if self.left < 0:
            self.write(self.layer)
        return x


def _name(write):
    return "bias" if write is _scales_the_bias else "weight"


def _assigns(layer):
    layer.weight = nn.Parameter(layer.weight.detach() * 0.9)


def _deletes(layer):
    weight = layer.weight.detach()
    del layer.weight
    layer.weight = nn.Parameter(weight * 0.9)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [Own, Parent])
@pytest.mark.parametrize("write", [_assigns, _deletes])
def test_assignments_inside_of_a_forward(write, make, training):
    """They are an error with the tensor's name; the Parameter is kept, for noise must not last."""
    model, _ = attached(lambda: nn.Sequential(make(write), nn.Tanh()), init_bits=3)
    model.train(training)
    before = snapshot_of(model)
    with pytest.raises(diffq.AttachError, match="weight"):
        model(x16())
    assert reads_parameters(model)
    assert same_bits(snapshot_of(model), before)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("make", [Own, Parent])
@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
def test_writes_inside_of_a_forward(write, make, after, training):
    """They are an error with the tensor's name and the remedy, whenever they first happen."""
    if write is _writes_to_data and after:
        pytest.skip("a write through `.data` leaves no trace, and is looked for once in each mode")
    model, _ = attached(lambda: nn.Sequential(make(write, after), nn.Tanh()), init_bits=3)
    model.train(training)
    for _ in range(after):
        model(x16()).sum().backward()
    before = snapshot_of(model)
    with pytest.raises(diffq.AttachError, match=rf"{_name(write)}(.|\n)*exclude"):
        model(x16())
    assert same_bits(snapshot_of(model), before)
    assert reads_parameters(model)
    model[0].left = 1
    model(x16())


@pytest.mark.parametrize("make", [Own, Parent])
@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
def test_writes_to_tensors_that_are_left_out(write, make):
    """With the layer excluded they do to it what they do in a plain model."""
    layer = "" if make is Own else "layer."
    wholes = []
    for attach in (False, True):
        model = seeded(lambda: nn.Sequential(make(write), nn.Linear(16, 4)))
        if attach:
            patterns = [f"0.{layer}weight", f"0.{layer}bias"]
            diffq.QATQuantizer(model, bits=4, min_size=0, exclude=patterns)
        with torch.no_grad():
            model(torch.ones(1, 16))
        wholes.append(snapshot_of(model[0]))
    assert same_bits(*wholes)


@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
def test_writes_without_gradients(write):
    """A training forward under no_grad raises as well."""
    model, _ = attached(lambda: nn.Sequential(Own(write)))
    before = snapshot_of(model)
    with torch.no_grad(), pytest.raises(diffq.AttachError, match=_name(write)):
        model(x16())
    assert same_bits(snapshot_of(model), before)


class Momentum(nn.Module):
    """A pair whose second net follows the first in each forward, through `parameters()`."""

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        with torch.no_grad():
            for k, q in zip(self.key.parameters(), self.query.parameters(), strict=True):
                k.data = k.data * 0.5 + q.data * 0.5
            target = self.key(x)
        return (self.query(x) - target).square().mean()


def test_writes_to_parameters_inside_of_a_forward():
    """What a forward writes to the Parameters themselves lasts."""
    model, quantizer = attached(Momentum, "qat")
    wanted = 0.5 * model.key.weight.detach() + 0.5 * model.query.weight.detach()
    model(x16()).backward()
    assert close(model.key.weight.detach(), wanted)
    assert model.query.weight.grad.any()
    model.eval()
    with torch.no_grad():
        model(x16())
        model.query.weight.zero_()
    assert computes_with_what_is_stored(Momentum, model, quantizer)


def test_buffers_that_a_forward_writes():
    """Statistics that forwards count are written as in a plain model."""
    plain = seeded(lambda: nn.Sequential(nn.BatchNorm1d(16, affine=False), nn.Linear(16, 4)))
    model, _ = attached(lambda: nn.Sequential(nn.BatchNorm1d(16, affine=False), nn.Linear(16, 4)))
    inputs = x16(8)
    for each in (plain, model):
        each(inputs)
    assert same_bits(dict(plain[0].state_dict()), dict(model[0].state_dict()))
    assert model[0].num_batches_tracked == 1


@given(place=st.integers(0, 127), value=st.sampled_from([0.25, -3.0, 1e-3]))
def test_one_element_that_is_written_in_eval(place, value):
    """Whichever element is written, the next forward in eval computes with it."""

    def make():
        return nn.Linear(16, 8, bias=False)

    model, quantizer = attached(make, "qat")
    model.eval()
    inputs = torch.eye(16)
    with torch.no_grad():
        model(inputs)
        model.weight.view(-1)[place] = value
        output = model(inputs)
    assert computes_with_what_is_stored(make, model, quantizer)
    assert close(output, restored(make, quantizer)(inputs).detach())


def _by_data(weight):
    weight.data.mul_(0.5)


def _by_numpy(weight):
    weight.detach().numpy()[...] *= 0.5


@pytest.mark.parametrize("evaluations", [0, 1, 2, 3])
@pytest.mark.parametrize("features", [16, 1000])
@pytest.mark.parametrize("write", [_by_data, _by_numpy])
def test_writes_to_data_in_eval(write, features, evaluations):
    """A weight that is written through memory is seen by the next forward, after any number."""

    def make():
        return nn.Linear(features, 20, bias=False)

    model, quantizer = attached(make, "qat")
    model.eval()
    inputs = torch.randn(2, features)
    with torch.no_grad():
        for _ in range(evaluations):
            model(inputs)
        for _ in range(2):
            write(model.weight)
            assert close(model(inputs), restored(make, quantizer)(inputs))
    assert computes_with_what_is_stored(make, model, quantizer)


def test_writes_between_a_forward_and_its_backward():
    """A `.data` write after a forward does not change what its backward computes with."""
    grads = []
    for write in (False, True):
        model, _ = attached(mlp)
        torch.manual_seed(3)
        loss = model(x16()).square().sum()
        if write:
            model[2].weight.data.zero_()
        loss.backward()
        grads.append(model[0].weight.grad)
    assert close(*grads)

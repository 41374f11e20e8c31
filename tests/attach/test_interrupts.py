"""Errors and Ctrl-C anywhere: afterwards reads give Parameters, and training goes on."""

import sys

import pytest
import torch
from torch import nn

import diffq
from tests.compare import close, same_bits
from tests.models import SUMS, attached, gradients
from tests.readers import COARSE, Reader, reads_parameters, seen_by, x16

ERRORS = pytest.mark.parametrize(
    "error", [ArithmeticError, KeyboardInterrupt, SystemExit, GeneratorExit]
)


class Failing(nn.Module):
    """Three layers, and a place for each error: in the root, a layer, its hooks, a method."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(Reader(), Reader())
        self.gain = nn.Parameter(torch.randn(16))
        self.fails = {}

    def fail(self, place):
        if place in self.fails:
            raise self.fails[place]

    def encode(self, x):
        x = x * self.gain
        self.fail("method")
        return x

    def forward(self, x):
        x = self.layers(self.encode(x))
        self.fail("root")
        return x


def _failing():
    """A model whose hooks fail where it is told to."""
    model = Failing()
    layer = model.layers[1]
    layer.register_forward_pre_hook(lambda *_: model.fail("pre-hook"))
    layer.register_forward_hook(lambda *_: model.fail("hook"))
    model.layers[0].register_full_backward_hook(lambda *_: model.fail("backward"))
    return model


def _step(model, seed=3):
    """The gradients of a training step."""
    model.zero_grad()
    torch.manual_seed(seed)
    model(x16()).square().sum().backward()
    return gradients(model)


PLACES = ["method", "root", "pre-hook", "hook", "backward"]


@ERRORS
@pytest.mark.parametrize("place", PLACES)
def test_errors_in_training(place, error):
    """After it, reads give Parameters, and the next step is that of a model without errors."""
    model, _ = attached(_failing)
    wanted = _step(model)
    model.fails = {place: error}
    with pytest.raises(error):
        _step(model, seed=8)
    assert reads_parameters(model)
    model.fails = {}
    assert close(_step(model), wanted, SUMS)
    one, two = model(x16()), model(x16())
    assert not close(one, two)
    assert reads_parameters(model)


@ERRORS
@pytest.mark.parametrize("place", PLACES[:-1])
def test_errors_in_eval(place, error):
    """In eval mode likewise, with gradients and without."""
    model, _ = attached(_failing)
    inputs = x16()
    wanted = model.eval()(inputs)
    for enabled in (True, False):
        model.fails = {place: error}
        with torch.set_grad_enabled(enabled), pytest.raises(error):
            model(inputs)
        assert reads_parameters(model)
        model.fails = {}
        assert close(model(inputs), wanted)


@ERRORS
def test_errors_in_a_method(error):
    """A method that is called by itself has its own samples again after an error in it."""
    model, _ = attached(_failing, **COARSE)
    model.fails = {"method": error}
    with pytest.raises(error):
        model.encode(x16())
    assert reads_parameters(model)
    model.fails = {}
    inputs = x16()
    for _ in range(2):
        model.encode(inputs).sum().backward()
    assert not close(model.encode(inputs), model.encode(inputs))


@ERRORS
@pytest.mark.parametrize("training", [True, False])
def test_errors_in_a_block_of_computing(training, error):
    """A block of `computing()` that an error leaves is over."""
    model, quantizer = attached(_failing, **COARSE)
    model.train(training)

    def fail():
        with quantizer.computing():
            assert not reads_parameters(model)
            raise error

    with pytest.raises(error):
        fail()
    assert reads_parameters(model)
    assert (not training) == close(*(model(torch.ones(1, 16)) for _ in range(2)))


def test_a_bad_input():
    """A shape that a layer refuses is torch's own error, and the next batch trains."""
    model, _ = attached(_failing)
    with pytest.raises(RuntimeError, match="size of tensor"):
        model(torch.randn(3, 15))
    assert reads_parameters(model)
    assert all(grad is None or grad.isfinite().all() for grad in _step(model).values())


def test_a_weight_that_is_not_finite():
    """Training on NaN gives NaN, evaluating names the tensor, and a repaired weight heals both."""
    model, _ = attached(_failing)
    layer = model.layers[0]
    old = layer.weight[0, 0].item()
    with torch.no_grad():
        layer.weight[0, 0] = float("nan")
        assert not model(x16()).isfinite().all()
        with pytest.raises(diffq.WeightError, match=r"layers\.0\.weight"):
            model.eval()(x16())
        assert reads_parameters(model)
        layer.weight[0, 0] = old
        assert model(x16()).isfinite().all()
        assert model.train()(x16()).isfinite().all()
    assert reads_parameters(model)


class _Interrupt:
    """Ctrl-C at the n-th call of a Python function: where Python looks for signals."""

    def __init__(self, place):
        self.left = place

    def __call__(self, frame, event, arg):
        if event == "call" and frame.f_code.co_name != "__del__":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt


def _interrupted(model, place):
    """Whether a training step has so many calls; the last is interrupted, if torch lets it."""
    sys.settrace(tracer := _Interrupt(place))
    try:
        model(torch.ones(2, 16)).sum().backward()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
        # Ctrl-C on entry to `no_grad.__exit__` leaves gradients off in plain torch too.
        torch.set_grad_enabled(True)
    return tracer.left <= 0


def test_ctrl_c_at_any_call():
    """Ctrl-C at the entry of any function of a step leaves nothing that the next step would see."""
    model, _ = attached(_failing)
    wanted, place = _step(model), 1
    while _interrupted(model, place):
        assert reads_parameters(model), place
        place += 1
    assert place > 100
    assert close(_step(model), wanted, SUMS)


def test_a_quantizer_that_cannot_be_made():
    """An error while attaching leaves a plain model, with its classes and without a trace."""
    model = Failing()
    with torch.no_grad():
        model.gain[0] = float("inf")
    before = [(type(m), sorted(m.__dict__)) for m in model.modules()]
    with pytest.raises(diffq.WeightError, match="gain"):
        diffq.DiffQuantizer(model, min_size=0)
    assert [(type(m), sorted(m.__dict__)) for m in model.modules()] == before
    assert reads_parameters(model)
    model(x16())
    assert same_bits(seen_by(model)[0][0], model.layers[0].weight.detach())

"""Code that was written for the earlier package: its names, arguments and calls."""

import pytest
import torch
from torch import nn

import diffq
from diffq.errors import AttachError, ConfigError
from diffq.quantizers.diffq import DiffQuantizer
from diffq.quantizers.earlier import LSQ, UniformQuantizer
from diffq.quantizers.switch import QuantizeSwitch
from tests.compare import close, same_bits
from tests.holder import Holder, reloaded, weight_quantizers
from tests.models import (
    TiedModules,
    computed_weight,
    evaluate_alike,
    mlp,
    seeded,
    snapshot_of,
    step,
    tokens,
)


class Switched(DiffQuantizer, QuantizeSwitch):
    """DiffQuantizer with the three calls, whether or not its base class has them already."""


def _is_quantized(model, name):
    """Whether a model computes with the quantized weight of this name."""
    computed = computed_weight(model, name).detach()
    return same_bits(computed, weight_quantizers(model)[name].quantized())


QUANTIZERS = {
    "diffq": lambda model: Switched(model, min_size=0.0002, group_size=8),
    "uniform": lambda model: UniformQuantizer(model, bits=4, min_size=0.0002),
    "uniform-qat": lambda model: UniformQuantizer(model, bits=4, min_size=0.0002, qat=True),
    "lsq": lambda model: LSQ(model, bits=4, min_size=0.0002),
}


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_trainer_runs_unchanged(kind):
    """A loop as trainers of the earlier package have it trains, evaluates, saves and restores."""
    model = seeded(mlp)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    quantizer = QUANTIZERS[kind](model)
    quantizer.setup_optimizer(optimizer)
    before = snapshot_of(model)
    for _ in range(2):
        model.train()
        step(model, optimizer, torch.randn(4, 16), quantizer, lam=1e-3)
        best = {name: tensor.cpu().clone() for name, tensor in model.state_dict().items()}
        model.eval()(torch.ones(1, 16))
        assert quantizer.true_model_size() > 0
        assert quantizer.compressed_model_size() > 0
    assert not same_bits(before, best)
    model.load_state_dict(best)
    state = quantizer.get_quantized_state()
    state["__quantized"] = True
    fresh = mlp()
    diffq.restore_quantized_state(fresh, reloaded(state))
    assert evaluate_alike(fresh, model, torch.ones(1, 16))
    quantizer.detach()
    assert list(model.state_dict()) == list(mlp().state_dict())


def test_positions_of_arguments():
    """Arguments may be given by position, in the earlier order."""
    make = {"w": torch.randn(40, 40), "v": torch.randn(40, 40), "b": torch.randn(3)}
    model = Holder(make)
    quantizer = UniformQuantizer(model, 5, 0.001, True, True, ["v"], True)
    assert quantizer.bits()["w"].tolist() == [5]
    assert [plan.name for plan in quantizer.plan if plan.quantized] == ["w"]
    assert quantizer.get_quantized_state()["tensors"]["b"]["data"].dtype == torch.float16
    assert not same_bits(computed_weight(model, "w").detach(), make["w"])
    quantizer = LSQ(Holder(make), 5, 0.001, True, ["v"], True)
    assert quantizer.bits()["w"].tolist() == [5]
    assert [plan.name for plan in quantizer.plan if plan.quantized] == ["w"]
    assert quantizer.get_quantized_state()["tensors"]["b"]["data"].dtype == torch.float16


@pytest.mark.parametrize("kind", [UniformQuantizer, LSQ])
def test_defaults_and_checks_of_arguments(kind):
    """Bits are 8 by default and may be a whole float; ties cannot be left unfound."""
    for options in ({}, {"bits": 8.0}):
        quantizer = kind(Holder({"w": torch.randn(40, 80)}), **options)
        assert quantizer.bits()["w"].tolist() == [8]
    assert kind(Holder({"w": torch.randn(2621)})).bits() == {}
    for options in ({"bits": 3.5}, {"bits": 16}, {"bits": True}, {"detect_bound": False}):
        with pytest.raises(ConfigError):
            kind(Holder({"w": torch.randn(40, 80)}), **options)


def test_uniform_trains_in_full_precision_by_default():
    """Without qat, weights are quantized in eval mode only."""
    weight = torch.randn(40, 40)
    model = Holder({"w": weight.clone()})
    UniformQuantizer(model, bits=3, min_size=0)
    assert same_bits(computed_weight(model, "w").detach(), weight)
    assert not same_bits(computed_weight(model.eval(), "w").detach(), weight)


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_quantize_and_unquantize(kind):
    """quantize() gives a training model the weights of eval mode; unquantize() ends it."""
    model = seeded(TiedModules)
    quantizer = QUANTIZERS[kind](model)
    quantizer.no_optimizer()
    inputs = tokens()
    with torch.no_grad():
        weight, outputs = computed_weight(model.eval(), "head.weight").clone(), model(inputs)
        model.train()
        stored = snapshot_of(model)
        quantizer.quantize()
        quantizer.quantize()
        assert model.training
        assert same_bits(computed_weight(model, "embed.weight"), weight)
        assert close(model(inputs), outputs)
        quantizer.unquantize()
        trained = computed_weight(model, "embed.weight")
    assert same_bits(stored, snapshot_of(model))
    assert (kind in ("diffq", "uniform")) == (not close(trained, weight))


def test_unquantize_follows_each_module():
    """After unquantize(), a part of the model that is in eval mode stays quantized."""
    model = seeded(lambda: nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)))
    quantizer = QUANTIZERS["diffq"](model)
    quantizer.no_optimizer()
    model[1].eval()
    quantizer.quantize()
    assert [_is_quantized(model, name) for name in ("0.weight", "1.weight")] == [True, True]
    quantizer.unquantize()
    assert [_is_quantized(model, name) for name in ("0.weight", "1.weight")] == [False, True]
    model.eval()
    with quantizer.enter_quantize():
        pass
    assert [_is_quantized(model, name) for name in ("0.weight", "1.weight")] == [True, True]


def test_enter_quantize():
    """The block quantizes, may be nested, and ends when it raises, in the model's mode."""
    model = seeded(mlp)
    quantizer = QUANTIZERS["diffq"](model)
    quantizer.no_optimizer()
    modes = []

    def _see():
        modes.append(_is_quantized(model, "0.weight"))

    with quantizer.enter_quantize():
        _see()
        with quantizer.enter_quantize():
            _see()
        _see()
    _see()
    with pytest.raises(KeyError), quantizer.enter_quantize():
        raise KeyError
    _see()
    with quantizer.enter_quantize():
        model.eval()
    _see()
    assert modes == [True, True, True, False, False, True]


def test_weights_can_be_read_in_the_block():
    """In the block, a weight that code reads is the quantized one, and the Parameter after it."""
    model = seeded(mlp)
    quantizer = QUANTIZERS["diffq"](model)
    parameter, quantized = model[0].weight, weight_quantizers(model)["0.weight"].quantized()
    with quantizer.enter_quantize():
        assert same_bits(model[0].weight.detach(), quantized)
    assert model[0].weight is parameter
    assert not same_bits(parameter.detach(), quantized)


def test_gradients_pass_while_quantized():
    """In a quantized training forward, gradients reach the weights."""
    model = seeded(mlp)
    quantizer = QUANTIZERS["diffq"](model)
    quantizer.no_optimizer()
    with quantizer.enter_quantize():
        model(torch.randn(3, 16)).sum().backward()
    assert model[0].weight.grad.any()


@pytest.mark.parametrize("call", ["quantize", "unquantize"])
def test_calls_after_detach(call):
    """A detached quantizer says so."""
    quantizer = QUANTIZERS["uniform"](mlp())
    quantizer.detach()
    with pytest.raises(AttachError):
        getattr(quantizer, call)()
    with pytest.raises(AttachError), quantizer.enter_quantize():
        pass

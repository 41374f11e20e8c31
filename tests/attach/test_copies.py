"""Copies of a model with a quantizer: deep copies and averages."""

import copy

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

import diffq
from tests.compare import same_bits
from tests.holder import quantizers_in, weight_quantizers
from tests.models import (
    MODELS,
    after_steps,
    evaluate_alike,
    mlp,
    nothing_held,
    restored,
    snapshot_of,
    step,
)
from tests.processors import repeatable


def _train_on(model, quantizer, inputs):
    """Trains with a new optimizer; returns the final state."""
    torch.manual_seed(5)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    quantizer.setup_optimizer(optimizer, lr=0.1)
    for _ in range(2):
        step(model, optimizer, inputs, quantizer)
    return snapshot_of(model)


@repeatable()
@pytest.mark.parametrize("name", ["mlp", "tied-modules", "two-names", "lstm-deep", "encoder"])
@pytest.mark.parametrize("kind", ["diffq", "lsq"])
def test_deepcopy_of_model_and_quantizer(name, kind):
    """A deep copy of both is independent, and trains exactly like the original."""
    model, quantizer, inputs = after_steps(name, kind)
    before = snapshot_of(model)
    other, other_quantizer = copy.deepcopy((model, quantizer))
    assert other_quantizer.model is other
    trained = _train_on(other, other_quantizer, inputs)
    assert same_bits(snapshot_of(model), before)
    assert not same_bits(trained, before)
    assert same_bits(_train_on(model, quantizer, inputs), trained)


@pytest.mark.parametrize("name", MODELS)
def test_deepcopy_after_forward_and_backward(name):
    """A model that has just been trained can be copied, and the copy evaluates the same."""
    model, _, inputs = after_steps(name)
    model(inputs)
    other = copy.deepcopy(model)
    assert evaluate_alike(other, model, inputs)
    assert evaluate_alike(copy.deepcopy(model), model, inputs)


def test_deepcopy_keeps_ties():
    """Tied tensors of a copy are tied, with one quantizer."""
    model, quantizer, _ = after_steps("tied-modules")
    other, other_quantizer = copy.deepcopy((model, quantizer))
    assert other.embed.weight is other.head.weight
    assert other.embed.weight is not model.embed.weight
    assert len(weight_quantizers(other)) == len(weight_quantizers(model))
    assert other_quantizer.true_model_size() == quantizer.true_model_size()


@pytest.mark.parametrize("name", ["mlp", "lstm", "encoder"])
def test_detaching_the_original_leaves_a_copy_whole(name):
    """A copy of an attached model works on after the original is detached."""
    model, quantizer, inputs = after_steps(name)
    other = copy.deepcopy(model).eval()
    fresh = restored(MODELS[name][0], quantizer)
    quantizer.detach()
    assert evaluate_alike(copy.deepcopy(other), fresh, inputs)
    assert evaluate_alike(other, fresh, inputs)
    assert quantizers_in(other)


@pytest.mark.parametrize("name", ["mlp", "lstm", "encoder"])
def test_detaching_a_copy_leaves_the_original_whole(name):
    """The original works on after a copy is detached, and the copy is plain."""
    model, quantizer, inputs = after_steps(name)
    make, _ = MODELS[name]
    other, other_quantizer = copy.deepcopy((model, quantizer))
    fresh = restored(make, quantizer)
    other_quantizer.detach()
    assert evaluate_alike(model, fresh, inputs)
    assert [type(m) for m in other.modules()] == [type(m) for m in make().modules()]


def test_copies_hold_no_sample():
    """A copy that is made inside of a forward is outside of it, and computes by itself."""
    model, _, inputs = after_steps()
    copies = []
    model[0].register_forward_hook(lambda *_: copies.append(copy.deepcopy(model)))
    model(inputs)
    (other,) = copies
    assert nothing_held(other)
    assert evaluate_alike(other, model, inputs)


def test_averaged_model():
    """An EMA of an attached model averages the weights and evaluates them quantized."""
    model, quantizer, inputs = after_steps()
    ema = AveragedModel(model, avg_fn=lambda average, value, _: 0.5 * average + 0.5 * value)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        step(model, optimizer, inputs, quantizer)
        ema.update_parameters(model)
    average = snapshot_of(ema.module)
    assert not same_bits(average, snapshot_of(model))
    model.load_state_dict(average)
    assert evaluate_alike(ema.module, model, inputs)
    assert evaluate_alike(model, restored(mlp, quantizer), inputs)


def test_averaged_model_exports_itself():
    """quantizer_of() finds the quantizer of an EMA, which stores the average."""
    model, quantizer, inputs = after_steps()
    ema = AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(3):
        step(model, optimizer, inputs, quantizer)
        ema.update_parameters(model)
    own = diffq.quantizer_of(ema)
    assert own.model is ema.module
    assert diffq.quantizer_of(model) is quantizer
    assert evaluate_alike(ema.module, restored(mlp, own), inputs)
    assert not evaluate_alike(ema.module, restored(mlp, quantizer), inputs)
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
    assert not same_bits(snapshot_of(other), before)

"""Quantizers taken off a model, and what they leave of it."""

import gc
import weakref

import pytest
import torch

import diffq
from tests.compare import same_bits
from tests.models import (
    MODELS,
    QUANTIZERS,
    after_steps,
    evaluate_alike,
    fingerprint,
    gradients,
    mlp,
    restored,
    seeded,
    snapshot_of,
    step,
)


def test_detach_keeps_trained_values():
    """detach() gives the full-precision weights, as the optimizer left them."""
    model, quantizer, _ = after_steps()
    trained = [p.detach().clone() for p in (model[0].weight,)]
    quantizer.detach()
    assert same_bits(model[0].weight, trained[0])


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("name", ["mlp", "tied-modules", "two-names", "lstm"])
def test_detach_quantized_bakes_the_eval_values(name, kind):
    """detach(quantized=True) puts the values that eval used into the same Parameter objects."""
    make, make_input = MODELS[name]
    model = seeded(make)
    ids = {key: id(p) for key, p in model.named_parameters(remove_duplicate=False)}
    quantizer = QUANTIZERS[kind](model)
    fresh, inputs = restored(make, quantizer), make_input()
    quantizer.detach(quantized=True)
    assert {key: id(p) for key, p in model.named_parameters(remove_duplicate=False)} == ids
    assert same_bits(dict(model.state_dict()), dict(fresh.state_dict()))
    assert evaluate_alike(model, fresh, inputs)


def test_detach_quantized_in_training_mode():
    """detach(quantized=True) bakes the true quantized values, not noisy ones, in any mode."""
    model = mlp()
    quantizer = diffq.DiffQuantizer(model, min_size=0)
    expected = restored(mlp, quantizer).state_dict()
    assert same_bits(dict(quantizer.detach(quantized=True).state_dict()), dict(expected))


def test_detach_quantized_bakes_float16():
    """detach(quantized=True) bakes what float16 keeps of the other parameters."""
    model = mlp()
    quantizer = diffq.QATQuantizer(model, min_size=0, exclude=["bias"], float16=True)
    bias = model[0].bias.detach().clone()
    quantizer.detach(quantized=True)
    assert same_bits(model[0].bias, bias.half().float())
    assert model[0].bias.dtype == torch.float32


def test_detach_quantized_of_a_bad_weight_changes_nothing():
    """detach(quantized=True) with a NaN raises, and the quantizer stays attached and working."""
    model, quantizer, inputs = after_steps()
    bad = model[2].weight
    good = bad.detach().clone()
    with torch.no_grad():
        bad[0, 0] = float("nan")
    before = fingerprint(model)
    with pytest.raises(diffq.WeightError, match=r"2\.weight"):
        quantizer.detach(quantized=True)
    assert fingerprint(model) == before
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
    model, quantizer, _ = after_steps()
    quantizer.detach()
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_attach_again_after_detach():
    """A detached model takes another quantizer, of another kind."""
    model, quantizer, inputs = after_steps()
    quantizer.detach()
    second = diffq.QATQuantizer(model, min_size=0, bits=3)
    assert evaluate_alike(model, restored(mlp, second), inputs)


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
    assert not any(same_bits(before[name], value) for name, value in model.state_dict().items())


def test_backward_after_detach():
    """A graph from before detach still gives its gradients."""
    model = mlp()
    quantizer = diffq.DiffQuantizer(model, min_size=0)
    quantizer.no_optimizer()
    loss = model(torch.randn(3, 16)).sum()
    quantizer.detach()
    loss.backward()
    assert all(grad is not None for grad in gradients(model).values())

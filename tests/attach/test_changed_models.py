"""Models whose tensors were removed, replaced or moved while a quantizer sat on them."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import diffq
from tests.holder import quantizers_in
from tests.models import (
    QUANTIZERS,
    Recurrent,
    attached,
    evaluate_alike,
    mlp,
    restored,
    seeded,
    tokens,
)


def _replace_module(model):
    model[2] = nn.Linear(32, 3)


def _replace_by_another_kind(model):
    model[2] = nn.Identity()


def _remove_module(model):
    del model[2]


def _wrap_module(model):
    model[2] = nn.Sequential(model[2])


def _replace_original(model):
    model[2].weight = nn.Parameter(torch.ones(3, 32))


def _replace_parameter(model):
    parametrize.remove_parametrizations(model[2], "weight", leave_parametrized=False)
    model[2].weight = nn.Parameter(torch.ones(3, 32))


def _bake_parametrization(model):
    parametrize.remove_parametrizations(model[2], "weight", leave_parametrized=True)


CHANGES = [
    _replace_module,
    _replace_by_another_kind,
    _remove_module,
    _wrap_module,
    _replace_original,
    _replace_parameter,
    _bake_parametrization,
]

USES = {
    "forward": lambda model, quantizer: model(torch.ones(2, 16)),
    "true_model_size": lambda model, quantizer: quantizer.true_model_size(),
    "compressed_model_size": lambda model, quantizer: quantizer.compressed_model_size(),
    "get_quantized_state": lambda model, quantizer: quantizer.get_quantized_state(),
    "detach-quantized": lambda model, quantizer: quantizer.detach(quantized=True),
}


@pytest.mark.parametrize("kind", ["diffq", "qat", "lsq"])
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("change", CHANGES)
def test_uses_of_a_changed_model(change, use, kind):
    """Training, sizes, states and baking are refused with the tensor's name and the remedy."""
    model, quantizer = attached(mlp, kind)
    change(model)
    with pytest.raises(diffq.AttachError, match=r"2\.weight.*detach\(\)"):
        USES[use](model, quantizer)


@pytest.mark.parametrize("call", ["bits", "mean_bits"])
@pytest.mark.parametrize("change", [c for c in CHANGES if c is not _replace_original])
def test_bits_of_a_changed_model(change, call):
    """The bits of a tensor that is no longer there are not told."""
    model, quantizer = attached(mlp)
    change(model)
    with pytest.raises(diffq.AttachError, match=r"2\.weight.*detach\(\)"):
        getattr(quantizer, call)()


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("change", CHANGES)
def test_detach_from_a_changed_model(change, kind):
    """detach() takes off what is left, and the model can be used and quantized again."""
    model, quantizer = attached(mlp, kind)
    first = model[0].weight
    change(model)
    assert quantizer.detach() is model
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    assert quantizers_in(model) == []
    assert model[0].weight is first
    again = QUANTIZERS[kind](model)
    again.get_quantized_state()
    assert again.detach() is model


@pytest.mark.parametrize("change", [_replace_module, _remove_module])
def test_detach_reaches_modules_that_were_taken_out(change):
    """detach() makes a module plain that is no longer in the model, but still in use elsewhere."""
    model, quantizer = attached(mlp)
    head, weight = model[2], model[2].weight
    change(model)
    quantizer.detach()
    assert type(head) is nn.Linear
    assert head.weight is weight
    assert list(head._parameters) == ["weight", "bias"]


def test_detach_reaches_recurrent_layers_that_were_taken_out():
    """A recurrent layer that was replaced works alone after detach()."""
    model, quantizer = attached(Recurrent)
    layer, model.rnn = model.rnn, nn.GRU(12, 10, batch_first=True)
    quantizer.detach()
    fresh = seeded(Recurrent).rnn
    inputs = torch.randn(2, 3, 12)
    assert evaluate_alike(layer, fresh, inputs)
    assert model(tokens()).isfinite().all()


def test_detaching_a_copy_of_a_changed_model():
    """A copy's quantizer takes itself off the copy's modules, and leaves the original's alone."""
    model, quantizer = attached(mlp)
    head = model[2]
    _replace_module(model)
    other, other_quantizer = copy.deepcopy((model, quantizer))
    other_quantizer.detach()
    assert type(other[0]) is nn.Linear
    assert parametrize.is_parametrized(model[0])
    assert parametrize.is_parametrized(head)


def test_a_changed_model_can_be_changed_back():
    """With the module back in its place, everything works as before."""
    model, quantizer = attached(mlp)
    head = model[2]
    _replace_module(model)
    with pytest.raises(diffq.AttachError):
        quantizer.true_model_size()
    model[2] = head
    model(torch.ones(2, 16))
    restored(mlp, quantizer)


@pytest.mark.parametrize(
    "change",
    [lambda m: delattr(m[2], "bias"), lambda m: setattr(m[2], "bias", None)],
    ids=["deleted", "none"],
)
def test_raw_tensors_that_were_removed(change):
    """Sizes and states name a tensor without levels that is gone."""
    model, quantizer = attached(mlp, exclude=["bias"])
    change(model)
    for call in (quantizer.model_size, quantizer.true_model_size, quantizer.get_quantized_state):
        with pytest.raises(diffq.AttachError, match=r"2\.bias.*detach\(\)"):
            call()
    quantizer.detach()


def test_assigning_to_a_quantized_tensor():
    """torch refuses a new Parameter for a parametrized tensor, and the model is as it was."""
    model, quantizer = attached(mlp)
    size = quantizer.true_model_size()
    with pytest.raises(KeyError, match="weight"):
        model[0].weight = nn.Parameter(torch.zeros(32, 16))
    assert quantizer.true_model_size() == size
    quantizer.detach()


def test_a_model_inside_of_another():
    """A wrapper around the whole model changes nothing: names are those of the model."""
    model, quantizer = attached(mlp)
    before = quantizer.get_quantized_state()
    wrapper = nn.Sequential(model, nn.Linear(8, 2))
    wrapper(torch.ones(2, 16)).sum().backward()
    assert list(quantizer.get_quantized_state()["tensors"]) == list(before["tensors"])
    assert diffq.quantizer_of(wrapper) is quantizer
    assert type(quantizer.detach()) is nn.Sequential


class _Through(nn.Module):
    """Wraps a module and passes on what it does not have, as torch's own wrappers do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, inputs):
        return self.inner(inputs)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)


@pytest.mark.parametrize("wrap", [_Through, lambda module: torch.compile(module, backend="eager")])
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_parts_may_be_wrapped(kind, wrap):
    """A part that is compiled, or wrapped so that its names are passed on, trains and exports."""
    model = nn.Sequential(nn.Linear(16, 32), nn.Sequential(nn.Linear(32, 32), nn.ReLU()))
    quantizer = QUANTIZERS[kind](model)
    quantizer.no_optimizer()
    weight, size = model[1][0].weight, quantizer.true_model_size()
    model[1] = wrap(model[1])
    (model(torch.ones(2, 16)).sum() + quantizer.model_size()).backward()
    assert weight.grad.abs().sum() > 0
    assert quantizer.true_model_size() == size
    torch.compiler.reset()

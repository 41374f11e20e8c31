"""Models whose tensors were removed, replaced or moved while a quantizer sat on them."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import diffq
from diffq.attach.attachment import is_attached
from tests.compare import close, same_bits
from tests.models import (
    QUANTIZERS,
    Recurrent,
    TiedModules,
    attached,
    computed,
    evaluate_alike,
    mlp,
    restored,
    seeded,
    snapshot_of,
    tokens,
)


def _replace_module(model):
    model[2] = nn.Linear(32, 3)


def _replace_by_another_kind(model):
    model[2] = nn.Identity()


def _remove_module(model):
    del model[2]


def _replace_parameter(model):
    model[2].weight = nn.Parameter(torch.ones(3, 32))


def _delete_parameter(model):
    del model[2].weight


def _set_to_none(model):
    model[2].weight = None


def _parametrize(model):
    parametrize.register_parametrization(model[2], "weight", nn.Identity())


CHANGES = [
    _replace_module,
    _replace_by_another_kind,
    _remove_module,
    _replace_parameter,
    _delete_parameter,
    _set_to_none,
    _parametrize,
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
@pytest.mark.parametrize("change", [c for c in CHANGES if c is not _replace_parameter])
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
    assert not is_attached(model)
    assert type(model[0]) is nn.Linear
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
    model[2] = head
    assert evaluate_alike(model, restored(mlp, quantizer), torch.ones(2, 16))


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


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_another_parameter_of_the_same_shape(kind, training):
    """A new Parameter in the place of a quantized one is what is trained, computed and stored."""
    (model, quantizer), (other, others) = attached(mlp, kind), attached(mlp, kind)
    model(torch.ones(2, 16))
    new = torch.randn(8, 32)
    model[2].weight = nn.Parameter(new.clone())
    with torch.no_grad():
        other[2].weight.copy_(new)
    found = []
    for each in (model, other):
        each.train(training)
        torch.manual_seed(1)
        found.append(computed(each))
    assert same_bits(*found)
    assert not same_bits(found[0]["2.weight"], new)
    assert same_bits(snapshot_of(restored(mlp, quantizer)), snapshot_of(restored(mlp, others)))
    model(torch.ones(2, 16)).sum().backward()
    assert model[2].weight.grad.any()
    assert same_bits(quantizer.detach()[2].weight.detach(), new)


def test_assigning_what_is_no_parameter():
    """torch refuses a tensor in the place of a Parameter, and the model is as it was."""
    model, quantizer = attached(mlp)
    weight, size = model[0].weight, quantizer.true_model_size()
    with pytest.raises(TypeError, match="weight"):
        model[0].weight = torch.zeros(32, 16)
    assert model[0].weight is weight
    assert quantizer.true_model_size() == size
    quantizer.detach()


@pytest.mark.parametrize("kind", ["diffq", "qat", "lsq"])
def test_a_tie_that_is_undone(kind):
    """Where one of two tied modules gets another Parameter, all uses name both and the remedy."""
    model, quantizer = attached(TiedModules, kind)
    model.head.weight = nn.Parameter(model.embed.weight.detach().clone())
    uses = {**USES, "forward": lambda model, quantizer: model(tokens())}
    for use in uses.values():
        with pytest.raises(diffq.AttachError, match=r"(embed|head)\.weight.*detach\(\)"):
            use(model, quantizer)
    model.head.weight = model.embed.weight
    assert evaluate_alike(model, restored(TiedModules, quantizer), tokens())


class _Passed(nn.Module):
    """Wraps a module."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, inputs):
        return self.inner(inputs)


@pytest.mark.parametrize("wrap", [nn.Sequential, _Passed])
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_a_part_under_other_names(kind, wrap):
    """A part that a wrapper gives other names computes as before; only states are refused."""
    model, quantizer = attached(mlp, kind)
    plain, inputs = restored(mlp, quantizer), torch.ones(2, 16)
    weight = model[2].weight
    model[2] = wrap(model[2])
    model(inputs).sum().backward()
    assert weight.grad.any()
    with torch.no_grad():
        assert close(model.eval()(inputs), plain(inputs))
    with pytest.raises(diffq.AttachError, match=r"2\.weight.*detach\(\)"):
        quantizer.get_quantized_state()
    assert quantizer.detach(quantized=True) is model
    assert same_bits(weight.detach(), plain[2].weight.detach())


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


def _modules(kind):
    layers = [nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)]
    if kind is nn.ModuleDict:
        return kind(dict(zip("abc", layers, strict=True)))
    return kind(*layers) if kind is nn.Sequential else kind(layers)


_IN_LISTS = {
    "delete": lambda model: model.__delitem__(1),
    "delete-slice": lambda model: model.__delitem__(slice(0, 2)),
    "pop": lambda model: model.pop(1),
    "set": lambda model: model.__setitem__(-1, nn.Tanh()),
    "append": lambda model: model.append(nn.Tanh()),
    "insert": lambda model: model.insert(1, nn.Tanh()),
    "insert-last": lambda model: model.insert(3, nn.Tanh()),
    "extend": lambda model: model.extend([nn.Tanh(), nn.ReLU()]),
    "add": lambda model: model.__iadd__(nn.Sequential(nn.Tanh())),
    "add-module": lambda model: model.add_module("3", nn.Tanh()),
}
_IN_DICTS = {
    "delete": lambda model: model.__delitem__("b"),
    "pop": lambda model: model.pop("b"),
    "set": lambda model: model.__setitem__("d", nn.Tanh()),
    "update": lambda model: model.update({"d": nn.Tanh()}),
    "clear": lambda model: model.clear(),
}
_IN_CONTAINERS = [
    *((kind, change) for kind in (nn.Sequential, nn.ModuleList) for change in _IN_LISTS.values()),
    *((nn.ModuleDict, change) for change in _IN_DICTS.values()),
]


@pytest.mark.parametrize(("kind", "change"), _IN_CONTAINERS)
def test_containers_change_as_plain_ones(kind, change):
    """A container with a quantizer has the modules that the plain one has, while and after it."""
    plain, model = _modules(kind), _modules(kind)
    quantizer = diffq.DiffQuantizer(model, min_size=0)
    for each in (plain, model):
        change(each)
    assert len(model) == len(plain)
    assert list(map(str, model)) == list(map(str, plain))
    assert list(model.parameters())[-1] is next(quantizer.learned_parameters())
    quantizer.detach()
    assert [(name, str(module)) for name, module in model.named_children()] == [
        (name, str(module)) for name, module in plain.named_children()
    ]

"""Changes that other code makes to an attached model: added, taken, wrapped and pruned parts."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import diffq
from tests.compare import close, same_bits
from tests.models import attached, mlp, restored, seeded
from tests.readers import (
    COARSE,
    LEARNED,
    SETTINGS,
    learned_in,
    readers,
    reads_parameters,
    seen_by,
    x16,
)


def test_sequential_roots():
    """Length, iteration, indices, slices and children of a Sequential are the plain ones."""
    model, _ = attached(mlp)
    plain = mlp()
    assert len(model) == len(list(model)) == 3
    assert [type(m).__name__ for m in model] == [type(m).__name__ for m in plain]
    assert model[-1] is model[2]
    assert model[:2](x16()).shape == (3, 32)
    assert reads_parameters(model[:2])


def test_layers_added_to_a_root():
    """Layers that are appended are plain, run and train; deleted, the model is as before."""
    model, _ = attached(mlp)
    model.append(nn.Linear(8, 2))
    assert model(x16()).shape == (3, 2)
    model(x16()).sum().backward()
    assert model[3].weight.grad.any()
    assert type(model[3]) is nn.Linear
    del model[3]
    assert len(model) == 3
    assert model(x16()).shape == (3, 8)


def _named(parts):
    return nn.ModuleDict(zip("abc", parts, strict=True))


@pytest.mark.parametrize("make", [nn.ModuleList, _named])
def test_roots_without_a_forward(make):
    """Containers are roots too: each part computes by itself."""
    model = seeded(lambda: make(readers()[0].append(nn.Linear(16, 4))))
    quantizer = diffq.DiffQuantizer(model, min_size=0, **COARSE)
    quantizer.no_optimizer()
    parts = [part for name, part in model.named_children() if name != "_diffq"]
    assert len(model) == len(parts) == 3
    for part in parts:
        part(x16()).sum().backward()
        part(x16())
    assert learned_in(model).grad.any()
    assert all(not same_bits(*seen) for seen in seen_by(model))
    assert reads_parameters(model)
    quantizer.detach()
    assert type(parts[2]) is nn.Linear


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_that_is_taken_out_and_put_back(training):
    """Without it, the forward names its tensors; put back, everything works."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x):
            return self.two(self.one(x))

    model, _ = attached(Net)
    model.train(training)
    old, model.two = model.two, nn.Linear(16, 7)
    with pytest.raises(diffq.AttachError, match=r"two\.weight"):
        model(x16())
    assert reads_parameters(model)
    model.two = old
    assert model(x16()).shape == (3, 4)


def test_a_part_that_is_compiled_in_place():
    """A part that is replaced by its compiled self trains, evaluates and detaches."""
    model, quantizer = attached(readers, **COARSE)
    fresh = restored(readers, quantizer)
    model[0] = torch.compile(model[0], backend="eager")
    model(x16()).sum().backward()
    assert model[2].weight.grad.any()
    inputs = x16()
    with torch.no_grad():
        assert close(model.eval()(inputs), fresh(inputs))
    quantizer.detach()
    assert type(model[0]._orig_mod) is nn.Sequential


def test_a_part_that_is_used_elsewhere():
    """A part that a plain model uses too computes as quantized there, and reads Parameters."""
    model, quantizer = attached(readers, **COARSE)
    other = nn.Sequential(model[0], nn.Linear(16, 4))
    other.eval()
    other(x16())
    fresh = restored(readers, quantizer)
    assert same_bits(model[0][0].seen[0], fresh[0][0].weight.detach())
    assert [n for n, _ in other.named_parameters()][:2] == ["0.0.weight", "0.0.bias"]
    assert reads_parameters(other)


def _loud_or(check, call, *words):
    """Calls; an AttachError has the words, or else the check holds."""
    try:
        output = call()
    except diffq.AttachError as error:
        assert all(word in str(error) for word in words), str(error)  # noqa: PT017
        return False
    assert check(output)
    return True


@pytest.mark.parametrize(
    "register",
    [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal],
)
def test_parametrizations_on_top(register):
    """A parametrization that comes later is under the quantizer's noise, or is a clear error."""
    model, quantizer = attached(lambda: nn.Sequential(nn.Linear(16, 16)), **COARSE)
    register(model[0])
    inputs = x16()

    def call():
        one, two = model(inputs), model(inputs)
        one.sum().backward()
        return one, two

    _loud_or(lambda pair: not close(*pair), call, "0.weight")
    parametrize.remove_parametrizations(model[0], "weight")
    assert "weight" in model[0]._parameters
    assert not close(model(inputs), model(inputs))
    quantizer.detach()
    assert type(model[0]) is nn.Linear
    assert close(model(inputs), model(inputs))


def test_removing_parametrizations_in_training():
    """What is left of a parametrization that is removed is its weight without noise."""

    def make():
        return nn.Sequential(parametrizations.weight_norm(nn.Linear(16, 16)))

    model, _ = attached(make, **COARSE)
    model.train()
    before = model[0].weight.detach().clone()
    assert not close(model(x16()), model(x16()))
    assert close(model[0].weight.detach(), before)
    parametrize.remove_parametrizations(model[0], "weight")
    assert close(model[0].weight.detach(), before)


def test_nothing_to_remove():
    """There is no parametrization on an attached module."""
    model, _ = attached(mlp)
    assert not any(parametrize.is_parametrized(m) for m in model.modules())
    with pytest.raises(ValueError, match="does not have a parametrization"):
        parametrize.remove_parametrizations(model[0], "weight")


def test_pruning_on_top():
    """A layer that torch's hooks prune later trains with noise and zeros, or is a clear error."""
    model, quantizer = attached(mlp, **COARSE)
    prune.l1_unstructured(model[0], "weight", amount=0.5)

    def call():
        outputs = model(x16()), model(x16())
        outputs[0].sum().backward()
        return outputs

    if _loud_or(lambda pair: not close(*pair), call, "0.weight"):
        assert model[0].weight_orig.grad.any()
    prune.remove(model[0], "weight")
    assert isinstance(model[0].weight, nn.Parameter)
    assert (model[0].weight == 0).sum() >= 256
    model(x16()).sum().backward()
    quantizer.detach()
    assert type(model[0]) is nn.Linear


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("below", [True, False])
def test_weight_norm_by_hooks(below):
    """torch's old weight_norm, before or after attaching, has noise, or is a clear error."""
    model = seeded(lambda: nn.Sequential(nn.Conv1d(8, 16, 3)))
    if below:
        nn.utils.weight_norm(model[0])
    quantizer = diffq.DiffQuantizer(model, min_size=0, **COARSE)
    quantizer.no_optimizer()
    if not below:
        nn.utils.weight_norm(model[0])
    inputs = torch.randn(2, 8, 9)
    ran = _loud_or(
        lambda pair: not close(*pair), lambda: (model(inputs), model(inputs)), "0.weight"
    )
    if ran:
        model(inputs).sum().backward()
        assert model[0].weight_v.grad.any()
        with torch.no_grad():
            model.eval()(inputs)
    nn.utils.remove_weight_norm(model[0])
    assert "weight" in model[0]._parameters


def test_attaching_twice():
    """A second quantizer is refused, also of a part and of a model around; a copy's is its own."""
    model, _ = attached(readers)
    for target in (model, model[0], nn.Sequential(model)):
        with pytest.raises(diffq.AttachError, match="has a quantizer"):
            diffq.QATQuantizer(target, min_size=0)
    with pytest.raises(diffq.AttachError, match="has a quantizer"):
        diffq.QATQuantizer(copy.deepcopy(model), min_size=0)


def test_two_attached_parts():
    """Two parts of a plain model have a quantizer each, with entries under their names."""
    model = seeded(lambda: nn.Sequential(mlp(), nn.Linear(8, 16), mlp()))
    quantizers = [diffq.DiffQuantizer(model[i], min_size=0) for i in (0, 2)]
    for quantizer in quantizers:
        quantizer.no_optimizer()
    (model(x16()).sum() + sum(q.model_size() for q in quantizers)).backward()
    assert all(learned_in(model[i]).grad.any() for i in (0, 2))
    names = [n for n, _ in model.named_parameters() if "diffq" in n]
    assert names == [f"{i}.{LEARNED}" for i in (0, 2)]
    entries = [n for n in model.state_dict() if n.endswith(SETTINGS)]
    assert entries == [f"{i}.{SETTINGS}" for i in (0, 2)]
    quantizers[0].detach()
    assert not close(model[2](x16()), model[2](x16()))


def test_the_root_by_another_name():
    """A wrapper that calls the root's layers itself, without the root, gets noise from each."""

    class Unrolled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            for layer in self.inner:
                x = layer(x)
            return x

    model, quantizer = attached(mlp, **COARSE)
    unrolled, inputs = Unrolled(model), x16()
    assert not close(unrolled(inputs), unrolled(inputs))
    unrolled.eval()
    assert close(unrolled(inputs), restored(mlp, quantizer)(inputs))

"""Outside of its forward, an attached model is the plain model to all code around it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import diffq
from tests.compare import close, same_bits
from tests.models import MODELS, QUANTIZERS, attached, mlp, pairs, restored, seeded
from tests.readers import (
    COARSE,
    LEARNED,
    computes_with_what_is_stored,
    learned_in,
    reads_parameters,
    x16,
)

#: The quantizers that learn something.
LEARNING = {"diffq", "diffq-uniform", "diffq-rounding", "lsq", "entropy", "product"}


@pytest.mark.parametrize(("kind", "name"), pairs(QUANTIZERS, MODELS))
def test_names_and_objects(kind, name):
    """Names, order, parameters and modules are the plain ones, then comes what is learned."""
    make, _ = MODELS[name]
    model = seeded(make)
    parameters = list(model.named_parameters(remove_duplicate=False))
    modules = list(model.named_modules(remove_duplicate=False))
    children = list(model.named_children())
    QUANTIZERS[kind](model)
    found = list(model.named_parameters(remove_duplicate=False))
    assert [n for n, _ in found[len(parameters) :]] == [LEARNED] * (kind in LEARNING)
    plain = zip(parameters, found[: len(parameters)], strict=True)
    assert all(a == b and p is q for (a, p), (b, q) in plain)
    found = list(model.named_modules(remove_duplicate=False))
    assert [(n, id(m)) for n, m in found if n != "_diffq"] == [(n, id(m)) for n, m in modules]
    found = [(n, id(m)) for n, m in model.named_children() if n != "_diffq"]
    assert found == [(n, id(m)) for n, m in children]


@pytest.mark.parametrize("kind", ["diffq", "lsq"])
def test_what_is_learned_is_one_flat_parameter(kind):
    """All that is learned is one vector in float32, which the root alone has."""
    model, quantizer = attached(mlp, kind)
    learned = learned_in(model)
    assert isinstance(learned, nn.Parameter)
    assert (learned.dim(), learned.dtype) == (1, torch.float32)
    (model(x16()).square().sum() + quantizer.model_size()).backward()
    assert learned.grad.shape == learned.shape
    assert learned.grad.any()
    assert not hasattr(model[0], "_diffq")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_reads_after_forwards_and_backwards(name, training):
    """Before and after forwards and backwards, reading gives the Parameter, in both modes."""
    make, make_input = MODELS[name]
    model, _ = attached(make)
    model.train(training)
    assert reads_parameters(model)
    output = model(make_input())
    assert reads_parameters(model)
    output.square().sum().backward()
    assert reads_parameters(model)
    with torch.no_grad():
        model(make_input())
    assert reads_parameters(model)


def _reset(model):
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


def _xavier(model):
    model.apply(lambda m: isinstance(m, nn.Linear) and nn.init.xavier_uniform_(m.weight))


def _zeros_and_data(model):
    nn.init.zeros_(model[0].weight)
    model[2].weight.data.normal_()


def _merged(model):
    model[0].weight.data += torch.outer(torch.ones(32), torch.arange(16.0))


def _vector(model):
    parameters = [p for name, p in model.named_parameters() if name != LEARNED]
    vector_to_parameters(2 * parameters_to_vector(parameters).detach(), parameters)


def _copied(model):
    with torch.no_grad():
        model[2].weight.copy_(model[2].weight.flip(0))
        model[0].bias[1:3] = 5


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("write", [_reset, _xavier, _zeros_and_data, _merged, _vector, _copied])
def test_writes_are_those_to_the_plain_model(write, training):
    """Initializers, merges and `.data` writes set the weights that the model then computes with."""
    plain = seeded(mlp)
    model, quantizer = attached(mlp)
    model.train(training)
    with torch.no_grad():
        model(x16())
    torch.manual_seed(7)
    write(plain)
    torch.manual_seed(7)
    write(model)
    values = {n: p.detach() for n, p in model.named_parameters() if n != LEARNED}
    assert same_bits(values, {n: p.detach() for n, p in plain.named_parameters()})
    model.eval()
    inputs = x16()
    with torch.no_grad():
        assert close(model(inputs), restored(mlp, quantizer)(inputs))
    assert computes_with_what_is_stored(mlp, model, quantizer)


def test_groups_of_an_optimizer_by_name_and_by_module():
    """A walk over modules and names, as for weight decay, finds each parameter as ever."""

    def make():
        return nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Embedding(4, 16))

    plain, (model, _) = seeded(make), attached(make)

    def groups(model):
        decay, rest = set(), set()
        for path, module in model.named_modules():
            for name, _ in module.named_parameters(recurse=False):
                chosen = name.endswith("weight") and isinstance(module, nn.Linear)
                (decay if chosen else rest).add(f"{path}.{name}".lstrip("."))
        return decay, rest - {LEARNED}

    assert groups(model) == groups(plain)
    named = dict(model.named_parameters())
    decay = torch.optim.SGD([named["0.weight"]], 0.1, weight_decay=0.5)
    before = model[0].weight.detach().clone()
    model[0].weight.grad = torch.zeros_like(before)
    decay.step()
    assert close(model[0].weight.detach(), before * 0.95)


@pytest.mark.parametrize("training", [True, False])
def test_freezing_through_the_module(training):
    """`layer.weight.requires_grad_(False)` freezes the Parameter, and undoing it thaws it."""
    model, _ = attached(mlp)
    model.train(training)
    with torch.no_grad():
        model(x16())
    model[0].weight.requires_grad_(False)
    model(x16()).sum().backward()
    assert not model[0]._parameters["weight"].requires_grad
    assert model[0].weight.grad is None
    assert model[2].weight.grad is not None
    model[0].weight.requires_grad_(True)
    model(x16()).sum().backward()
    assert model[0].weight.grad is not None


def test_hooks_and_gradients_of_parameters():
    """Gradients, hooks and clipping through `module.weight` are the Parameter's."""
    model, _ = attached(mlp)
    sums = []
    model[0].weight.register_hook(lambda grad: sums.append(grad.clone()))
    model[0].weight.register_post_accumulate_grad_hook(lambda p: sums.append(p.grad.clone()))
    model(x16()).square().sum().backward()
    assert close(sums[0], sums[1])
    assert close(sums[0], model[0].weight.grad)
    nn.utils.clip_grad_norm_(model[0].weight, 1e-3)
    assert model[0].weight.grad.norm() <= 1.1e-3
    model[0].weight.grad = None
    assert dict(model.named_parameters())["0.weight"].grad is None


@pytest.mark.parametrize("training", [True, False])
def test_a_new_parameter_takes_the_place(training):
    """An assigned Parameter is the model's: it is read, named, trained, quantized and stored."""
    model, quantizer = attached(mlp, **COARSE)
    model.train(training)
    with torch.no_grad():
        model(x16())
    new = nn.Parameter(torch.randn(32, 16))
    model[0].weight = new
    assert model[0].weight is new
    assert [n for n, _ in model.named_parameters()][:2] == ["0.weight", "0.bias"]
    assert dict(model.named_parameters())["0.weight"] is new
    model(x16()).sum().backward()
    assert new.grad.any()
    model.eval()
    assert computes_with_what_is_stored(mlp, model, quantizer)
    assert not same_bits(restored(mlp, quantizer)[0].weight.detach(), new.detach())


def test_a_parameter_of_another_shape_is_refused():
    """A weight that has changed its shape is an error that names it, and can be put back."""
    model, _ = attached(mlp)
    old, model[2].weight = model[2].weight, nn.Parameter(torch.zeros(9, 32))
    with pytest.raises(diffq.AttachError, match=r"2\.weight"):
        model(x16())
    model[2].weight = old
    model(x16()).sum().backward()


def test_a_deleted_parameter_is_gone():
    """`del layer.weight` deletes it, and an attribute of the name is an AttributeError."""
    model, _ = attached(mlp)
    weight = model[0].weight
    del model[0].weight
    assert not hasattr(model[0], "weight")
    with pytest.raises(AttributeError, match="weight"):
        _ = model[0].weight
    model[0].weight = weight
    model(x16())


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_casts(cast):
    """Casts change the model's parameters alone: bits are learned in float32 whatever it is in."""
    model, quantizer = attached(mlp)
    getattr(model, cast)()
    dtype = getattr(torch.empty(0), cast)().dtype
    assert learned_in(model).dtype == torch.float32
    assert next(model.parameters()).dtype == model[0].weight.dtype == dtype
    assert model(x16().to(dtype)).dtype == dtype
    (model(x16().to(dtype)).sum() + quantizer.model_size()).backward()
    assert learned_in(model).grad.any()
    assert model.eval()(x16().to(dtype)).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_default_dtype(dtype):
    """What is learned is float32 under any default dtype, and so is the size."""
    torch.set_default_dtype(dtype)
    try:
        model, quantizer = attached(mlp)
        assert learned_in(model).dtype == torch.float32
        assert quantizer.model_size().dtype == torch.float32
        assert quantizer.model_size().item() == pytest.approx(quantizer.true_model_size(), rel=0.1)
    finally:
        torch.set_default_dtype(torch.float32)


def test_zeroing_the_plain_parameters_leaves_bits_alone():
    """Code that goes through `parameters()` of a part sees nothing of the quantizer."""
    model, quantizer = attached(lambda: nn.Sequential(mlp(), nn.Tanh()))
    bits = copy.deepcopy(quantizer.bits())
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter.zero_()
    assert [n for n, _ in model[0].named_parameters()] == [n for n, _ in mlp().named_parameters()]
    assert same_bits(quantizer.bits(), bits)
    model.eval()
    with torch.no_grad():
        assert not model(x16()).any()

"""Kinds of modules and of tensors in them, as torch makes them."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from diffq.torch_inside.modules import (
    CONVOLUTIONS,
    buffers_in,
    children_in,
    is_attention_projection,
    is_lazy,
    non_persistent_buffers,
    parameter_in,
    parameters_in,
    pruned_names,
)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose", "LazyConv", "LazyConvTranspose"])
def test_convolutions(kind, dims):
    """`CONVOLUTIONS` is the class of every convolution of torch, with one size per dimension."""
    channels = (3,) if kind.startswith("Lazy") else (2, 3)
    layer = getattr(nn, f"{kind}{dims}d")(*channels, kernel_size=1)
    assert isinstance(layer, CONVOLUTIONS)
    assert layer.kernel_size == (1,) * dims


@pytest.mark.parametrize("layer", [nn.Linear(2, 3), nn.MaxPool2d(2), nn.Unfold(2)])
def test_other_layers_are_no_convolutions(layer):
    """Linear layers, pooling and the module of patches are none."""
    assert not isinstance(layer, CONVOLUTIONS)


def test_attention_projection():
    """Of a transformer's linear layers, the output projection of each attention is one."""
    model = nn.TransformerDecoderLayer(8, 2, 16)
    found = [name for name, module in model.named_modules() if is_attention_projection(module)]
    assert found == ["self_attn.out_proj", "multihead_attn.out_proj"]


def test_lazy_until_the_first_input():
    """The parameters and buffers of a lazy module are lazy until its first forward."""
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    tensors = [*model.parameters(), model[1].running_mean]
    assert len(tensors) == 5
    assert all(map(is_lazy, tensors))
    model(torch.ones(2, 4))
    assert not any(map(is_lazy, [*model.parameters(), *model.buffers()]))
    assert not is_lazy(torch.ones(2))


def test_non_persistent_buffers():
    """They are a module's own buffers that its state dict lacks, in copies of it too."""
    module = nn.Module()
    module.register_buffer("kept", torch.ones(1))
    module.register_buffer("left", torch.ones(1), persistent=False)
    module.inner = nn.Module()
    module.inner.register_buffer("other", torch.ones(1), persistent=False)
    for each in (module, copy.deepcopy(module)):
        assert set(non_persistent_buffers(each)) == {"left"}
        assert set(non_persistent_buffers(each.inner)) == {"other"}
        assert list(each.state_dict()) == ["kept"]
    module.register_buffer("left", torch.ones(1))
    assert not non_persistent_buffers(module)


def test_pruned_names():
    """They are the tensors that were pruned, once each, until pruning is removed."""
    layer = nn.Linear(4, 4)
    layer.register_forward_pre_hook(lambda module, args: None)
    assert pruned_names(layer) == []
    prune.l1_unstructured(layer, "weight", amount=0.5)
    # Pruned again, a tensor's hook is a container of both.
    prune.random_unstructured(layer, "weight", amount=0.5)
    prune.identity(layer, "bias")
    assert pruned_names(layer) == ["weight", "bias"]
    prune.remove(layer, "weight")
    assert pruned_names(layer) == ["bias"]


def test_parameters_in():
    """A module's own Parameters by name, absent ones too; what is put there is the module's."""
    layer, other = nn.Linear(2, 2, bias=False), nn.Parameter(torch.ones(2, 2))
    parameters = parameters_in(layer)
    assert parameters == {"weight": layer.weight, "bias": None}
    parameters["weight"] = other
    assert layer.weight is other


def test_parameter_in():
    """One of a module's own Parameters; None for one that is absent, or of a module below."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    assert parameter_in(model[0], "weight") is model[0].weight
    assert parameter_in(model[0], "bias") is None
    assert parameter_in(model, "0.weight") is None


def test_buffers_in():
    """A module's own buffers by name, in order."""
    norm = nn.BatchNorm1d(2)
    assert list(buffers_in(norm)) == ["running_mean", "running_var", "num_batches_tracked"]
    assert buffers_in(norm)["running_var"] is norm.running_var


def test_children_in():
    """A module's own modules by name; what is taken out there is no longer the module's."""
    model = nn.Sequential(nn.ReLU(), nn.Sequential(nn.Tanh()))
    assert children_in(model) == {"0": model[0], "1": model[1]}
    del children_in(model)["0"]
    assert len(model) == 1

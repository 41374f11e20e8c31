"""Quantized state to plain model: by name, strict, all or nothing, bit for bit."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import diffq
from tests.compare import same_bits
from tests.holder import Holder, all_bits, bits_of, blank, reloaded
from tests.models import ConvNet, TiedModules, TwoNames, computed_weight, evaluate_alike, mlp

RAW_DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.uint16, torch.uint32, torch.uint64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64, torch.complex64, torch.complex128,
    torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


def _state(model, **options):
    """The state of a model, as it comes back from a file."""
    return reloaded(diffq.QATQuantizer(model, min_size=0, **options).get_quantized_state())


def _two_layers(**layers):
    """A model of named layers."""
    model = nn.Module()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model


def _refused(model, state, *words, error=diffq.MismatchError):
    """Checks that a restore is refused with these words, and changes no bit of the model."""
    before = all_bits(model)
    with pytest.raises(error) as caught:
        diffq.restore_quantized_state(model, state)
    for word in words:
        assert word in str(caught.value)
    assert all_bits(model) == before


# --- Into the right model ---


def test_restore_returns_the_model():
    """The model itself comes back, with the parameters it had, and its mode unchanged."""
    model = mlp().train()
    before = dict(model.named_parameters())
    assert diffq.restore_quantized_state(model, _state(mlp())) is model
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
    assert all(parameter.requires_grad for parameter in before.values())
    assert model.training


def test_restored_model_computes_the_same():
    """The restored model computes with the weights of the quantized one in eval."""
    model = ConvNet().train()
    quantizer = diffq.DiffQuantizer(model, min_size=0)
    quantizer.no_optimizer()
    x = torch.randn(4, 3, 8, 8)
    for _ in range(3):
        model(x)
    fresh = diffq.restore_quantized_state(ConvNet(), reloaded(quantizer.get_quantized_state()))
    assert evaluate_alike(fresh, model, x)


def test_batch_norm_comes_back():
    """BatchNorm's running statistics and its int64 count of batches are restored."""
    model = ConvNet().train()
    for _ in range(3):
        model(torch.randn(4, 3, 8, 8) * 3 + 1)
    running = {name: bits_of(buffer) for name, buffer in model.named_buffers()}
    fresh = diffq.restore_quantized_state(ConvNet(), _state(model))
    assert {name: bits_of(buffer) for name, buffer in fresh.named_buffers()} == running
    assert fresh.norm.num_batches_tracked.dtype == torch.int64
    assert fresh.norm.num_batches_tracked.item() == 3


@pytest.mark.parametrize("dtype", RAW_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (7,), (2, 3, 4)])
def test_buffers_of_every_dtype_are_exact(dtype, shape):
    """Buffers of every dtype and shape, of any bytes whatever, come back bit for bit."""
    numel = math.prod(shape)
    random = torch.randint(256, (numel * dtype.itemsize,), dtype=torch.uint8)
    values = (random % 2 if dtype is torch.bool else random).view(dtype).view(shape)
    model = Holder({"weight": torch.randn(4, 4)}, {"buffer": values})
    fresh = blank(model)
    wanted = bits_of(values)
    diffq.restore_quantized_state(fresh, _state(model))
    assert bits_of(fresh.buffer) == wanted


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 3)])
def test_buffers_of_every_layout_are_exact(shape):
    """Buffers that are views with gaps come back, empty ones of odd strides included."""
    values = torch.arange(12.0)[: math.prod(shape)].view(shape)
    view = torch.stack([values, values + 1], dim=-1)[..., 0]
    model = Holder({"weight": torch.randn(4, 4)}, {"gaps": view, "turned": view.t()})
    fresh = Holder(
        {"weight": torch.randn(4, 4)},
        {"gaps": torch.full(shape, 9.0), "turned": torch.full(shape[::-1], 9.0)},
    )
    diffq.restore_quantized_state(fresh, _state(model))
    assert same_bits(fresh.gaps, values)
    assert same_bits(fresh.turned, values.t())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_nan_and_infinity_are_exact_in_raw_tensors(dtype):
    """Parameters and buffers that stay raw keep NaN, Inf, -0.0 and denormal numbers."""
    tiny = torch.finfo(dtype).smallest_normal / 4
    odd = torch.tensor([math.nan, math.inf, -math.inf, -0.0, tiny, -math.nan], dtype=dtype)
    model = Holder({"weight": torch.randn(4, 4), "odd": odd}, {"buffer": odd.clone()})
    fresh = blank(model)
    diffq.restore_quantized_state(fresh, _state(model, include=["weight"]))
    assert bits_of(fresh.odd) == bits_of(fresh.buffer) == bits_of(odd)


def test_views_of_complex_numbers_are_exact():
    """Conjugate and negative views, as complex operations make them, are stored by value."""
    complex_ = torch.randn(5, dtype=torch.complex64)
    model = Holder(
        {"weight": torch.randn(4, 4)}, {"conj": complex_.conj(), "neg": complex_.conj().imag}
    )
    fresh = blank(Holder({"weight": torch.randn(4, 4)}, {"conj": complex_, "neg": complex_.imag}))
    diffq.restore_quantized_state(fresh, _state(model))
    assert same_bits(fresh.conj, complex_.conj())
    assert same_bits(fresh.neg, -complex_.imag)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float16_parameters_are_rounded_once(dtype):
    """With float16, raw parameters come back in their dtype as eval used them."""
    model = Holder({"weight": torch.randn(4, 4), "bias": torch.randn(9).to(dtype)})
    wanted = model.bias.detach().half().to(dtype)
    fresh = blank(model)
    quantizer = diffq.QATQuantizer(model, min_size=0, include=["weight"], float16=True)
    model.eval()
    assert bits_of(computed_weight(model, "bias")) == bits_of(wanted)
    state = reloaded(quantizer.get_quantized_state())
    assert state["tensors"]["bias"]["data"].dtype == torch.float16
    diffq.restore_quantized_state(fresh, state)
    assert bits_of(fresh.bias) == bits_of(wanted)


def test_targets_keep_their_memory_layout():
    """Values are copied into the model's own tensors: channels_last stays channels_last."""
    state = _state(nn.Conv2d(4, 8, 3))
    plain = diffq.restore_quantized_state(nn.Conv2d(4, 8, 3), state)
    other = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    pointer = other.weight.data_ptr()
    diffq.restore_quantized_state(other, state)
    assert other.weight.is_contiguous(memory_format=torch.channels_last)
    assert other.weight.data_ptr() == pointer
    assert bits_of(other.weight) == bits_of(plain.weight)


def test_restore_takes_frozen_parameters():
    """A model whose parameters do not require grad is filled, and stays frozen."""
    fresh = mlp().requires_grad_(False)
    diffq.restore_quantized_state(fresh, _state(mlp()))
    assert not any(parameter.requires_grad for parameter in fresh.parameters())
    assert not any(parameter.grad_fn for parameter in fresh.parameters())


def test_buffers_that_are_not_persistent_are_left_alone():
    """A buffer outside of the state dict is neither stored nor asked for."""
    model, fresh = mlp(), mlp()
    model.register_buffer("cache", torch.ones(3), persistent=False)
    fresh.register_buffer("cache", torch.full((5,), 2.0), persistent=False)
    state = _state(model)
    assert "cache" not in state["tensors"]
    diffq.restore_quantized_state(fresh, state)
    assert fresh.cache.tolist() == [2.0] * 5


class WithExtraState(nn.Linear):
    """A module that puts something of its own in state dicts."""

    extra = None

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


@pytest.mark.parametrize("extra", [{"steps": 3}, torch.tensor(3)], ids=["dict", "tensor"])
def test_extra_state_does_not_stand_in_the_way(extra):
    """A module with extra state of its own, a tensor or not, can be restored."""
    model, fresh = WithExtraState(4, 3), WithExtraState(4, 3)
    model.extra = fresh.extra = extra
    diffq.restore_quantized_state(fresh, _state(model))
    assert (fresh.weight - model.weight).abs().max() < 0.1


# --- Ties ---


def test_tied_model_takes_a_tied_state():
    """Aliases fill a model with the same ties once; they stay tied."""
    fresh = TiedModules()
    state = _state(TiedModules())
    assert state["aliases"]
    diffq.restore_quantized_state(fresh, state)
    assert fresh.head.weight is fresh.embed.weight


@pytest.mark.parametrize("make", [TiedModules, TwoNames])
def test_untied_model_takes_a_tied_state(make):
    """A model that does not tie the tensors gets the shared values under each name."""
    state = _state(make())
    (alias, name) = next(iter(state["aliases"].items()))
    fresh = make()
    owner, attribute = fresh.get_submodule(alias.rpartition(".")[0]), alias.rpartition(".")[2]
    setattr(owner, attribute, nn.Parameter(torch.zeros_like(fresh.get_parameter(name))))
    diffq.restore_quantized_state(fresh, state)
    assert fresh.get_parameter(alias) is not fresh.get_parameter(name)
    assert bits_of(fresh.get_parameter(alias)) == bits_of(fresh.get_parameter(name))


def _untied():
    model = TiedModules()
    model.head.weight = nn.Parameter(torch.randn(24, 16))
    return model


def test_tied_model_refuses_an_untied_state():
    """Values that differ cannot go into one tensor: both names are in the error."""
    _refused(TiedModules(), _state(_untied()), "embed.weight", "head.weight")


def test_tied_model_takes_an_untied_state_of_equal_values():
    """An untied state whose values are equal, NaN included, fits a tied model."""
    model = _untied()
    with torch.no_grad():
        model.embed.weight[0, 0] = math.nan
        model.head.weight.copy_(model.embed.weight)
    state = _state(model, exclude=["embed.weight", "head.weight"])
    fresh = diffq.restore_quantized_state(TiedModules(), state)
    assert bits_of(fresh.embed.weight) == bits_of(model.embed.weight)


# --- Into the wrong model ---


def test_missing_and_extra_names_are_listed():
    """Names that the model or the state lacks are all listed, and nothing is changed."""
    state = _state(_two_layers(same=nn.Linear(4, 4), old=nn.Linear(4, 2)))
    model = _two_layers(same=nn.Linear(4, 4), new=nn.Linear(4, 2), norm=nn.BatchNorm1d(2))
    _refused(model, state, "new.weight", "new.bias", "old.weight", "old.bias", "norm.running_var")


def test_shapes_are_listed():
    """Every tensor of another shape is listed with both shapes."""
    state = _state(_two_layers(one=nn.Linear(4, 3), two=nn.Linear(5, 6)))
    model = _two_layers(one=nn.Linear(4, 2), two=nn.Linear(5, 7))
    _refused(model, state, "one.weight", "[2, 4]", "[3, 4]", "two.bias", "[7]", "[6]")


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [((1,), (4,)), ((4,), (1,)), ((1,), ()), ((), (1,)), ((1, 4), (4, 4)), ((4,), (4, 1)),
     ((2, 3), (3, 2)), ((6,), (2, 3)), ((1, 1), (1,)), ((0,), (4,))],
)  # fmt: skip
@pytest.mark.parametrize("where", ["parameters", "buffers"])
def test_shapes_are_never_broadcast(stored, wanted, where):
    """A shape that could be broadcast or reshaped to the model's is refused all the same."""
    state = _state(Holder(**{where: {"tensor": torch.ones(stored)}}))
    _refused(Holder(**{where: {"tensor": torch.zeros(wanted)}}), state, "tensor")


@pytest.mark.parametrize("other", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_never_converted(other):
    """A model of another dtype is refused, with the conversion that would make it fit."""
    name = str(other).removeprefix("torch.")
    _refused(mlp().to(other), _state(mlp()), "0.weight", name, "float32", ".to(")
    _refused(mlp(), _state(mlp().to(other)), "0.weight", name, "float32", ".to(")


def test_dtype_of_a_buffer_is_never_converted():
    """Nor is a buffer's: int64 does not go into float32."""
    state = _state(Holder(buffers={"count": torch.tensor([1, 2])}))
    _refused(Holder(buffers={"count": torch.zeros(2)}), state, "count", "int64", "float32")


def test_long_lists_are_cut():
    """With hundreds of problems, the error shows some and counts the rest."""
    state = _state(nn.Sequential(*[nn.Linear(2, 2) for _ in range(50)]))
    with pytest.raises(diffq.MismatchError) as caught:
        diffq.restore_quantized_state(mlp(), state)
    assert "more" in str(caught.value)
    assert len(str(caught.value).splitlines()) < 20


def test_quantized_models_are_refused():
    """A state goes into a plain model: one that still has a quantizer is refused."""
    state = _state(mlp())
    model = mlp()
    quantizer = diffq.QATQuantizer(model, min_size=0)
    _refused(model, state, "detach()")
    diffq.restore_quantized_state(quantizer.detach(), state)
    assert type(model[0]) is nn.Linear


def test_parametrized_models_are_refused():
    """So is one with parametrizations of another kind, which have other names and values."""
    model = mlp()
    parametrizations.weight_norm(model[0])
    _refused(model, _state(mlp()), "parametrizations")


def test_models_without_storage_are_refused():
    """A model on the meta device could keep nothing: it is refused, not filled in silence."""
    with torch.device("meta"):
        model = mlp()
    with pytest.raises(diffq.MismatchError, match="meta"):
        diffq.restore_quantized_state(model, _state(mlp()))


def test_sparse_buffers_are_refused_by_name():
    """A tensor that cannot be stored is an error with its name, before a state is made."""
    model = mlp()
    model.register_buffer("adjacency", torch.eye(3).to_sparse())
    with pytest.raises(diffq.DiffqError, match="adjacency"):
        _state(model)


def test_damage_behind_sound_entries_changes_nothing():
    """Where the last of many tensors is damaged, the first ones are not written either."""
    state = _state(nn.Sequential(*[nn.Linear(4, 4) for _ in range(6)]))
    last = list(state["tensors"])[-1]
    state["tensors"][last]["levels"] = torch.zeros(1, dtype=torch.uint8)
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(6)])
    _refused(model, state, last, error=diffq.StateError)

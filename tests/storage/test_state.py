"""Quantized states: what they hold, whole round trips, and damage of every kind."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

import diffq
from diffq.format import bitpack
from diffq.storage.state import from_state
from tests.compare import same_bits
from tests.holder import (
    Holder,
    all_bits,
    bits_of,
    blank,
    quantizers_in,
    reloaded,
    set_bits,
    weight_quantizers,
)
from tests.models import MODELS, QUANTIZERS, computed, computed_weight

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


# --- What a state holds ---


def _leaves(value):
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_state_holds_plain_things_only(kind, packed):
    """A state is made of dicts, lists, strings, numbers and tensors on the CPU, of no subclass."""
    model = MODELS["conv"][0]()
    state = QUANTIZERS[kind](model, exclude=["*bias"], float16=True).get_quantized_state(packed)
    leaves = list(_leaves(state))
    assert {type(leaf) for leaf in leaves} == {str, int, bool, torch.Tensor}
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    assert all(t.device.type == "cpu" and not t.requires_grad for t in tensors)


@pytest.mark.parametrize("packed", [True, False])
def test_state_loads_with_weights_only(packed):
    """torch.load gives a saved state back with weights_only on, the same bit for bit."""
    model = MODELS["tied-modules"][0]()
    state = diffq.DiffQuantizer(model, min_size=0).get_quantized_state(packed)
    loaded = reloaded(state)
    for one, other in zip(_leaves(state), _leaves(loaded), strict=True):
        if isinstance(one, torch.Tensor):
            assert bits_of(one) == bits_of(other)
        else:
            assert one == other


def test_state_names_every_tensor_once():
    """Tensors stand under the plain model's names, in its order; further names are aliases."""
    model = MODELS["tied-modules"][0]()
    names = list(model.state_dict())
    state = diffq.DiffQuantizer(model, min_size=0).get_quantized_state()
    assert state["aliases"] == {"head.weight": "embed.weight"}
    assert list(state["tensors"]) == [name for name in names if name not in state["aliases"]]


@pytest.mark.parametrize("packed", [True, False])
def test_zero_points_have_a_kind_of_their_own(packed):
    """Readers that do not know zero points refuse the entry, which they would decode wrongly."""
    model = Holder({"zeros": torch.randn(30), "plain": torch.randn(30)})
    with torch.no_grad():
        model.zeros[3] = 0
    state = diffq.QATQuantizer(model, min_size=0, bits=4).get_quantized_state(packed)
    kinds = {name: entry["kind"] for name, entry in state["tensors"].items()}
    assert kinds == {"zeros": "grid with zero point", "plain": "grid"}
    assert from_state(state).records["zeros"].values()[3] == 0
    state["tensors"]["zeros"]["kind"] = "grid"
    assert from_state(state).records["zeros"].values()[3] != 0


def test_constants_have_no_zero_point():
    """An entry of one value that claims a zero point is refused as damaged."""
    state = diffq.QATQuantizer(Holder({"w": torch.ones(30)}), min_size=0).get_quantized_state()
    state["tensors"]["w"]["kind"] = "grid with zero point"
    with pytest.raises(diffq.StateError, match="'w' is damaged: A constant tensor has no levels"):
        from_state(state)


@pytest.mark.parametrize("packed", [True, False])
def test_state_is_independent_of_the_model(packed):
    """A state keeps its values when the model trains on, in raw tensors and buffers too."""
    model = Holder({"weight": torch.randn(30), "bias": torch.randn(5)}, {"mean": torch.randn(4)})
    quantizer = diffq.QATQuantizer(model, min_size=0, include=["weight"])
    state = quantizer.get_quantized_state(packed)
    before = [bits_of(leaf) for leaf in _leaves(state) if isinstance(leaf, torch.Tensor)]
    with torch.no_grad():
        for tensor in (model.bias, model.mean, model.weight):
            tensor.add_(1)
    assert [bits_of(leaf) for leaf in _leaves(state) if isinstance(leaf, torch.Tensor)] == before


def test_state_of_a_slice_is_small():
    """A tensor that is a slice of a larger one is stored without the rest of it."""
    large = torch.randn(1000)
    model = Holder({"weight": torch.randn(30)}, {"slice": large[10:14]})
    state = diffq.QATQuantizer(model, min_size=0).get_quantized_state()
    data = state["tensors"]["slice"]["data"]
    assert same_bits(data, large[10:14])
    assert data.untyped_storage().nbytes() == 16


def test_taking_a_state_changes_nothing():
    """get_quantized_state leaves the model, its mode and the random numbers alone."""
    model = MODELS["conv"][0]().train()
    quantizer = diffq.DiffQuantizer(model, min_size=0)
    before, generator = all_bits(model), torch.get_rng_state()
    quantizer.get_quantized_state()
    assert all_bits(model) == before
    assert same_bits(torch.get_rng_state(), generator)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("packed", [True, False])
def test_states_hold_the_levels(packed):
    """Both kinds of state decode to the same records: levels, bitwidths and range."""
    model = Holder({"weight": torch.randn(90)})
    quantizer = diffq.DiffQuantizer(model, min_size=0, group_size=6, min_bits=1)
    set_bits(weight_quantizers(model)["weight"], range(1, 16))
    wanted = quantizer.snapshot().records["weight"]
    found = from_state(quantizer.get_quantized_state(packed)).records["weight"]
    assert found.bits.tolist() == wanted.bits.tolist() == list(range(1, 16))
    assert found.levels.tolist() == wanted.levels.tolist()
    assert found.ranges.tolist() == wanted.ranges.tolist()
    assert found.stored_bits() == wanted.stored_bits()


# --- Round trips ---


def _scaled(values, dtype, scale):
    """Random values of an extreme or usual size that the dtype and float32 both hold."""
    limit = min(torch.finfo(dtype).max / 8, 2.0**110)
    tiny = max(torch.finfo(dtype).smallest_normal, 2.0**-126)
    sizes = {"usual": 1.0, "huge": limit, "tiny": tiny, "denormal": tiny / 64, "zero": 0.0}
    return (values.clamp(-4, 4) * sizes[scale]).to(dtype)


def _laid_out(tensor, layout):
    """The same tensor with another memory layout."""
    if layout == "channels_last" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided" and tensor.dim() > 0:
        return torch.stack([tensor, tensor], dim=-1)[..., 0]
    return tensor


@st.composite
def tensors(draw):
    """A tensor of any shape from 0-dim and empty upward, dtype, layout and size of values."""
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    scale = draw(st.sampled_from(["usual", "usual", "huge", "tiny", "denormal", "zero"]))
    tensor = _scaled(values, dtype, scale)
    kind = draw(st.sampled_from(["varied", "varied", "constant", "outlier"]))
    if kind == "constant" and tensor.numel():
        tensor = tensor.reshape(-1)[0].expand(shape).clone()
    if kind == "outlier" and tensor.numel():
        tensor.view(-1)[-1] = 60000.0
    layout = draw(st.sampled_from(["plain", "channels_last", "transposed", "strided"]))
    return _laid_out(tensor, layout)


@st.composite
def quantizers(draw):
    """A function that attaches a quantizer of any kind to a model, all tensors selected."""
    options = {"min_size": 0, "float16": draw(st.booleans())}
    kind = draw(st.sampled_from(["diffq", "diffq", "fixed", "qat", "lsq"]))
    bits = draw(st.integers(2, 15))
    if kind == "qat":
        per_channel = draw(st.booleans())
        return lambda model: diffq.QATQuantizer(
            model, bits=bits, per_channel=per_channel, **options
        )
    if kind == "lsq":
        return lambda model: diffq.LSQQuantizer(model, bits=bits, **options)
    group_size = draw(st.sampled_from([None, 1, 2, 3, 5, 8, 100]))
    if kind == "fixed":
        return lambda model: diffq.DiffQuantizer(model, bits=bits, **options)
    min_bits, seed = draw(st.integers(1, 8)), draw(st.integers(0, 2**32))

    def attach(model):
        quantizer = diffq.DiffQuantizer(model, group_size=group_size, min_bits=min_bits, **options)
        generator = torch.Generator().manual_seed(seed)
        for learned in (q.learned_or_none for q in quantizers_in(model)):
            if learned is not None:
                learned.normal_(std=4, generator=generator)
        return quantizer

    return attach


def _round_trip(model, attach, packed):
    """What eval computes with, and what a fresh model holds after saving and loading."""
    fresh = blank(model)
    quantizer = attach(model)
    model.eval()
    evaluated = {name: bits_of(tensor) for name, tensor in computed(model).items()}
    diffq.restore_quantized_state(fresh, reloaded(quantizer.get_quantized_state(packed)))
    return evaluated, {name: bits_of(getattr(fresh, name)) for name in evaluated}


@given(tensors(), tensors(), quantizers(), st.booleans())
def test_restored_weights_are_what_eval_computed(one, other, attach, packed):
    """Saved, loaded and restored, a model holds bit for bit the weights that eval computed.

    Here PyTorch computes the weights of eval, and NumPy decodes those of the state.
    """
    model = Holder({"one": one, "other": other}, {"buffer": torch.arange(3)})
    evaluated, restored = _round_trip(model, attach, packed)
    assert restored == evaluated


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [1, 7, 8])
def test_every_bitwidth_at_once(group_size, dtype, packed):
    """A tensor whose groups have every bitwidth from 1 to 15 comes back bit for bit."""
    numel = 45 * group_size - group_size // 2
    model = Holder({"weight": torch.randn(numel).to(dtype)})

    def attach(model):
        quantizer = diffq.DiffQuantizer(model, min_size=0, group_size=group_size, min_bits=1)
        bits = np.random.permutation(np.repeat(np.arange(1, 16), 3))
        set_bits(weight_quantizers(model)["weight"], bits)
        assert quantizer.bits()["weight"].tolist() == bits.tolist()
        return quantizer

    evaluated, restored = _round_trip(model, attach, packed)
    assert restored == evaluated


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -65504.0, 1e-7])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1), (6, 5)])
def test_constant_and_single_weights_keep_their_value(shape, value, packed):
    """Constant tensors, and those of a single weight, come back as they were, -0 as 0."""
    model = Holder({"weight": torch.full(shape, value)})
    wanted = model.weight.detach().clone()
    fresh = blank(model)
    quantizer = diffq.DiffQuantizer(model, min_size=0, group_size=4)
    diffq.restore_quantized_state(fresh, reloaded(quantizer.get_quantized_state(packed)))
    assert same_bits(fresh.weight, wanted + 0)


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_whole_models_come_back(kind, model):
    """Every model of the tests, under every quantizer, has eval's weights after a round trip."""
    network = MODELS[model][0]()
    fresh = blank(network)
    quantizer = QUANTIZERS[kind](network, float16=True)
    network.eval()
    diffq.restore_quantized_state(fresh, reloaded(quantizer.get_quantized_state()))
    baked = quantizer.detach(quantized=True)
    assert all_bits(fresh) == all_bits(baked)


@pytest.mark.parametrize("largest", [2.0**126, 1e38, 2.0**127, 3e38, torch.finfo().max])
@pytest.mark.parametrize("bits", [1, 2, 7, 8, 15])
def test_largest_weights_are_exact_or_refused(largest, bits):
    """Finite weights never decode to Inf: what the grid cannot hold is an error with the name."""
    model = Holder({"weight": torch.linspace(0, largest, 40)})
    fresh = blank(model)
    try:
        quantizer = diffq.QATQuantizer(model, min_size=0, bits=bits)
    except diffq.WeightError:
        assert largest > 3e38
        return
    model.eval()
    state = quantizer.get_quantized_state()
    diffq.restore_quantized_state(fresh, state)
    assert torch.isfinite(fresh.weight).all()
    assert bits_of(fresh.weight) == bits_of(computed_weight(model, "weight"))


# --- Weights that cannot be stored ---


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_weights_that_are_not_finite_are_refused(kind, bad):
    """A quantized weight that became NaN or Inf is an error with its name, in every output."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    quantizer = QUANTIZERS[kind](model)
    with torch.no_grad():
        model[1].weight[2, 1] = bad
    for write in (
        quantizer.get_quantized_state,
        quantizer.snapshot,
        lambda: quantizer.detach(quantized=True),
        lambda: model.eval()(torch.zeros(1, 4)),
    ):
        with pytest.raises(diffq.WeightError, match=r"1\.weight"):
            write()


def test_range_that_float32_cannot_hold_is_refused():
    """Weights whose range overflows float32 are an error with the tensor's name."""
    too_wide = torch.tensor([-3e38, 0.0, 3e38])
    with pytest.raises(diffq.WeightError, match="weight"):
        diffq.QATQuantizer(Holder({"weight": too_wide}), min_size=0)
    double = Holder({"weight": torch.tensor([0.0, 1e300], dtype=torch.float64)})
    with pytest.raises(diffq.WeightError, match="weight"):
        diffq.QATQuantizer(double, min_size=0)
    model = Holder({"weight": torch.randn(3)})
    quantizer = diffq.QATQuantizer(model, min_size=0)
    with torch.no_grad():
        model.weight.copy_(too_wide)
    with pytest.raises(diffq.WeightError, match="weight"):
        quantizer.get_quantized_state()


def test_bitwidths_that_are_not_finite_are_refused():
    """Logits that a bad loss made NaN are an error with the tensor's name."""
    model = Holder({"weight": torch.randn(30)})
    quantizer = diffq.DiffQuantizer(model, min_size=0)
    with torch.no_grad():
        weight_quantizers(model)["weight"].logits[1] = math.nan
    for read in (quantizer.get_quantized_state, quantizer.true_model_size, quantizer.bits):
        with pytest.raises(diffq.WeightError, match="weight"):
            read()


def test_float16_overflow_is_refused():
    """A finite weight that float16 would make infinite is an error with its name."""
    model = Holder({"weight": torch.randn(30), "bias": torch.tensor([1.0, 7e4])})
    quantizer = diffq.QATQuantizer(model, min_size=0, include=["weight"], float16=True)
    with pytest.raises(diffq.WeightError, match="bias"):
        quantizer.get_quantized_state()


# --- Damage ---

#: Bitwidths of the layer's groups, counted from 2.
OFFSETS = np.array([0, 1, 1, 7, 13, 0, 2, 3], np.uint16)
LAYER = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))


def _plain():
    model = Holder({"layer": LAYER.clone(), "raw": LAYER[0].clone()}, {"count": torch.tensor(3)})
    model.tied = model.layer
    return model


def _state(kind, packed=True):
    """A sound state of `_plain`: its layer has several bitwidths, or one."""
    model = _plain()
    if kind == "scaled":
        quantizer = diffq.LSQQuantizer(model, min_size=0, bits=4, exclude=["raw"])
    elif kind == "fixed":
        quantizer = diffq.QATQuantizer(model, min_size=0, bits=4, exclude=["raw"])
    else:
        quantizer = diffq.DiffQuantizer(model, min_size=0, group_size=4, exclude=["raw"])
        set_bits(weight_quantizers(model)["layer"], OFFSETS + 2)
    return quantizer.get_quantized_state(packed)


def _refused(state, name, error=diffq.StateError):
    """Checks that a state is refused by name, and that the model stays as it was."""
    model = blank(_plain())
    before = all_bits(model)
    with pytest.raises(error, match=name):
        diffq.restore_quantized_state(model, state)
    assert all_bits(model) == before


KINDS = [("grid", True), ("grid", False), ("fixed", True), ("scaled", True), ("scaled", False)]


@pytest.mark.parametrize(("kind", "packed"), KINDS)
def test_sound_states_are_restored(kind, packed):
    """The states that the tests below damage are sound."""
    model = blank(_plain())
    diffq.restore_quantized_state(model, _state(kind, packed))
    assert model.count.item() == 3
    assert same_bits(model.raw, LAYER[0])
    assert (model.layer - LAYER).abs().max() < 2
    assert model.tied is model.layer


@pytest.mark.parametrize(("kind", "packed"), KINDS)
def test_each_part_is_needed(kind, packed):
    """An entry that lacks any of its parts is refused by name."""
    keys = {name: list(entry) for name, entry in _state(kind, packed)["tensors"].items()}
    assert len(keys["layer"]) >= 8
    for name in ("layer", "raw", "count"):
        for key in keys[name]:
            state = _state(kind, packed)
            del state["tensors"][name][key]
            _refused(state, name)


@pytest.mark.parametrize(("kind", "packed"), KINDS)
def test_each_part_has_its_type(kind, packed):
    """A part of another type is refused by name."""
    others = [None, "text", b"bytes", 1.5, [], {}, object(), (1,), True, torch.ones(2, 2) > 0]
    for name in ("layer", "raw", "count"):
        for key, value in _state(kind, packed)["tensors"][name].items():
            for other in others:
                if type(other) is type(value) and not isinstance(value, torch.Tensor):
                    continue
                state = _state(kind, packed)
                state["tensors"][name][key] = other
                _refused(state, name)


@pytest.mark.parametrize(("kind", "packed"), KINDS)
def test_each_tensor_has_its_dtype(kind, packed):
    """A tensor of another dtype than the format's is refused by name."""
    for key, value in _state(kind, packed)["tensors"]["layer"].items():
        if not isinstance(value, torch.Tensor):
            continue
        for dtype in {torch.uint8, torch.int8, torch.int16, torch.int64, torch.float16,
                      torch.float32, torch.float64, torch.bool} - {value.dtype}:  # fmt: skip
            state = _state(kind, packed)
            state["tensors"]["layer"][key] = value.to(dtype)
            _refused(state, "layer")


@pytest.mark.parametrize(("kind", "packed"), KINDS)
def test_each_tensor_has_its_size(kind, packed):
    """A tensor that is too short, too long or empty is refused by name."""
    for name in ("layer", "raw", "count"):
        for key, value in _state(kind, packed)["tensors"][name].items():
            if not isinstance(value, torch.Tensor) or not value.numel():
                continue
            for other in (
                value.reshape(-1)[:-1],
                torch.cat([value.reshape(-1), value.reshape(-1)]),
                value.reshape(-1)[:0],
            ):
                state = _state(kind, packed)
                state["tensors"][name][key] = other
                _refused(state, name)


@pytest.mark.parametrize(("kind", "packed"), KINDS)
def test_each_tensor_has_its_dimensions(kind, packed):
    """A tensor of the right elements in more or fewer dimensions is refused by name."""
    for key, value in _state(kind, packed)["tensors"]["layer"].items():
        if not isinstance(value, torch.Tensor):
            continue
        for other in (value[None], value[..., None], value.reshape(-1, 1), value.reshape(-1)):
            if other.shape != value.shape:
                state = _state(kind, packed)
                state["tensors"]["layer"][key] = other
                _refused(state, "layer")


def _unusual(value):
    """Tensors of the right shape and dtype that hold no bytes of their own."""
    yield value.to("meta")
    yield value.reshape(-1)[:1].expand(2**45)
    if value.dim():
        yield value.to_sparse()


@pytest.mark.parametrize(("kind", "packed"), KINDS)
def test_unusual_tensors_are_refused(kind, packed):
    """Meta, sparse and expanded tensors are refused by name, and nothing large is allocated."""
    for name in ("layer", "raw", "count"):
        for key, value in _state(kind, packed)["tensors"][name].items():
            if not isinstance(value, torch.Tensor) or not value.numel():
                continue
            for other in _unusual(value):
                state = _state(kind, packed)
                state["tensors"][name][key] = other
                _refused(state, name)


HUGE = 10**30

#: Damage to the layer's entry in any state of levels.
NUMBERS = [
    *[{"group_size": size} for size in (0, -1, 31, 2**40, HUGE)],
    *[{"min_bits": bits} for bits in (0, -1, 16, 256 + 2, HUGE)],
    *[{"kind": kind} for kind in ("raw", "codebook", "")],
    *[{"dtype": name} for name in ("int64", "float31", "", "Tensor", "complex64", "float64")],
    *[{"shape": shape} for shape in ([], [30], [5, 6], [6, 5, 1], [6, 6], [0], [-6, -5])],
    *[{"shape": shape} for shape in ([6.0, 5], ["6", 5], [True, 30], [None])],
    *[{"shape": shape} for shape in ([2**40], [2**20, 2**30], [2**62], [2**61, 2**61], [HUGE])],
    {"shape": [0, 2**61]},
]

#: Damage to the layer's entry in packed states with a bit map.
PACKED = [
    *[{"map_width": width} for width in (-1, 0, 3, 5, 9, 16, HUGE)],
    {"bit_map": torch.full((4,), 255, dtype=torch.uint8)},
    # Sound but for 256 in every number, which a byte would drop.
    {"map_width": 9, "bit_map": torch.from_numpy(bitpack.pack(OFFSETS + np.uint16(256), 9))},
    {"group_size": 3},
    {"min_bits": 3},
    {"packed": False},
]

#: Damage to the layer's entry in packed states of one bitwidth.
FIXED = [
    *[{"bits": bits} for bits in (0, -1, 3, 5, 16, 255, 256 + 4, HUGE)],
    *[{"map_width": width} for width in (1, 4, -1)],
]

#: Damage to the layer's entry in states that spell everything out.
SPELLED = [
    {"levels": torch.full((30,), 2**14, dtype=torch.int16)},
    {"levels": torch.full((30,), -1, dtype=torch.int16)},
    *[{"bit_map": torch.full((8,), bits, dtype=torch.uint8)} for bits in (0, 1, 16, 32, 40, 255)],
    {"packed": True},
]

#: Damage to the range of a grid.
RANGES = [
    {"ranges": torch.tensor(ranges)}
    for ranges in (
        [[math.nan, 1.0]],
        [[0.0, math.inf]],
        [[-math.inf, math.inf]],
        [[math.inf, math.inf]],
        [[1.0, 0.0]],
        [[-3e38, 3e38]],
        [[0.0, 3.4028234e38]],
        [[0.0, 1.0], [0.0, 1.0]],
        [[0.0, 1.0, 2.0]],
        [[0.0]],
        [0.0, 1.0],
        0.0,
        [[[0.0, 1.0]]],
    )
] + [{"ranges": torch.zeros(shape)} for shape in ((0, 2), (1, 0), (0,), (2, 1), (1, 2, 1))]

#: Damage to the scale of LSQ.
SCALES = [
    {"scale": torch.tensor(scale)}
    for scale in ([math.nan], [math.inf], [1.0, 1.0], [[1.0]], [], [3e38], 1.0)
]


def _damages():
    damages = []
    for kind, packed in KINDS:
        own = PACKED if (kind, packed) == ("grid", True) else []
        own = FIXED if kind == "fixed" else own
        own = SPELLED if (kind, packed) == ("grid", False) else own
        for change in [*NUMBERS, *own, *(SCALES if kind == "scaled" else RANGES)]:
            label = f"{kind}-{packed}-{_label(change)}"
            damages.append(pytest.param(kind, packed, change, id=label))
    return damages


def _label(change):
    return ",".join(
        f"{k}={v.tolist() if isinstance(v, torch.Tensor) else v!r}"[:40] for k, v in change.items()
    )


@pytest.mark.parametrize(("kind", "packed", "change"), _damages())
def test_damaged_levels_are_refused(kind, packed, change):
    """Numbers out of range, hostile shapes, and parts that contradict each other are refused.

    The error names the tensor, the model stays as it was, and huge sizes allocate nothing.
    """
    state = _state(kind, packed)
    state["tensors"]["layer"].update(change)
    _refused(state, "layer|tied")


@pytest.mark.parametrize("shape", [[2**20, 2**30], [2**36], [2**61], [2**61, 2**61]])
@pytest.mark.parametrize("group_size", [1, 30, 2**36])
def test_hostile_constants_allocate_nothing(shape, group_size):
    """A constant tensor needs no bytes: its shape is compared before anything is made of it."""
    state = _state("fixed")
    state["tensors"]["layer"].update(
        shape=shape,
        group_size=group_size,
        ranges=torch.zeros(1, 2),
        levels=torch.zeros(0, dtype=torch.uint8),
    )
    _refused(state, "layer")


@pytest.mark.parametrize(
    "change",
    [
        {"shape": []},
        {"shape": [6]},
        {"shape": [2**62]},
        {"shape": [-1]},
        {"dtype": "float64"},
        {"dtype": "float31"},
        {"dtype": "int64"},
        {"data": torch.zeros(5).double()},
        {"data": torch.zeros(5, dtype=torch.int32)},
        {"data": torch.zeros(5, dtype=torch.complex64).conj()},
        {"data": torch.zeros(5, 1)},
        {"data": torch.zeros(5), "shape": [5, 1]},
        {"kind": "grid"},
        {"kind": "scaled"},
    ],
    ids=_label,
)
def test_damaged_raw_tensors_are_refused(change):
    """Raw tensors whose shape, dtype and data contradict each other or the model are refused."""
    state = _state("grid")
    state["tensors"]["raw"].update(change)
    _refused(state, "raw")


@pytest.mark.parametrize(
    "aliases",
    [
        {"tied": "nothing"},
        {"tied": "tied"},
        {"tied": None},
        {"tied": 1},
        {"tied": ["layer"]},
        {"tied": {}},
        {"layer": "layer"},
        {"layer": "raw", "tied": "layer"},
        {"tied": "layer", "other": "tied"},
        {"tied": "layer", 5: "layer"},
        {"tied": "layer", None: "layer"},
    ],
    ids=str,
)
def test_damaged_aliases_are_refused(aliases):
    """An alias must be a new name for a stored tensor."""
    state = _state("grid")
    state["aliases"] = aliases
    _refused(state, "alias|nothing|tied")


@pytest.mark.parametrize("key", ["format", "version", "tensors", "aliases"])
@pytest.mark.parametrize(
    "value",
    [None, "other", "", 0, 2, -1, 1.0, True, "1", [], (), torch.tensor(1), torch.tensor([1, 1])],
    ids=repr,
)
def test_other_formats_and_versions_are_refused(key, value):
    """A state of another format or version, or without its parts, is refused."""
    state = _state("grid")
    state[key] = value
    _refused(state, "state")
    state = _state("grid")
    del state[key]
    _refused(state, "state")


@pytest.mark.parametrize(
    "state", [None, 5, "text", [], {}, {"format": "diffq.state"}, torch.ones(3)], ids=repr
)
def test_other_things_are_refused(state):
    """What is no quantized state at all is refused, a plain state dict included."""
    _refused(state, "state")
    _refused(_plain().state_dict(), "state")


@pytest.mark.parametrize("name", [None, 5, ("layer",), b"layer"])
@pytest.mark.parametrize("entry", [None, [], "text", torch.ones(2), 3])
def test_entries_are_names_and_dicts(name, entry):
    """Names that are no strings, and entries that are no dicts, are refused."""
    state = _state("grid")
    state["tensors"][name] = state["tensors"].pop("layer")
    _refused(state, "layer|name")
    state = _state("grid")
    state["tensors"]["layer"] = entry
    _refused(state, "layer")


#: What a mutation puts in a place: numbers around every limit, other types, odd tensors.
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.sampled_from([255, 256, 2**15, 2**31, 2**40, 2**62, 2**63, 2**64, -(2**63), HUGE]),
    st.floats(),
    st.text(max_size=4),
    st.sampled_from(["grid", "raw", "scaled", "float32", "float16", "int64", "layer", "tied"]),
    st.lists(st.integers(-1, 8), max_size=4),
    st.just([]),
    st.just({}),
    st.binary(max_size=4),
    hnp.arrays(np.uint8, hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=30)),
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=4)),
    hnp.arrays(np.int16, 30),
    hnp.arrays(np.int64, 2),
).map(lambda v: torch.from_numpy(v.copy()) if isinstance(v, np.ndarray) else v)


def _places(value, path=()):
    """The path to everything inside of a state."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield (*path, key)
        if isinstance(item, dict | list):
            yield from _places(item, (*path, key))


def _flip(tensor, data):
    """Sets some bytes of a tensor to others."""
    changed = tensor.clone().contiguous()
    raw = changed.reshape(-1).view(torch.uint8)
    assume(raw.numel())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, raw.numel() - 1))] = data.draw(st.integers(0, 255))
    return changed


def _mutate(state, data):
    """Damages one random place of a state."""
    places = list(_places(state))
    *path, key = data.draw(st.sampled_from(places))
    holder = state
    for step in path:
        holder = holder[step]
    action = data.draw(st.sampled_from(["replace", "replace", "flip", "delete", "add"]))
    if action == "delete":
        del holder[key]
    elif action == "add" and isinstance(holder, dict):
        new = data.draw(st.one_of(st.text(max_size=3), st.integers(), st.none()))
        holder[new] = data.draw(VALUES)
    elif action == "flip" and isinstance(holder[key], torch.Tensor):
        holder[key] = _flip(holder[key], data)
    else:
        holder[key] = data.draw(VALUES)


STATES = {(kind, packed): _state(kind, packed) for kind, packed in KINDS}


@given(st.sampled_from(KINDS), st.data())
def test_any_damage_restores_or_is_refused(case, data):
    """Whatever is changed in a state, restoring it works or raises a DiffqError, nothing else.

    Where it is refused, the model is unchanged; where it works, weights are finite numbers.
    """
    state = copy.deepcopy(STATES[case])
    for _ in range(data.draw(st.integers(1, 3))):
        _mutate(state, data)
    model = blank(_plain())
    before = all_bits(model)
    try:
        diffq.restore_quantized_state(model, state)
    except diffq.DiffqError:
        assert all_bits(model) == before
    else:
        assert state["tensors"]["layer"]["kind"] == "raw" or torch.isfinite(model.layer).all()

"""`small_bits`: small parameters at a fixed bitwidth, in eval, states and files alike."""

import copy
import io
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import nn
from torch.nn.utils import prune

import diffq
from diffq.cli.inspect import describe
from diffq.errors import AttachError, ConfigError, MismatchError, WeightError
from diffq.reports.summary import summarize
from diffq.storage.open import StoredModel
from tests.compare import close, same_bits
from tests.holder import Holder, by_pickle, by_torch, reloaded
from tests.models import (
    QUANTIZERS,
    computed,
    computed_weight,
    evaluate_alike,
    mlp,
    refused,
    restored,
    seeded,
    snapshot_of,
    step,
)
from tests.processors import repeatable

#: MB of 64 weights: what has more is quantized by the method.
LIMIT = 64 * 4 / 2**20

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def _net():
    """Two layers with 512 and 256 weights; four small parameters, which are no round numbers."""
    model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Linear(32, 8))
    nn.init.uniform_(model[1].weight, 0.5, 1.5)
    nn.init.normal_(model[1].bias)
    return model


SMALL = ["0.bias", "1.weight", "1.bias", "2.bias"]


def _attached(kind="diffq", make=_net, **options):
    model = seeded(make)
    quantizer = QUANTIZERS[kind](model, **{"min_size": LIMIT, "small_bits": 8, **options})
    quantizer.no_optimizer()
    return model, quantizer


def _holder(parameters, **options):
    """The quantizer of some tensors that are all small."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", diffq.DiffqWarning)
        options = {"min_size": 1, "small_bits": 8, **options}
        return diffq.QATQuantizer(Holder(parameters), **options)


def _filed(quantizer, **options):
    """The tensors that a file of the quantizer holds, by sorted names."""
    file = io.BytesIO()
    diffq.save(quantizer, file, **options)
    file.seek(0)
    return dict(sorted(diffq.load(file).items()))


def _in_eval(quantizer, name="weight"):
    return computed_weight(quantizer.model.eval(), name).detach()


def _small(quantizer):
    """The names of the tensors that are stored at `small_bits`."""
    return [plan.name for plan in quantizer.plan if plan.small]


# Values


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_eval_is_the_file(kind, dtype, tmp_path):
    """What eval computes with is what state, file and detached model hold, bit for bit."""
    model, quantizer = _attached(kind, lambda: _net().to(dtype))
    plain = snapshot_of(model)
    assert _small(quantizer) == SMALL
    evaluated = computed(model.eval())
    assert not any(same_bits(evaluated[name], plain[name]) for name in SMALL)
    diffq.save(quantizer, tmp_path / "model.diffq")
    fresh = diffq.load(tmp_path / "model.diffq", _net().to(dtype))
    assert same_bits(computed(fresh.eval()), evaluated)
    assert same_bits(computed(restored(lambda: _net().to(dtype), quantizer)), evaluated)
    assert same_bits(computed(quantizer.detach(quantized=True)), evaluated)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("bits", [4, 8, 15])
def test_a_saved_state_restores(packed, bits):
    """A state through torch.save restores the values, packed or spelled out."""
    model, quantizer = _attached(small_bits=bits)
    state = reloaded(quantizer.get_quantized_state(packed))
    fresh = diffq.restore_quantized_state(_net(), state)
    assert evaluate_alike(model, fresh, torch.ones(2, 16))


@given(
    arrays.arrays(
        np.float32,
        st.integers(2, 40),
        elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
    ),
    st.integers(4, 15),
)
def test_values_are_levels_times_the_scale(values, bits):
    """The scale is max|w| / (2**(bits-1) - 1), and each value the nearest multiple, in float32."""
    highest = np.float32(2 ** (bits - 1) - 1)
    scale = np.maximum(np.abs(values).max() / highest, np.finfo(np.float32).tiny)
    expected = np.rint(values / scale) * scale + np.float32(0)
    quantizer = _holder({"weight": torch.from_numpy(values.copy())}, small_bits=bits)
    expected = torch.from_numpy(expected.astype(np.float32))
    stored = bits * len(values) + 40 < 32 * len(values)
    assert same_bits(_in_eval(quantizer), expected if stored else torch.from_numpy(values))
    assert same_bits(_filed(quantizer)["weight"], _in_eval(quantizer))


@pytest.mark.parametrize("bits", range(4, 16))
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_and_ones_stay(bits, dtype):
    """Zeros and a norm of ones are exact at each bitwidth; minus zero becomes zero."""
    mixed = torch.tensor([0.0, -0.0, 0.3, 1.0, -1.0, *[0.0] * 60], dtype=dtype)
    ones, zeros = torch.ones(64, dtype=dtype), torch.zeros(64, dtype=dtype)
    quantizer = _holder({"mixed": mixed, "ones": ones, "zeros": zeros}, small_bits=bits)
    assert _small(quantizer) == ["mixed", "ones", "zeros"]
    values, filed = computed(quantizer.model.eval()), _filed(quantizer)
    assert same_bits(values["ones"], ones)
    assert same_bits(values["zeros"], zeros)
    assert same_bits(values["mixed"][[0, 1, 3, 4]], torch.tensor([0, 0, 1, -1], dtype=dtype))
    assert same_bits(filed, values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("exponent", [-149, -140, -120, -20, 0, 10, 100, 127])
def test_magnitudes_from_end_to_end(dtype, exponent):
    """From the smallest numbers to the largest, values are finite and within half a step."""
    weight = torch.linspace(-1, 1.5, 64, dtype=torch.float64).mul(2.0**exponent).to(dtype)
    if not weight.isfinite().all():
        pytest.skip("the dtype has no such numbers")
    quantizer = _holder({"weight": weight})
    value = _in_eval(quantizer)
    assert value.isfinite().all()
    assert same_bits(_filed(quantizer)["weight"], value)
    step_size = max(weight.abs().max().item() / 127, torch.finfo(torch.float32).tiny)
    rounding = torch.finfo(dtype).eps * weight.abs().double() + torch.finfo(dtype).tiny
    assert ((value.double() - weight.double()).abs() <= 0.5001 * step_size + rounding).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_largest_of_half_types(dtype):
    """The largest number of a half type stays finite."""
    largest = torch.finfo(dtype).max
    weight = torch.tensor([largest, -largest, *[1.0] * 30], dtype=dtype)
    if dtype == torch.bfloat16:
        weight = weight / 2  # the outermost levels of 8 bits would be beyond float32
    value = _in_eval(_holder({"weight": weight}))
    assert value.isfinite().all()
    assert same_bits(value[:2], weight[:2])


@pytest.mark.parametrize("shape", [(), (1,), (2,), (1, 1, 3), (4, 1, 5), (0,), (3, 0), (1,) * 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", ["zstd", "rans"])
def test_all_shapes_are_filed(shape, dtype, codec):
    """Scalars, empty tensors and tensors of many dimensions come back from a file as in eval."""
    weight = torch.linspace(-0.9, 0.7, torch.Size(shape).numel(), dtype=dtype).reshape(shape)
    quantizer = _holder({"weight": weight})
    value = _in_eval(quantizer)
    assert same_bits(_filed(quantizer, codec=codec)["weight"], value)
    assert same_bits(restored(lambda: Holder({"weight": weight}), quantizer).weight, value)


def test_training_uses_the_plain_tensor():
    """Training reads the Parameter itself, and its gradient is that of the plain model's."""
    model, _ = _attached(overrides={"*": {"bits": 15}}, small_bits=4)
    assert all(same_bits(computed(model.train())[n], snapshot_of(model)[n]) for n in SMALL)
    assert computed_weight(model.train(), "1.bias") is model[1].bias


@repeatable()
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_training_is_the_same(kind):
    """Weights, bits and optimizer train as without small_bits, bit for bit."""
    trained = []
    for bits in (None, 8):
        model, quantizer = _attached(kind, small_bits=bits)
        optimizer = torch.optim.AdamW(model.parameters(), 0.02)
        quantizer.setup_optimizer(optimizer, lr=0.1)
        torch.manual_seed(5)
        for _ in range(4):
            step(model.train(), optimizer, torch.randn(5, 16), quantizer)
        trained.append(dict(model.named_parameters()) | dict(model.named_buffers()))
    assert same_bits(*trained)


def test_eval_passes_gradients_straight_through():
    """In eval mode, the gradient of the value is that of the Parameter."""
    model, _ = _attached()
    computed_weight(model.eval(), "1.bias").sum().backward()
    assert close(model[1].bias.grad, torch.ones(32))


def test_eval_follows_the_parameter():
    """An optimizer step, a load and a write change what eval computes with."""
    model, quantizer = _attached()
    step(model, torch.optim.SGD(model.parameters(), 1.0), torch.randn(5, 16))
    assert evaluate_alike(model, restored(_net, quantizer), torch.ones(2, 16))
    model.load_state_dict({**model.state_dict(), **seeded(_net, 1).state_dict()})
    assert evaluate_alike(model, restored(_net, quantizer), torch.ones(2, 16))
    with torch.no_grad():
        model[1].bias.fill_(2.5)
    assert evaluate_alike(model, restored(_net, quantizer), torch.ones(2, 16))


def test_pruned_elements_stay_zero():
    """Elements that a mask holds at zero are exactly zero in eval and file."""
    model = seeded(_net)
    prune.l1_unstructured(model[1], "bias", amount=0.5)
    diffq.parametrize_pruning(model)
    mask = model[1].parametrizations.bias[0].mask.clone()
    quantizer = diffq.DiffQuantizer(model, min_size=LIMIT, small_bits=8)
    quantizer.no_optimizer()
    value = computed(model.eval())["1.bias"]
    assert "1.bias" in _small(quantizer)
    assert (value[~mask].view(torch.int32) == 0).all()
    assert (value[mask] != 0).all()
    assert same_bits(_filed(quantizer)["1.bias"], value)


def test_ties_share_one():
    """A small tensor under two names is stored once, and both read the same value."""
    shared = nn.Parameter(torch.randn(20))
    quantizer = _holder({"one": shared, "two": shared})
    quantizer.no_optimizer()
    assert quantizer.true_model_size() * 2**23 == 20 * 8 + 40
    values = computed(quantizer.model.eval())
    assert same_bits(values["one"], values["two"])
    assert same_bits(_filed(quantizer), values)


@pytest.mark.parametrize("through", [copy.deepcopy, by_pickle, by_torch])
def test_copies(through):
    """A copy of the model has the small tensors of the original."""
    model, quantizer = _attached()
    other = through(model)
    assert evaluate_alike(model, other, torch.ones(2, 16))
    assert diffq.quantizer_of(other).bits().keys() == quantizer.bits().keys()


def test_compiled_eval():
    """Compiled eval computes with the values of the file."""
    torch._dynamo.reset()
    model, quantizer = _attached()
    read = []
    model[2].register_forward_hook(lambda module, *_: read.append(module.bias))
    compiled = torch.compile(model.eval(), backend="eager")
    with torch.no_grad():
        compiled(torch.ones(2, 16))
    torch._dynamo.reset()
    assert same_bits(read[-1].detach(), _filed(quantizer)["2.bias"])


# Selection


@pytest.mark.parametrize(
    ("dtype", "bits", "least"),
    [
        (torch.float32, 8, 2),  # 2 * 8 + 40 < 2 * 32
        (torch.float32, 15, 3),  # 3 * 15 + 40 < 3 * 32
        (torch.float64, 8, 1),  # 8 + 40 < 64
        (torch.float16, 8, 6),  # 6 * 8 + 40 < 6 * 16
        (torch.bfloat16, 4, 4),  # 4 * 4 + 40 < 4 * 16
        (torch.float16, 15, 41),  # 41 * 15 + 40 < 41 * 16
    ],
)
def test_only_where_it_is_smaller(dtype, bits, least):
    """A tensor whose levels and scale would take as many bits or more stays as it is."""
    tensors = {f"w{n}": torch.rand(n, dtype=dtype) for n in (1, least - 1, least, 50) if n}
    quantizer = _holder(tensors, small_bits=bits)
    small = _small(quantizer)
    assert [name for name in tensors if int(name[1:]) >= least] == small
    assert all(same_bits(_in_eval(quantizer, n), tensors[n]) for n in tensors.keys() - set(small))


def test_what_is_small():
    """Parameters up to min_size are; buffers, whole numbers and large ones are not."""
    model = Holder(
        {
            "at": torch.randn(64),
            "above": torch.randn(65),
            "matrix": torch.randn(4, 4),
            "whole": nn.Parameter(torch.arange(64), requires_grad=False),
            "frozen": nn.Parameter(torch.randn(64), requires_grad=False),
            "phases": torch.randn(20, dtype=torch.complex64),
        },
        {"running_mean": torch.randn(64), "ids": torch.arange(9)},
    )
    quantizer = diffq.DiffQuantizer(model, min_size=LIMIT, small_bits=8)
    assert _small(quantizer) == ["at", "matrix", "frozen"]
    assert [plan.name for plan in quantizer.plan if plan.quantized] == ["above"]


@pytest.mark.parametrize(
    ("options", "small"),
    [
        ({"exclude": ["*.bias"]}, ["1.weight"]),
        ({"exclude": ["1.*"]}, ["0.bias", "2.bias"]),
        ({"include": ["0.*"]}, ["0.bias"]),
        ({"include": ["*.weight"], "exclude": ["2.weight"]}, ["1.weight"]),
        ({"include": ["2.weight", "1.bias"]}, ["1.bias"]),
        ({"small_bits": None}, []),
        ({"min_size": 0}, []),
    ],
)
def test_patterns_hold_for_small_tensors(options, small):
    """What is excluded, or not included, stays bit for bit."""
    model, quantizer = _attached(**options)
    assert _small(quantizer) == small
    evaluated, plain = computed(model.eval()), snapshot_of(model)
    left = set(SMALL) - set(small) - quantizer.bits().keys()
    assert all(same_bits(evaluated[name], plain[name]) for name in left)


def test_codebooks_leave_vectors():
    """A method for matrices has all vectors at small_bits, however large they are."""
    model = Holder({"matrix": torch.randn(32, 16), "vector": torch.randn(5000)})
    quantizer = diffq.ProductQuantizer(model, min_size=0, codebook_size=4, small_bits=8)
    assert _small(quantizer) == ["vector"]
    assert quantizer.bits().keys() == {"vector"}


def test_float16_takes_what_is_left():
    """With both, small_bits goes first where it is smaller than float16; float16 has the rest."""
    tensors = {"one": torch.rand(1), "five": torch.rand(5), "six": torch.rand(6)}
    tensors |= {"excluded": torch.rand(9), "wide": torch.rand(6, dtype=torch.float64)}
    quantizer = _holder(tensors, float16=True, exclude=["excluded"])
    assert _small(quantizer) == ["six", "wide"]
    bits = 16 * (1 + 5 + 9) + 2 * (6 * 8 + 40)
    assert quantizer.true_model_size() * 2**23 == quantizer.model_size().item() * 2**23 == bits
    values = computed(quantizer.model.eval())
    for name in ("one", "five", "excluded"):
        assert same_bits(values[name], tensors[name].half().float())
    assert same_bits(_filed(quantizer), values)


# Sizes


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("bits", [4, 8])
def test_sizes_to_the_bit(kind, bits):
    """Small tensors take `bits` an element, 32 for the scale and 8 for the bitwidth."""
    _, without = _attached(kind, small_bits=None)
    _, quantizer = _attached(kind, small_bits=bits)
    elements = 32 + 32 + 32 + 8
    saved = 32 * elements - (bits * elements + 4 * 40)
    difference = (without.true_model_size() - quantizer.true_model_size()) * 2**23
    assert difference == saved
    difference = (without.model_size() - quantizer.model_size()) * 2**23
    assert difference.item() == pytest.approx(saved, abs=0.1)
    smaller = without.compressed_model_size() - quantizer.compressed_model_size()
    # The index of the file says a little more of a tensor of levels.
    assert 0.6 * saved < smaller * 2**23 < saved


def test_bits_and_means_are_those_of_the_file(tmp_path):
    """`bits`, `mean_bits` and `diffq inspect` count the small tensors among the quantized ones."""
    _, quantizer = _attached("diffq-fixed")
    widths = {name: bits.tolist() for name, bits in quantizer.bits().items()}
    assert widths == {"0.weight": [5], "2.weight": [5]} | {name: [8] for name in SMALL}
    mean = (5 * 768 + 8 * 104) / (768 + 104)
    assert quantizer.mean_bits() == pytest.approx(mean)
    diffq.save(quantizer, tmp_path / "model.diffq")
    with StoredModel(tmp_path / "model.diffq") as stored:
        described = describe("model.diffq", summarize(stored.reader))
    assert described["mean_bits"] == pytest.approx(mean)
    kinds = {
        tensor["name"]: (tensor["kind"], tensor["mean_bits"]) for tensor in described["tensors"]
    }
    assert all(kinds[name] == ("scaled", 8.0) for name in SMALL)
    assert kinds["1.running_mean"] == ("raw", None)


def test_the_table_has_one_row_for_small_tensors():
    """The table counts small tensors in one row, and all tensors in the end."""
    _, quantizer = _attached("diffq-fixed")
    rows = [line.split() for line in repr(quantizer).splitlines()]
    megabytes = f"{(8 * 104 + 4 * 40) / 2**23:.4f}"
    assert ["4", "small", "4", "8.00", megabytes] in rows
    assert any(row[:3] == ["3", "without", "levels"] for row in rows)
    assert rows[-1][:2] == ["total", f"{quantizer.mean_bits():.2f}"]
    assert "small" not in repr(_attached(small_bits=None)[1])


def test_a_target_counts_them():
    """The least size of a target is smaller by what small tensors save, and the file fits."""
    _, without = _attached(small_bits=None)
    model, quantizer = _attached(group_size=8)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for each in (without, quantizer):
        with pytest.raises(ConfigError, match="small_bits"):
            each.setup_optimizer(
                torch.optim.Adam(each.model.parameters()), target_mb=1e-6, steps=40
            )
    target = 0.9 * quantizer.compressed_model_size()
    quantizer.setup_optimizer(optimizer, target_mb=target, steps=40)
    for _ in range(40):
        optimizer.zero_grad()
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
    size = quantizer.compressed_model_size()
    assert 0.95 * target < size <= target
    assert evaluate_alike(model, restored(_net, quantizer), torch.ones(2, 16))


# Checkpoints


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_checkpoints_go_on(kind):
    """A checkpoint loads under the same small_bits, and then eval is the same."""
    model, quantizer = _attached(kind)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    quantizer.setup_optimizer(optimizer)
    step(model, optimizer, torch.randn(5, 16))
    other, _ = _attached(kind, lambda: seeded(_net, 3))
    other.load_state_dict(reloaded(model.state_dict()))
    assert evaluate_alike(model, other, torch.ones(2, 16))


@pytest.mark.parametrize(("saved", "asked"), [(8, None), (None, 8), (8, 6)])
def test_checkpoints_of_other_settings(saved, asked):
    """With other small_bits, eval would be another model, so the load is refused."""
    model, _ = _attached(small_bits=saved)
    other, _ = _attached(small_bits=asked)
    state = snapshot_of(model)
    words = ("bits=8", "bits=6") if asked == 6 else ("same quantized tensors", "0.bias")
    refused(other, MismatchError, lambda m: m.load_state_dict(state), *words, "Make the quantizer")
    weights = {name: tensor for name, tensor in state.items() if not name.startswith("_diffq.")}
    other.load_state_dict(weights, strict=False)


def test_checkpoints_of_halves():
    """A tensor in float16 and one at small_bits are two models too."""
    model, _ = _attached(small_bits=None, float16=True)
    other, _ = _attached()
    words = ("method=float16=True", "method=small_bits")
    refused(other, MismatchError, lambda m: m.load_state_dict(snapshot_of(model)), *words)


# Errors and warnings


@pytest.mark.parametrize("value", [0, 3, 16, -8, 8.0, "8", True, np.float32(8), [8]])
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_bad_small_bits(kind, value):
    """A small_bits that is no whole number from 4 to 15 is refused with the remedy."""
    words = ("small_bits", "None", "from 4 to 15", repr(value), "Pass 8")
    refused(mlp(), ConfigError, lambda m: QUANTIZERS[kind](m, small_bits=value), *words)


def test_small_bits_of_numpy():
    """NumPy's whole numbers do, and leave nothing of theirs in states and checkpoints."""
    model, quantizer = _attached(small_bits=np.int64(6))
    other, _ = _attached(small_bits=6)
    other.load_state_dict(reloaded(model.state_dict()))
    state = reloaded(quantizer.get_quantized_state())
    assert type(state["tensors"]["0.bias"]["min_bits"]) is int


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite(value):
    """NaN and Inf are refused when they come, with the tensor's name; nothing is changed."""
    model = seeded(_net)
    model[1].bias.data[3] = value
    attach = lambda m: diffq.DiffQuantizer(m, min_size=LIMIT, small_bits=8)  # noqa: E731
    refused(model, WeightError, attach, "1.bias", "NaN or Inf", "exclude")
    diffq.DiffQuantizer(model, min_size=LIMIT, small_bits=8, exclude=["1.bias"])

    model, quantizer = _attached()
    model[1].bias.data[3] = value
    for call in (
        lambda m: m.eval()(torch.ones(2, 16)),
        lambda _: quantizer.get_quantized_state(),
        lambda _: quantizer.true_model_size(),
        lambda _: quantizer.detach(quantized=True),
    ):
        refused(model, WeightError, call, "1.bias", "must be finite", "exclude")


@pytest.mark.parametrize(
    "weight", [torch.full((9,), 3.4e38), torch.full((9,), 1e300, dtype=torch.float64)]
)
def test_numbers_that_are_too_large(weight):
    """Magnitudes whose levels float32 does not hold are refused."""
    words = ("scale of weight", "at most", "exclude")
    refused(
        Holder({"weight": weight}),
        WeightError,
        lambda m: diffq.QATQuantizer(m, min_size=1, small_bits=8),
        *words,
    )


def test_a_model_of_small_tensors_only():
    """The warning says that the method has nothing, and what small_bits has."""
    with pytest.warns(diffq.DiffqWarning) as caught:
        quantizer = diffq.DiffQuantizer(mlp(), small_bits=8)
    message = str(caught[0].message)
    assert "Only small parameters are quantized, at small_bits=8" in message
    assert "there is no other of more than min_size=0.01 MB" in message
    assert "Pass min_size=0" in message
    assert set(quantizer.bits()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert quantizer.mean_bits() == 8


def test_overrides_of_small_tensors():
    """Overrides are the method's, so a pattern that reaches small tensors alone is refused."""
    refused(
        seeded(_net),
        ConfigError,
        lambda m: diffq.DiffQuantizer(
            m, min_size=LIMIT, small_bits=8, overrides={"*.bias": {"bits": 4}}
        ),
        "'*.bias'",
        "stored at small_bits=8",
        "Lower min_size",
    )


def test_memory_in_common():
    """A small tensor that is a part of another cannot have two values."""
    memory = torch.randn(100)
    model = Holder({"whole": nn.Parameter(memory), "part": nn.Parameter(memory[:10])})
    attach = lambda m: diffq.QATQuantizer(m, min_size=1, small_bits=8)  # noqa: E731
    refused(model, AttachError, attach, "whole and part", "exclude=")


def test_tensors_that_no_forward_reads():
    """A small tensor that the model computes with as it is, from a list of its own, is named."""

    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 16)
            self.kept = [self.layer.bias]

        def forward(self, x):
            return x @ self.layer.weight + self.kept[0]

    model, quantizer = _attached(make=Listed)
    model.eval()(torch.ones(2, 16))
    with pytest.warns(diffq.DiffqWarning, match=r"no forward has read layer\.bias there"):
        quantizer.get_quantized_state()

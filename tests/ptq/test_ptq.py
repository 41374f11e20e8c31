"""Post-training quantization of state dicts, at one bitwidth and to a size."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import diffq
from diffq.attach.plan import Rules
from diffq.format.container import decode, encode
from diffq.format.entropy import entropy_bits
from diffq.format.records import MAX_RANGE, GridRecord, RawRecord
from diffq.ptq.budget import GROUP_SIZE, measure, quantize_to_size
from diffq.ptq.state import Settings, StateGrid, find_ties, quantize_state
from tests.models import MODELS, seeded

ALL = Rules(min_size=0)


def weights(numel, scale=1.0, dtype=torch.float32, seed=0):
    """Gaussian weights."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(numel, generator=generator) * scale).to(dtype)


def file_of(snapshot, **options):
    """The bytes of a snapshot's file."""
    return encode(snapshot.records, snapshot.aliases, threads=1, **options)


def squared_error(state, snapshot):
    """Sum over all tensors, from the decoded values."""
    return sum(
        float((torch.from_numpy(record.values()).double() - state[name].double()).square().sum())
        for name, record in snapshot.records.items()
        if isinstance(record, GridRecord)
    )


@st.composite
def states(draw):
    """State dicts of one to three tensors of various scales and dtypes."""
    state = {}
    for number in range(draw(st.integers(1, 3))):
        shape = draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
        scale = 10.0 ** draw(st.integers(-6, 4))
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
        state[f"t{number}"] = weights(math.prod(shape), scale, dtype, number).view(shape)
    return state


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_one_bitwidth_is_what_qat_stores(name, per_channel):
    """quantize_state gives the file, byte for byte, that QATQuantizer of the model gives."""
    model = seeded(MODELS[name][0])
    state = model.state_dict()
    options = {"min_size": 0.0005, "float16": True}
    quantizer = diffq.QATQuantizer(model, bits=5, per_channel=per_channel, **options)
    snapshot = quantize_state(state, 5, Settings(None, per_channel, Rules(**options)))
    assert any(isinstance(record, GridRecord) for record in snapshot.records.values())
    assert file_of(snapshot) == file_of(quantizer.snapshot())


@given(states(), st.integers(1, 15), st.integers(0, 20), st.booleans())
def test_every_weight_is_off_by_at_most_half_a_step(state, bits, group_size, per_channel):
    """A decoded weight is within half a step of the weight, in the tensor's shape and dtype."""
    snapshot = quantize_state(state, bits, Settings(group_size, per_channel, ALL))
    for name, record in snapshot.records.items():
        weight = state[name].float()
        assert (record.shape, f"torch.{record.dtype}") == (weight.shape, str(state[name].dtype))
        low, high = (torch.from_numpy(record.ranges[:, side].copy()) for side in (0, 1))
        step = (high - low) / (2**bits - 1)
        if len(step) > 1:
            step = step.view(-1, *[1] * (weight.ndim - 1))
        largest = weight.abs().max()
        error = (torch.from_numpy(record.values()) - weight).abs()
        assert (error <= step / 2 + 1e-5 * largest).all()


def test_other_tensors_are_kept_to_the_bit():
    """Integers, small floats and running statistics stay raw, whatever their values."""
    state = {
        "steps": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "norm.running_var": torch.tensor([1e-9, float("inf")]).repeat(5000),
        "small": torch.tensor([float("nan"), 1e-30]),
        "large": weights(5000),
    }
    snapshot = quantize_state(state, 4, Settings(rules=Rules(float16=False)))
    kinds = {name: type(record) for name, record in snapshot.records.items()}
    assert kinds == {**dict.fromkeys(state, RawRecord), "large": GridRecord}
    for name in list(state)[:-1]:
        stored = snapshot.records[name].data.tobytes()
        assert stored == state[name].reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.filterwarnings("ignore:Nothing is quantized")
def test_float16_halves_floats_but_not_statistics():
    """float16 stores floats that are not quantized in two bytes, except running statistics."""
    state = {"bias": weights(10), "norm.running_mean": weights(10), "half": weights(10).half()}
    records = quantize_state(state, 4, Settings(rules=Rules(float16=True))).records
    assert [r.stored_dtype for r in records.values()] == ["float16", "float32", "float16"]
    assert [r.dtype for r in records.values()] == ["float32", "float32", "float16"]


@pytest.mark.filterwarnings("ignore:Nothing is quantized")
def test_float16_refuses_what_it_cannot_hold():
    """A finite value that float16 makes infinite is refused by name; an infinite one is kept."""
    with pytest.raises(diffq.WeightError, match=r"70000.*big"):
        quantize_state({"big": torch.tensor([70000.0])}, 4, Settings(rules=Rules(float16=True)))
    quantize_state({"big": torch.tensor([float("inf")])}, 4, Settings(rules=Rules(float16=True)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value):
    """NaN or Inf in a tensor to quantize raises WeightError with its name."""
    state = {"fc.weight": torch.tensor([1.0, value])}
    with pytest.raises(diffq.WeightError, match=r"fc\.weight"):
        quantize_state(state, 4, Settings(rules=ALL))
    with pytest.raises(diffq.WeightError, match=r"fc\.weight"):
        quantize_to_size(state, 10**6, Settings(rules=ALL))


@pytest.mark.parametrize(
    "entry", [3, "x", None, torch.ones(3, 3).to_sparse(), torch.ones(2, device="meta")]
)
def test_entries_that_are_no_dense_tensors_are_refused(entry):
    """A state dict with anything but dense tensors raises ConfigError with the name."""
    with pytest.raises(diffq.ConfigError, match="odd"):
        find_ties({"fine": torch.ones(2), "odd": entry})


def test_ties_are_names_that_show_the_same_memory_alike():
    """Equal views of one memory are tied; other views of it, copies and empty tensors are not."""
    one = weights(12)
    state = {
        "a": one.view(3, 4),
        "b": one.view(3, 4),
        "part": one[:4],
        "transposed": one.view(4, 3).t(),
        "copy": one.clone().view(3, 4),
        "empty": torch.empty(0),
        "empty too": torch.empty(0),
        "c": one.view(3, 4),
    }
    tensors, aliases = find_ties(state)
    assert aliases == {"b": "a", "c": "a"}
    assert list(tensors) == [name for name in state if name not in aliases]


@pytest.mark.filterwarnings("ignore:Nothing is quantized")
def test_a_pattern_can_name_either_of_two_tied_names():
    """Excluding one name of a tied tensor keeps the tensor raw; patterns must match something."""
    one = weights(100)
    state = {"embed": one, "head": one}
    rules = Rules(min_size=0, exclude=["head"])
    assert isinstance(quantize_state(state, 4, Settings(rules=rules)).records["embed"], RawRecord)
    with pytest.raises(diffq.ConfigError, match="haed"):
        quantize_state(state, 4, Settings(rules=Rules(include=["haed"])))


@given(states(), st.integers(0, 20), st.booleans())
def test_measured_errors_are_those_of_the_records(state, group_size, per_channel):
    """measure() gives, per group and bitwidth, the error that decoded records really have."""
    options = Settings(group_size, per_channel, ALL)
    for name, weight in state.items():
        tensor = StateGrid(name, weight, options)
        choice = measure(tensor, "zstd", unit=2.0)
        for bits in range(1, 16):
            record = tensor.record(np.full(tensor.count, bits, np.uint8))
            error = (record.values() - weight.float().numpy()).astype(np.float64).reshape(-1) / 2
            padded = np.zeros(tensor.count * tensor.grid.group_size)
            padded[: error.size] = error**2
            wanted = padded.reshape(tensor.count, tensor.grid.group_size).sum(axis=1)
            np.testing.assert_allclose(choice.errors[:, bits - 1], wanted, rtol=1e-3, atol=1e-30)
            entropy = entropy_bits(np.bincount(record.levels))
            assert choice.rates[bits - 1] * weight.numel() == pytest.approx(entropy, rel=1e-4)
        assert choice.weights.sum() == weight.numel()


@settings(max_examples=30)
@given(
    states(),
    st.floats(0.02, 1.2),
    st.integers(0, 20),
    st.booleans(),
    st.sampled_from(["zstd", "rans", "packed"]),
)
def test_a_file_never_exceeds_its_target(state, share, group_size, per_channel, codec):
    """Any target gives a file of at most that size, or an error with the smallest possible one."""
    options = Settings(group_size, per_channel, ALL)
    most = int(share * len(file_of(quantize_state(state, 15, options), codec=codec)))
    metadata = {"note": "x" * 20}
    try:
        fitted = quantize_to_size(state, most, options, codec, metadata)
    except diffq.ConfigError as error:
        smallest = int(str(error).split(" has ")[1].split()[0])
        assert smallest > most
        fitted = quantize_to_size(state, smallest, options, codec, metadata)
        most = smallest
    data = b"".join(fitted.parts)
    assert len(data) <= most
    records, _, stored = decode(data)
    assert stored == metadata
    for name, record in fitted.snapshot.records.items():
        np.testing.assert_array_equal(records[name].values(), record.values())


@pytest.mark.parametrize("bits", [3, 5, 8])
@pytest.mark.parametrize("group_size", [0, 8, 64])
def test_chosen_bitwidths_beat_one_bitwidth_at_its_size(bits, group_size):
    """Where tensors differ in scale, the search has under half the error of one bitwidth."""
    state = {f"t{n}": weights(6000, 10.0**-n, seed=n) for n in range(4)}
    uniform = quantize_state(state, bits)
    size = len(file_of(uniform))
    fitted = quantize_to_size(state, size, Settings(group_size))
    assert squared_error(state, fitted.snapshot) < 0.5 * squared_error(state, uniform)


def test_the_target_is_nearly_filled():
    """In groups of the default size, at least 98% of the target is used."""
    state = {"weight": weights(50_000), "other": weights(30_000, 0.1, seed=1)}
    for most in (20_000, 33_333, 77_777):
        fitted = quantize_to_size(state, most)
        assert 0.98 * most <= sum(map(len, fitted.parts)) <= most
        record = fitted.snapshot.records["weight"]
        assert record.group_size == GROUP_SIZE


def test_a_large_target_gives_the_finest_grid():
    """With room for everything, all groups get 15 bits."""
    fitted = quantize_to_size({"weight": weights(5000)}, 10**9)
    assert set(fitted.snapshot.records["weight"].bits.tolist()) == {15}


@settings(max_examples=10)
@given(st.integers(3000, 15000), st.integers(100, 3000))
def test_more_room_never_means_more_error(most, more):
    """A larger target does not make the error larger by more than the search's slack."""
    state = {"a": weights(8000), "b": weights(4000, 0.05, seed=1)}
    small, large = (quantize_to_size(state, size).snapshot for size in (most, most + more))
    assert squared_error(state, large) <= 1.02 * squared_error(state, small)


@pytest.mark.parametrize("scale", [1e-36, 1e18, MAX_RANGE / 2.1])
def test_extreme_scales_neither_overflow_nor_vanish(scale):
    """Weights of any magnitude that can be stored are searched as those near 1."""
    weight = ((torch.rand(5000, dtype=torch.float64) * 2 - 1) * scale).float()
    fitted = quantize_to_size({"w": weight}, 4500)
    record = fitted.snapshot.records["w"]
    assert 4400 < sum(map(len, fitted.parts)) <= 4500
    assert np.isfinite(record.values()).all()
    assert 5 <= record.bits.min() <= record.bits.max() <= 8


def test_constants_cost_nothing():
    """A constant tensor is restored exactly, and takes no part in the search."""
    state = {"constant": torch.full((90_000,), 0.3), "weight": weights(5000)}
    fitted = quantize_to_size(state, 4000)
    assert (fitted.snapshot.records["constant"].values() == np.float32(0.3)).all()
    assert sum(map(len, fitted.parts)) <= 4000


@pytest.mark.filterwarnings("ignore:Nothing is quantized")
def test_a_model_without_weights_to_quantize():
    """Where nothing is quantized, the raw file is the only one, and fits or does not."""
    state = {"bias": weights(10)}
    size = len(file_of(quantize_state(state, 8)))
    assert sum(map(len, quantize_to_size(state, size).parts)) == size
    with pytest.raises(diffq.ConfigError, match=f"smallest file has {size} bytes"):
        quantize_to_size(state, size - 1)


def test_nothing_to_quantize_is_a_warning():
    """A state dict without a tensor to quantize warns, with the size of the largest one."""
    with pytest.warns(diffq.DiffqWarning, match=r"Nothing is quantized.*w, takes 0\.0003815 MB"):
        quantize_state({"w": weights(100), "steps": torch.tensor(7)}, 4)


@pytest.mark.parametrize("bits", [0, 16, 2.5, True])
def test_impossible_bitwidths_are_refused(bits):
    """Bitwidths other than whole numbers from 1 to 15 raise ConfigError."""
    with pytest.raises(diffq.ConfigError, match="bits"):
        quantize_state({"w": weights(10)}, bits)


def test_progress_is_reported():
    """The search reports every tensor it measures, and then its files."""
    told = []
    state = {"a": weights(5000), "b": weights(5000, seed=1)}
    quantize_to_size(state, 6000, report=lambda *step: told.append(step))
    assert told[:2] == [("measuring errors", 0, 2), ("measuring errors", 1, 2)]
    assert {what for what, *_ in told[2:]} == {"searching bitwidths"}
    assert all(done < total for _, done, total in told)

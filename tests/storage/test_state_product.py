"""Product-quantized tensors in a state: they come back, and damage is refused by name."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import diffq
from diffq.format.kinds.product import ProductRecord
from diffq.storage.state import Snapshot, from_state, to_state
from tests.format.samples import assert_same, product, product_records
from tests.holder import Holder, all_bits, bits_of, reloaded

RECORDS = {
    "float16": product(15, 6, 2, shape=(6, 5)),
    "uint8": product(15, 6, 2, "uint8", shape=(6, 5)),
    "one": product(15, 1, 2, shape=(6, 5)),
}
CASES = [(kind, packed) for kind in RECORDS for packed in (True, False)]


def sound(kind, packed):
    """A state of one tensor."""
    return to_state(Snapshot({"layer": RECORDS[kind]}, {}), packed)


def assert_refused(state):
    """The state is refused by the tensor's name, and the model stays as it was."""
    model = Holder({"layer": torch.zeros(6, 5)})
    before = all_bits(model)
    with pytest.raises(diffq.StateError, match="layer"):
        diffq.restore_quantized_state(model, state)
    assert all_bits(model) == before


@given(product_records(), st.booleans())
def test_records_come_back(record, packed):
    """Codebook, indices, scale and zero point come back in every bit, through torch.save."""
    state = reloaded(to_state(Snapshot({"w": record}, {}), packed))
    assert_same(from_state(state).records["w"], record)


@pytest.mark.parametrize("codewords", [40_000, 65_536])
@pytest.mark.parametrize("packed", [True, False])
def test_indices_of_16_bits_come_back(codewords, packed):
    """The longest indices come back, packed in two bytes each."""
    record = product(codewords, codewords, 1)
    state = to_state(Snapshot({"w": record}, {}), packed)
    assert_same(from_state(state).records["w"], record)
    assert state["tensors"]["w"]["indices"].nbytes == codewords * (2 if packed else 4)


@pytest.mark.parametrize(("kind", "packed"), CASES)
def test_restored_weights(kind, packed):
    """A model is filled with what the record decodes to."""
    model = Holder({"layer": torch.zeros(6, 5)})
    diffq.restore_quantized_state(model, sound(kind, packed))
    assert bits_of(model.layer) == bits_of(torch.from_numpy(RECORDS[kind].values()))


def test_packed_state_takes_equation_5():
    """The tensors of a packed state take the bits that the record counts, to whole bytes."""
    entry = sound("uint8", True)["tensors"]["layer"]
    size = entry["codebook"].nbytes + entry["indices"].nbytes + entry["scale"].nbytes
    assert 8 * size >= RECORDS["uint8"].stored_bits() - 8 > 8 * (size - 3)


@pytest.mark.parametrize(("kind", "packed"), CASES)
def test_each_part_is_needed(kind, packed):
    """An entry that lacks any of its parts is refused by name."""
    for key in sound(kind, packed)["tensors"]["layer"]:
        state = sound(kind, packed)
        del state["tensors"]["layer"][key]
        assert_refused(state)


@pytest.mark.parametrize(("kind", "packed"), CASES)
def test_each_part_has_its_type_and_size(kind, packed):
    """A part of another type, dtype, length or layout is refused by name."""
    others = [None, "text", b"bytes", 1.5, [], {}, object(), True, torch.ones(2, 2) > 0]
    for key, value in sound(kind, packed)["tensors"]["layer"].items():
        wrong = [other for other in others if type(other) is not type(value)]
        if isinstance(value, torch.Tensor):
            flat = value.reshape(-1)
            wrong += [others[-1], value.double(), value.to("meta"), value[None], value[..., None]]
            if value.numel():
                wrong += [torch.cat([flat, flat]), flat[:1].expand(2**45), value.to_sparse()]
        for other in wrong:
            state = sound(kind, packed)
            state["tensors"]["layer"][key] = other
            assert_refused(state)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "int32"},
        {"shape": [6, 6]},
        {"shape": [2**40, 2**20]},
        {"shape": [0, 5]},
        {"codebook": torch.zeros(0, 2)},
        {"codebook": torch.zeros(6, 0)},
        {"codebook": torch.zeros(16, 2)},
        {"codebook": torch.zeros(6, 4)},
        {"codebook": torch.full((6, 2), torch.nan)},
        {"codebook": torch.zeros(2, 6).T},
        {"scale": torch.tensor([torch.inf])},
        {"scale": torch.tensor([-1.0])},
        {"scale": torch.tensor([1.0, 1.0])},
        {"zero": -1},
        {"zero": 256},
        {"zero": 10**30},
        {"kind": "grid"},
    ],
)
def test_damaged_codebooks_are_refused(change, packed):
    """Numbers out of range and parts that contradict each other are refused by name."""
    state = sound("uint8", packed)
    state["tensors"]["layer"].update(change)
    assert_refused(state)


@pytest.mark.parametrize(("packed", "index"), [(True, 255), (False, 6), (False, -1)])
def test_indices_that_name_no_codeword_are_refused(packed, index):
    """An index at or above the number of codewords, or below 0, is refused by name."""
    state = sound("float16", packed)
    state["tensors"]["layer"]["indices"][2] = index
    assert_refused(state)


@given(st.sampled_from(CASES), st.data())
def test_flipped_bytes_give_finite_weights_or_an_error(case, data):
    """Whatever bytes change in a tensor of the state, weights are finite or it is refused."""
    state = copy.deepcopy(sound(*case))
    entry = state["tensors"]["layer"]
    key = data.draw(st.sampled_from(sorted(k for k in entry if isinstance(entry[k], torch.Tensor))))
    raw = entry[key].reshape(-1).view(torch.uint8)
    for _ in range(data.draw(st.integers(1, 4)) if raw.numel() else 0):
        raw[data.draw(st.integers(0, raw.numel() - 1))] = data.draw(st.integers(0, 255))
    try:
        record = from_state(state).records["layer"]
    except diffq.DiffqError:
        return
    assert isinstance(record, ProductRecord)
    assert np.isfinite(record.values()).all()

"""Stepped tensors in a state and in a model: they come back, and damage is refused by name."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import diffq
from diffq.format.container import encode
from diffq.storage.state import Snapshot, from_state, to_state
from tests.format.samples import assert_same, stepped, stepped_model, stepped_records
from tests.holder import Holder, all_bits, bits_of, reloaded

RECORDS = {name: record for name, record in stepped_model().items() if name != "norm.weight"}


@given(stepped_records(), st.booleans())
def test_records_come_back(record, packed):
    """Levels, bitwidths and steps come back in every bit, through torch.save."""
    state = reloaded(to_state(Snapshot({"w": record}, {}), packed))
    assert_same(from_state(state).records["w"], record)


@pytest.mark.parametrize("name", RECORDS)
def test_files_and_states_fill_models(name, tmp_path):
    """A model is filled with what the record decodes to, from a file and from a state."""
    record = RECORDS[name]
    wanted = torch.from_numpy(record.values()).to(getattr(torch, record.dtype))
    blank = torch.zeros(record.shape, dtype=wanted.dtype)
    from_file, restored = Holder({"w": blank.clone()}), Holder({"w": blank.clone()})
    path = tmp_path / "model.diffq"
    path.write_bytes(encode({"w": record}))
    diffq.load(path, from_file)
    diffq.restore_quantized_state(restored, to_state(Snapshot({"w": record}, {}), True))
    assert bits_of(from_file.w) == bits_of(restored.w) == bits_of(wanted)
    assert bits_of(diffq.load(path)["w"]) == bits_of(wanted)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    "steps",
    [
        None,
        torch.zeros(5, dtype=torch.int32),
        torch.zeros(5),
        torch.zeros(4, dtype=torch.int16),
        torch.zeros((5, 1), dtype=torch.int16),
        torch.full((5,), -505, dtype=torch.int16),
        torch.full((5,), 32767, dtype=torch.int16),
        torch.zeros(1, dtype=torch.int16).expand(5),
    ],
)
def test_wrong_steps_are_refused(steps, packed):
    """Steps that are missing, of another dtype or shape, or out of range leave the model alone."""
    model = Holder({"layer": torch.zeros(6, 5)})
    state = copy.deepcopy(to_state(Snapshot({"layer": stepped((6, 5), 7)}, {}), packed))
    state["tensors"]["layer"]["steps"] = steps
    before = all_bits(model)
    with pytest.raises(diffq.StateError, match="layer"):
        diffq.restore_quantized_state(model, state)
    assert all_bits(model) == before

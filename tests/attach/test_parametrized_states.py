"""Checkpoints with the names that torch's parametrizations give: they load as they were saved.

`golden/parametrized.pt` holds, for each case, the state dict of a `TiedModules` that trained three
steps under a quantizer that was a parametrization, and the values that it stored.
"""

from pathlib import Path

import pytest
import torch
from torch import nn

import diffq
from tests.compare import same_bits
from tests.models import TiedModules, attached, seeded, snapshot_of, step, tokens
from tests.readers import computes_with_what_is_stored, stored

GOLDEN = Path(__file__).parent / "golden" / "parametrized.pt"
CASES = ["diffq", "diffq-frozen", "diffq-fixed", "qat", "lsq", "product"]


def _case(case):
    found = torch.load(GOLDEN, weights_only=True)[case]
    return found["state"], found["values"]


def _attached(case, seed=5):
    return attached(lambda: seeded(TiedModules, seed), case.removesuffix("-frozen"))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_loads_strictly(case, assign):
    """Every entry is used, and the model stores the values that the checkpoint's did."""
    state, values = _case(case)
    model, quantizer = _attached(case)
    keys = model.load_state_dict(state, assign=assign)
    assert (keys.missing_keys, keys.unexpected_keys) == ([], [])
    found = stored(TiedModules, quantizer)
    assert all(same_bits(found[name].detach(), value) for name, value in values.items())
    assert same_bits(model.embed.weight.detach(), state["embed.parametrizations.weight.original"])
    assert model.head.weight.data_ptr() == model.embed.weight.data_ptr()
    assert computes_with_what_is_stored(TiedModules, model.eval(), quantizer)


@pytest.mark.parametrize("case", CASES)
def test_trains_on(case):
    """After loading, weights move; frozen bits stay."""
    state, _ = _case(case)
    model, quantizer = _attached(case)
    model.load_state_dict(state)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    quantizer.setup_optimizer(optimizer, lr=1.0)
    before, bits = snapshot_of(model), quantizer.bits()
    step(model, optimizer, tokens(), quantizer)
    assert not same_bits(snapshot_of(model), before)
    if case == "diffq-frozen":
        assert same_bits(quantizer.bits(), bits)


def test_the_checkpoint_is_not_changed():
    """Loading leaves the names and values of the dict as they are."""
    state, _ = _case("diffq")
    names, values = list(state), {name: value.clone() for name, value in state.items()}
    model, _ = _attached("diffq")
    model.load_state_dict(state)
    assert list(state) == names
    assert same_bits(state, values)


def test_under_a_prefix():
    """A checkpoint of a model around the attached one loads under its names."""
    state, values = _case("diffq")
    model, quantizer = _attached("diffq")
    whole = nn.Sequential(nn.Identity(), model)
    keys = whole.load_state_dict({f"1.{name}": value for name, value in state.items()})
    assert (keys.missing_keys, keys.unexpected_keys) == ([], [])
    found = stored(TiedModules, quantizer)
    assert all(same_bits(found[name].detach(), value) for name, value in values.items())


def test_other_groups_are_refused():
    """Where groups differ, the error names a tensor, and nothing has changed."""
    state, _ = _case("diffq")
    model, _ = attached(lambda: seeded(TiedModules, 5), "diffq", group_size=8)
    before = snapshot_of(model)
    with pytest.raises(diffq.MismatchError, match=r"embed\.weight"):
        model.load_state_dict(state)
    assert same_bits(snapshot_of(model), before)


def test_other_tensors_are_refused():
    """Where another tensor is quantized, the error names it."""
    state, _ = _case("diffq")
    model, _ = attached(lambda: seeded(TiedModules, 5), "diffq", exclude=["body.bias"])
    with pytest.raises((diffq.MismatchError, RuntimeError), match=r"body\..*bias"):
        model.load_state_dict(state)

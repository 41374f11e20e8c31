"""State dicts, of plain and of attached models, loaded into attached ones."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import diffq
from tests.compare import same_bits
from tests.models import (
    MODELS,
    QUANTIZERS,
    TiedModules,
    after_steps,
    evaluate_alike,
    mlp,
    restored,
    seeded,
    snapshot_of,
    step,
)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("assign", [False, True])
def test_plain_checkpoint_into_attached_model(name, assign):
    """A checkpoint of the plain model loads strictly into an attached one."""
    make, make_input = MODELS[name]
    checkpoint, inputs = snapshot_of(seeded(make, 1)), make_input()
    model = seeded(make, 2)
    quantizer = QUANTIZERS["diffq"](model)
    keys = model.load_state_dict(copy.deepcopy(checkpoint), assign=assign)
    assert (keys.missing_keys, keys.unexpected_keys) == ([], [])
    assert evaluate_alike(model, restored(make, quantizer), inputs)
    quantizer.detach()
    assert same_bits(snapshot_of(model), checkpoint)


@pytest.mark.parametrize("kind", ["diffq", "qat", "lsq"])
@pytest.mark.parametrize("name", ["mlp", "tied-modules", "shared-module", "two-names", "lstm"])
@pytest.mark.parametrize("assign", [False, True])
def test_attached_checkpoint_into_attached_model(name, kind, assign):
    """A checkpoint of an attached model loads strictly into another attached one."""
    make, _ = MODELS[name]
    trained, first, inputs = after_steps(name, kind)
    model = seeded(make, 2)
    second = QUANTIZERS[kind](model)
    keys = model.load_state_dict(copy.deepcopy(trained.state_dict()), assign=assign)
    assert (keys.missing_keys, keys.unexpected_keys) == ([], [])
    assert same_bits(snapshot_of(model), snapshot_of(trained))
    assert second.true_model_size() == first.true_model_size()
    assert evaluate_alike(model, trained, inputs)


@pytest.mark.parametrize("name", ["mlp", "tied-modules", "two-names", "lstm"])
def test_training_after_assign(name):
    """After load_state_dict(assign=True) the new tensors, and what is learned, are trained."""
    make, make_input = MODELS[name]
    trained, _, _ = after_steps(name)
    model, inputs = seeded(make, 2), make_input()
    quantizer = QUANTIZERS["diffq"](model)
    model.load_state_dict(copy.deepcopy(trained.state_dict()), assign=True)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    quantizer.setup_optimizer(optimizer, lr=0.1)
    before = snapshot_of(model)
    step(model, optimizer, inputs, quantizer)
    after = snapshot_of(model)
    changed = [key for key in before if not same_bits(before[key], after[key])]
    assert changed == [key for key in before if not key.endswith("_extra_state")]
    assert evaluate_alike(model, restored(make, quantizer), inputs)


def test_checkpoint_is_not_changed_by_loading():
    """Loading a plain checkpoint into an attached model leaves the dict as it was."""
    checkpoint = mlp().state_dict()
    before = dict(checkpoint)
    model = mlp()
    diffq.DiffQuantizer(model, min_size=0)
    model.load_state_dict(checkpoint)
    assert list(checkpoint) == list(before)
    assert all(checkpoint[name] is before[name] for name in before)


def test_plain_checkpoint_keeps_what_is_learned():
    """A plain checkpoint replaces the weights and leaves the bitwidths as they are."""
    model, quantizer, _ = after_steps(steps=5)
    bits = quantizer.bits()
    model.load_state_dict(seeded(mlp, 9).state_dict())
    assert all(same_bits(bits[name], widths) for name, widths in quantizer.bits().items())


def test_strict_loading_still_checks():
    """A checkpoint with missing, unknown or misshapen entries is refused as in a plain model."""
    model = mlp()
    diffq.DiffQuantizer(model, min_size=0)
    plain = mlp().state_dict()
    missing = {key: value for key, value in plain.items() if key != "0.weight"}
    for bad, message in (
        (missing, "0.*weight"),
        ({**plain, "other": torch.zeros(1)}, "other"),
        ({**plain, "0.weight": torch.zeros(1, 2)}, "size mismatch"),
    ):
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict(bad)


def test_untied_tensors_are_refused():
    """Where a tie was broken behind the quantizer's back, the error names both tensors."""
    model = TiedModules()
    quantizer = diffq.DiffQuantizer(model, min_size=0)
    model.head.weight = nn.Parameter(model.head.weight.detach().clone() + 1)
    with pytest.raises(diffq.AttachError, match=r"embed\.weight and head\.weight"):
        quantizer.get_quantized_state()


def test_foreign_parametrization_on_top_is_refused():
    """A parametrization that others put over the quantizer's gives an error with the name."""
    model = mlp()
    quantizer = diffq.DiffQuantizer(model, min_size=0)
    parametrizations.weight_norm(model[0])
    with pytest.raises(diffq.AttachError, match=r"0\.weight.*detach"):
        quantizer.get_quantized_state()

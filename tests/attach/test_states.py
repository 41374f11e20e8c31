"""State dicts of attached models: plain names and values, then what the quantizer adds."""

import copy

import pytest
import torch
from torch import nn

import diffq
from tests.compare import same_bits
from tests.holder import reloaded
from tests.models import (
    MODELS,
    QUANTIZERS,
    TiedModules,
    after_steps,
    attached,
    mlp,
    pairs,
    seeded,
    snapshot_of,
    step,
    tokens,
)
from tests.readers import (
    ADDED,
    LEARNED,
    SETTINGS,
    computes_with_what_is_stored,
    learned_in,
    reads_parameters,
    x16,
)


@pytest.mark.parametrize(("kind", "name"), pairs(QUANTIZERS, MODELS))
def test_entries(kind, name):
    """Plain names come first, in their order, with the parameters' own memory."""
    make, _ = MODELS[name]
    model = seeded(make)
    plain, buffers = dict(model.state_dict()), [n for n, _ in model.named_buffers()]
    QUANTIZERS[kind](model)
    state = model.state_dict()
    assert list(state)[: len(plain)] == list(plain)
    assert all(state[n].data_ptr() == value.data_ptr() for n, value in plain.items())
    added = list(state)[len(plain) :]
    assert SETTINGS in added
    assert all(name.startswith(ADDED) for name in added)
    assert [n for n, _ in model.named_buffers()] == buffers


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_entries_keep_their_shapes(kind):
    """Training, freezing and stages change no entry's name, shape or dtype, nor the settings."""
    model, optimizer = seeded(mlp), None
    quantizer = QUANTIZERS[kind](model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    quantizer.setup_optimizer(optimizer)

    def forms():
        state = model.state_dict()
        return [(n, v.shape, v.dtype) for n, v in state.items()]

    before = forms()
    step(model, optimizer, x16(), quantizer)
    model.eval()(x16())
    assert forms() == before
    if kind == "product":
        quantizer.quantize_stage()
    elif hasattr(quantizer, "freeze_bits") and LEARNED in model.state_dict():
        quantizer.freeze_bits()
    model.train()
    step(model, optimizer, x16(), quantizer)
    assert forms() == before


def test_settings_are_a_copy():
    """Writing to the entry of the settings changes nothing in the model."""
    model, _ = attached(mlp)
    before = snapshot_of(model)
    model.state_dict()[SETTINGS].zero_()
    assert same_bits(snapshot_of(model), before)


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("assign", [False, True])
def test_frozen_and_trained_states_load(kind, assign):
    """A state saved at any stage gives another attached model the same weights and bits."""
    model, quantizer, _ = after_steps(quantizer=kind)
    states = [reloaded(model.state_dict())]
    sizes = [quantizer.true_model_size()]
    if kind in ("diffq", "diffq-rounding"):
        quantizer.freeze_bits()
        with torch.no_grad():
            learned_in(model).add_(3)  # what momentum makes of frozen bits
        states.append(reloaded(model.state_dict()))
        sizes.append(quantizer.true_model_size())
    for state, size in zip(states, sizes, strict=True):
        other, own = attached(lambda: seeded(mlp, 5), kind)
        keys = other.load_state_dict(copy.deepcopy(state), assign=assign)
        assert (keys.missing_keys, keys.unexpected_keys) == ([], [])
        assert own.true_model_size() == size
        assert same_bits(snapshot_of(other), dict(state))
        assert reads_parameters(other)
        other.eval()
        assert computes_with_what_is_stored(mlp, other, own)
    assert same_bits(own.get_quantized_state(), quantizer.get_quantized_state())


def test_into_a_plain_model():
    """A plain model takes an attached one's weights, and names the entries that are added."""
    model, _, _ = after_steps("tied-modules")
    plain = seeded(TiedModules, 5)
    with pytest.raises(RuntimeError, match=LEARNED):
        plain.load_state_dict(model.state_dict())
    keys = plain.load_state_dict(model.state_dict(), strict=False)
    assert keys.missing_keys == []
    assert set(keys.unexpected_keys) == {LEARNED, SETTINGS}
    wanted = {n: p.detach() for n, p in model.named_parameters() if n != LEARNED}
    assert same_bits({n: p.detach() for n, p in plain.named_parameters()}, wanted)


OTHER = {
    "group_size": (diffq.DiffQuantizer, {"group_size": 4}, {"group_size": 8}),
    "min_bits": (diffq.DiffQuantizer, {}, {"min_bits": 3}),
    "max_bits": (diffq.DiffQuantizer, {}, {"max_bits": 8, "init_bits": 4}),
    "bits": (diffq.QATQuantizer, {"bits": 4}, {"bits": 5}),
    "per_channel": (diffq.QATQuantizer, {}, {"per_channel": True}),
    "bits of LSQ": (diffq.LSQQuantizer, {"bits": 4}, {"bits": 5}),
    "bits of DiffQ": (diffq.DiffQuantizer, {"bits": 4}, {"bits": 5}),
    "block_size": (
        diffq.ProductQuantizer,
        {"block_size": 2, "codebook_size": 4},
        {"block_size": 4, "codebook_size": 4},
    ),
    "codebook_size": (diffq.ProductQuantizer, {"codebook_size": 4}, {"codebook_size": 8}),
    "override": (diffq.QATQuantizer, {"bits": 4}, {"bits": 4, "overrides": {"2.*": {"bits": 6}}}),
    "tensors": (diffq.DiffQuantizer, {}, {"exclude": ["2.weight"]}),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("setting", OTHER)
def test_states_of_other_settings_are_refused(setting, strict):
    """Both ways, strict or not, the error names the setting or the tensor; nothing has changed."""
    cls, *options = OTHER[setting]
    word = {"tensors": r"2\.weight", "override": "bits|2"}.get(setting, setting.split()[0])
    for one, two in (options, options[::-1]):
        source, target = seeded(mlp), seeded(mlp, 5)
        cls(source, min_size=0, **one)
        quantizer = cls(target, min_size=0, **two)
        before, size = snapshot_of(target), quantizer.true_model_size()
        with pytest.raises(diffq.MismatchError, match=word):
            target.load_state_dict(source.state_dict(), strict=strict)
        assert same_bits(snapshot_of(target), before)
        assert quantizer.true_model_size() == size


@pytest.mark.parametrize("kinds", [("diffq", "qat"), ("qat", "lsq"), ("product", "diffq")])
def test_states_of_other_quantizers_are_refused(kinds):
    """A state of another kind of quantizer is an error that changes nothing."""
    for one, two in (kinds, kinds[::-1]):
        source, _ = attached(mlp, one)
        target, _ = attached(lambda: seeded(mlp, 5), two)
        before = snapshot_of(target)
        with pytest.raises(diffq.MismatchError):
            target.load_state_dict(source.state_dict())
        assert same_bits(snapshot_of(target), before)


def test_settings_that_are_damaged_are_refused():
    """Settings that no quantizer has written are a clear error, whatever they hold."""
    model, _ = attached(mlp)
    state = model.state_dict()
    length = len(state[SETTINGS])
    for damaged in (torch.zeros(length), torch.full((length,), 255), torch.arange(3)):
        state[SETTINGS] = damaged.to(state[SETTINGS].dtype)
        before = snapshot_of(model)
        with pytest.raises(diffq.DiffqError, match=r"settings|_extra_state"):
            model.load_state_dict(state)
        assert same_bits(snapshot_of(model), before)


def test_parts_and_wholes():
    """A model with an attached part saves and loads under the part's prefix."""

    def make():
        return nn.ModuleDict({"a": mlp(), "b": nn.Linear(8, 4)})

    source, target, plain = seeded(make, 1), seeded(make, 2), seeded(make, 3)
    quantizers = [diffq.DiffQuantizer(m["a"], min_size=0) for m in (source, target)]
    with torch.no_grad():
        learned_in(source["a"]).normal_()
    added = [f"a.{LEARNED}", f"a.{SETTINGS}"]
    assert [n for n in source.state_dict() if "diffq" in n] == added
    target.load_state_dict(source.state_dict())
    assert same_bits(snapshot_of(target), snapshot_of(source))
    bits = quantizers[1].bits()
    assert same_bits(bits, quantizers[0].bits())
    target.load_state_dict(plain.state_dict())
    assert same_bits(quantizers[1].bits(), bits)
    assert same_bits(target["a"][0].weight.detach(), plain["a"][0].weight.detach())
    target["a"].load_state_dict(source["a"].state_dict())
    assert same_bits(snapshot_of(target["a"]), snapshot_of(source["a"]))


def test_a_partial_load_keeps_the_rest():
    """Entries of a part, loaded with strict=False, leave bits and other weights alone."""
    model, quantizer, _ = after_steps()
    before, bits = snapshot_of(model), quantizer.bits()
    keys = model.load_state_dict({"0.weight": torch.zeros(32, 16)}, strict=False)
    assert keys.unexpected_keys == []
    assert "0.weight" not in keys.missing_keys
    assert not model[0].weight.any()
    assert same_bits(quantizer.bits(), bits)
    assert same_bits(model[2].weight.detach(), before["2.weight"])


def test_a_model_on_meta():
    """A model attached on meta gets weights and bits by load_state_dict(assign=True)."""
    source, quantizer, _ = after_steps("tied-modules")
    with torch.device("meta"):
        target = TiedModules()
    own = diffq.DiffQuantizer(target, min_size=0, group_size=4)
    own.no_optimizer()
    target.load_state_dict(copy.deepcopy(source.state_dict()), assign=True)
    assert same_bits(own.get_quantized_state(), quantizer.get_quantized_state())
    target(tokens()).sum().backward()


def test_parameters_that_are_swapped():
    """Where torch swaps parameters in place of assigning them, loads and casts work too."""
    source, _, _ = after_steps()
    model, quantizer = attached(mlp)
    model.eval()
    with torch.no_grad():
        model(x16())
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.load_state_dict(source.state_dict())
        assert computes_with_what_is_stored(mlp, model, quantizer)
        model.double()
        assert model(x16().double()).dtype == torch.float64
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)

"""safetensors: files of attached and of plain models, both ways."""

import pytest

import diffq
from tests.compare import same_bits
from tests.integrations.tiny import (
    EXTRAS,
    KINDS,
    evaluates_as_shipped,
    extras,
    library,
    perturb,
    prepared,
    same_weights,
    weights,
)
from tests.models import QUANTIZERS, ConvNet, TiedModules, seeded, snapshot_of, tokens

library("safetensors")
from safetensors.torch import load_file, load_model, save_file, save_model  # noqa: E402


@pytest.mark.parametrize("kind", KINDS)
def test_attached_to_attached(kind, tmp_path):
    """`load_model` is strict, and an attached model then equals the saved one, extras too."""
    model, _ = prepared(TiedModules, kind)
    perturb(model)
    save_model(model, tmp_path / "model.safetensors")
    other, quantizer = prepared(TiedModules, kind, seed=1)
    assert evaluates_as_shipped(other, TiedModules, tokens())  # there is a cache to forget
    missing, unexpected = load_model(other, tmp_path / "model.safetensors")
    assert not missing
    assert not unexpected
    assert same_bits(snapshot_of(other), snapshot_of(model))
    assert same_bits(quantizer.bits(), diffq.quantizer_of(model).bits())
    assert other.head.weight is other.embed.weight
    assert evaluates_as_shipped(other, TiedModules, tokens())


@pytest.mark.parametrize("kind", KINDS)
def test_attached_to_plain(kind, tmp_path):
    """The file of an attached model holds the float weights under their plain names."""
    model, _ = prepared(TiedModules, kind)
    save_model(model, tmp_path / "model.safetensors")
    plain = seeded(TiedModules, 1)
    missing, unexpected = load_model(plain, tmp_path / "model.safetensors", strict=False)
    assert not missing
    assert set(unexpected) <= EXTRAS
    assert same_weights(plain, model)
    assert plain.head.weight is plain.embed.weight


@pytest.mark.parametrize("kind", KINDS)
def test_plain_to_attached(kind, tmp_path):
    """`load_model` of a plain file is strict; what is learned stays as it is."""
    plain = seeded(TiedModules, 1)
    save_model(plain, tmp_path / "model.safetensors")
    model, _ = prepared(TiedModules, kind)
    before = extras(model)
    assert evaluates_as_shipped(model, TiedModules, tokens())
    missing, unexpected = load_model(model, tmp_path / "model.safetensors")
    assert not missing
    assert not unexpected
    assert same_weights(model, plain)
    assert same_bits(extras(model), before)
    assert evaluates_as_shipped(model, TiedModules, tokens())


@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts(kind, tmp_path):
    """`save_file` takes the state dict of an attached model, and of a plain one for it."""
    model, _ = prepared(ConvNet, kind)
    perturb(model)
    save_file(model.state_dict(), tmp_path / "attached.safetensors")
    plain = seeded(ConvNet, 1)
    found = plain.load_state_dict(load_file(tmp_path / "attached.safetensors"), strict=False)
    assert found.missing_keys == []
    assert set(found.unexpected_keys) <= EXTRAS
    assert same_weights(plain, model)
    other, _ = prepared(ConvNet, kind, seed=2)
    other.load_state_dict(load_file(tmp_path / "attached.safetensors"))
    assert same_bits(snapshot_of(other), snapshot_of(model))
    save_file(seeded(ConvNet, 3).state_dict(), tmp_path / "plain.safetensors")
    other.load_state_dict(load_file(tmp_path / "plain.safetensors"))
    assert same_weights(other, seeded(ConvNet, 3))
    assert same_bits(extras(other), extras(model))


def test_names_in_the_file(tmp_path):
    """A file has the names of the plain model, each with its own shape, and the two extras."""
    model = seeded(ConvNet)
    plain = weights(model)
    QUANTIZERS["diffq"](model)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    state = load_file(tmp_path / "model.safetensors")
    assert set(state) == plain.keys() | EXTRAS - {"_diffq.kept", "_diffq.schedule"}
    assert same_bits({name: state[name] for name in plain}, plain)


def test_decoded_file(tmp_path):
    """What `diffq.load` decodes of an untied model goes through `save_file` bit for bit."""
    _, quantizer = prepared(ConvNet)
    diffq.save(quantizer, tmp_path / "model.diffq")
    state = diffq.load(tmp_path / "model.diffq")
    save_file(state, tmp_path / "model.safetensors")
    decoded = load_file(tmp_path / "model.safetensors")
    assert same_bits({name: decoded[name] for name in state}, dict(state))

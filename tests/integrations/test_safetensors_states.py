"""Quantized states in safetensors files: there and back, and files that hold none."""

import pytest
import torch

import diffq
from tests.compare import same_bits
from tests.integrations.tiny import KINDS, library, perturb, prepared, same_weights, shipped
from tests.models import ConvNet, TiedModules

library("safetensors")
from safetensors.torch import save_file  # noqa: E402

from diffq.integrations.safetensors import load_state, save_state  # noqa: E402


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("make", [TiedModules, ConvNet])
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind, make, packed, tmp_path):
    """The state is the same, and gives a plain model the values of the file."""
    model, quantizer = prepared(make, kind)
    perturb(model)
    state = quantizer.get_quantized_state(packed)
    save_state(state, tmp_path / "state.safetensors")
    loaded = load_state(tmp_path / "state.safetensors")
    assert loaded.keys() == state.keys()
    assert loaded["aliases"] == state["aliases"]
    assert loaded["tensors"].keys() == state["tensors"].keys()
    for name, entry in state["tensors"].items():
        other = loaded["tensors"][name]
        assert entry.keys() == other.keys()
        tensors = [key for key, each in entry.items() if isinstance(each, torch.Tensor)]
        assert all(same_bits(entry[key], other[key]) for key in tensors)
        assert all(entry[key] == other[key] for key in entry.keys() - set(tensors))
    restored = diffq.restore_quantized_state(make(), loaded)
    assert same_weights(restored, shipped(quantizer, make()))


def test_names_with_slashes(tmp_path):
    """A slash in the name of a tensor is no end of it."""
    model = torch.nn.ParameterDict({"a/b": torch.randn(16, 16), "a": torch.randn(4)})
    quantizer = diffq.QATQuantizer(model, min_size=0)
    save_state(quantizer.get_quantized_state(), tmp_path / "state.safetensors")
    fresh = torch.nn.ParameterDict({"a/b": torch.zeros(16, 16), "a": torch.zeros(4)})
    diffq.restore_quantized_state(fresh, load_state(tmp_path / "state.safetensors"))
    assert same_weights(fresh, quantizer.detach(quantized=True))


@pytest.mark.parametrize(
    "metadata", [None, {"format": "pt"}, {"diffq.state": "{"}, {"diffq.state": "[]"}]
)
def test_files_without_a_state(metadata, tmp_path):
    """A file of float weights, or with damaged metadata, is a StateError."""
    save_file({"a.weight": torch.zeros(4)}, tmp_path / "file.safetensors", metadata)
    with pytest.raises(diffq.StateError, match="must be a file of save_state"):
        load_state(tmp_path / "file.safetensors")


def test_damaged_file(tmp_path):
    """A file that is cut is a StateError, and so is what is no state at all."""
    _, quantizer = prepared(ConvNet)
    path = tmp_path / "state.safetensors"
    save_state(quantizer.get_quantized_state(), path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(diffq.StateError, match="sound and whole"):
        load_state(path)
    with pytest.raises(diffq.StateError, match="get_quantized_state"):
        save_state({"a": torch.zeros(1)}, path)
    with pytest.raises(FileNotFoundError):
        load_state(tmp_path / "none.safetensors")

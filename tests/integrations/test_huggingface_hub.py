"""huggingface_hub: models that save and load themselves by its mixin, in a local folder."""

import json

import pytest

from tests.compare import same_bits
from tests.integrations.tiny import (
    KINDS,
    evaluates_as_shipped,
    library,
    perturb,
    prepared,
    same_weights,
)
from tests.models import TiedModules, seeded, snapshot_of, tokens

library("huggingface_hub")
library("safetensors")
from huggingface_hub import PyTorchModelHubMixin  # noqa: E402
from safetensors.torch import load_model  # noqa: E402


class OnHub(TiedModules, PyTorchModelHubMixin, tags=["tiny"]):
    """A tied model with a setting that the mixin writes to the config."""

    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.scale = scale

    def forward(self, tokens):
        return self.scale * super().forward(tokens)


def doubled():
    """A model with another setting than the default."""
    return OnHub(scale=2.0)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_attached_and_loaded_plain(kind, tmp_path):
    """`from_pretrained` of what an attached model saved gives the plain float weights."""
    model, _ = prepared(doubled, kind)
    perturb(model)
    model.save_pretrained(tmp_path)
    plain = OnHub.from_pretrained(tmp_path)
    assert type(plain) is OnHub
    assert plain.scale == 2.0
    assert same_weights(plain, model)
    assert json.loads((tmp_path / "config.json").read_text()) == {"scale": 2.0}


def test_loaded_into_an_attached_model(tmp_path):
    """The folder's file gives an attached model its weights and its learned parameters back."""
    model, _ = prepared(doubled)
    perturb(model)
    model.save_pretrained(tmp_path)
    other, _ = prepared(doubled, seed=1)
    load_model(other, tmp_path / "model.safetensors")
    assert same_bits(snapshot_of(other), snapshot_of(model))
    assert evaluates_as_shipped(other, doubled, tokens())


def test_finetuned_from_the_hub(tmp_path):
    """A model from a folder is attached, and computes with the quantized loaded weights."""
    seeded(doubled).save_pretrained(tmp_path)
    model, _ = prepared(lambda: OnHub.from_pretrained(tmp_path), seed=1)
    assert same_weights(model, seeded(doubled))
    assert evaluates_as_shipped(model, doubled, tokens())

"""docs/files.md: its code runs as written."""

import io
import re
from pathlib import Path

import pytest

import diffq
from tests.holder import all_bits, bits_of
from tests.models import TiedModules

PAGE = (Path(__file__).parent.parent / "docs" / "files.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def _block(word):
    (block,) = [block for block in BLOCKS if word in block]
    return block


@pytest.fixture
def quantizer(tmp_path, monkeypatch):
    """A quantizer of a model with a tie, saved to model.diffq in the working directory."""
    monkeypatch.chdir(tmp_path)
    quantizer = diffq.QATQuantizer(TiedModules(), min_size=0)
    diffq.save(quantizer, "model.diffq")
    return quantizer


def test_safetensors(quantizer):
    """Both ways to safetensors keep every value of a model with a tie."""
    safetensors = pytest.importorskip("safetensors")
    torch_part = pytest.importorskip("safetensors.torch")
    exec(
        _block("save_model"),
        {"diffq": diffq, "safetensors": safetensors, "make_model": TiedModules},
    )
    expected = diffq.load("model.diffq")
    model = TiedModules()
    torch_part.load_model(model, "tied_once.safetensors")
    assert all_bits(model) == all_bits(diffq.load("model.diffq", TiedModules()))
    copies = torch_part.load_file("copies.safetensors")
    assert {n: bits_of(t) for n, t in copies.items()} == {
        n: bits_of(t) for n, t in expected.items()
    }


def test_files_in_memory(quantizer):
    """A model goes through a buffer to a plain model."""
    names = {"diffq": diffq, "io": io, "quantizer": quantizer, "make_model": TiedModules}
    exec(_block("BytesIO"), names)
    assert all_bits(names["model"]) == all_bits(diffq.load("model.diffq", TiedModules()))

"""docs/methods.md: its code runs as written."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import diffq

PAGE = (Path(__file__).parent.parent / "docs" / "methods.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


class _Net(nn.Module):
    """What the page's code speaks of: layers that keep the shape, and fc."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
        self.fc = nn.Linear(64, 64)

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        return self.fc(x)


@pytest.mark.parametrize("block", BLOCKS)
def test_code_runs(block, tmp_path, monkeypatch):
    """Each block of code runs by itself, given a model and data."""
    monkeypatch.chdir(tmp_path)
    inputs = torch.randn(8, 64)
    names = {
        "diffq": diffq,
        "torch": torch,
        "model": _Net(),
        "make_model": _Net,
        "teacher": _Net(),
        "inputs": inputs,
        "few_batches": [inputs],
        "targets": torch.randint(64, (8,)),
    }
    exec(block, names)
    names["model"].eval()(inputs)


def test_every_method_is_on_the_page():
    """The page names each public quantizer and tool of training."""
    public = {name for name in diffq.__all__ if not name.endswith(("Error", "Warning"))} - {
        *diffq._PACKAGES
    }
    apart = {"LSQ", "UniformQuantizer", "load_legacy", "open", "quantizer_of", "verify"}
    apart |= {"restore_quantized_state"}
    assert {name for name in public - apart if name not in PAGE} == set()

"""docs/smaller.md: its code runs as written."""

import re
from pathlib import Path

import torch
from torch import nn

import diffq

PAGE = Path(__file__).parent.parent.parent / "docs" / "smaller.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)


class _Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Embedding(24, 16), nn.Linear(16, 24))


def test_code_runs(tmp_path, monkeypatch):
    """The page's code loads a model that has no memory yet, and computes with it."""
    monkeypatch.chdir(tmp_path)
    diffq.save(diffq.QATQuantizer(_Net(), min_size=0), "model.diffq")
    names = {"Net": _Net, "inputs": torch.arange(6)}
    for block in BLOCKS:
        exec(block, names)
    assert names["outputs"].shape == (6, 24)

"""docs/product_quantization.md: its code runs as written, and its numbers are those of the code."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import diffq
from diffq.quantizers.product.blocks import LAYER_KINDS
from diffq.quantizers.product.weight import ProductSettings
from tests.models import evaluate_alike

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "product_quantization.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


class _Layer(nn.Module):
    """Attention and a feed-forward network, as far as names and shapes go."""

    def __init__(self):
        super().__init__()
        self.attention = nn.ModuleDict({"out": nn.Linear(64, 64)})
        self.feed_forward = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))

    def forward(self, x):
        return x + self.feed_forward(self.attention["out"](x))


class _Net(nn.Module):
    """What the page's patterns speak of."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.layers = nn.ModuleList(_Layer() for _ in range(2))

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return x


def _train(model, optimizer):
    optimizer.zero_grad()
    model.train()(torch.randint(50, (2, 5))).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("block", BLOCKS)
def test_code_runs(block, tmp_path, monkeypatch):
    """The page's code trains, fixes every stage in turn, and saves a file that loads."""
    monkeypatch.chdir(tmp_path)
    model = _Net()
    names = {"diffq": diffq, "model": model, "train": _train, "epochs": 2}
    names["opt"] = torch.optim.Adam(model.parameters(), 1e-3)
    exec(block, names)
    quantizer = names["quantizer"]
    assert [len(stage) for stage in quantizer.stages] == [4, 1, 2]
    fresh, inputs = _Net(), torch.randint(50, (2, 5))
    diffq.load("model.diffq", fresh)
    assert evaluate_alike(fresh, model, inputs)


def test_page_names_every_setting():
    """The page names every setting, every kind of layer, and the defaults of the signature."""
    assert [name for name in ProductSettings.__dataclass_fields__ if name not in PAGE] == []
    assert [kind for kind in LAYER_KINDS if f'"{kind}"' not in PAGE] == []
    parameters = inspect.signature(diffq.ProductQuantizer).parameters
    assert f'`"{parameters["noise"].default}"` (default)' in PAGE
    assert f'`"{parameters["centroids"].default}"` (the default)' in PAGE

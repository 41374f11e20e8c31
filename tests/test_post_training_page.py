"""docs/post_training.md: its code runs as written."""

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import diffq
from tests.models import evaluate_alike

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "post_training.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def _net():
    return nn.Sequential(nn.Linear(32, 96), nn.ReLU(), nn.Linear(96, 64))


def test_code_runs(tmp_path, monkeypatch, capsys):
    """The page's code quantizes by each source, and its file loads into a fresh model."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = _net()
    batches = [(torch.randn(16, 32), torch.randint(64, (16,))) for _ in range(2)]
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    F.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    optimizer.step()
    names = {"diffq": diffq, "F": F, "model": model, "fresh_model": _net()}
    names |= {"batches": batches, "optimizer": optimizer}
    assert len(BLOCKS) >= 4
    for block in BLOCKS:
        exec(compile(block, "post_training.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "QuantizedCheckpoint, a file of" in printed
    assert "what one quantized tensor adds" in printed
    quantized = diffq.quantize_checkpoint(model.state_dict(), 2.5)
    model.load_state_dict(quantized.state_dict())
    assert evaluate_alike(names["fresh_model"], model, torch.randn(5, 32))

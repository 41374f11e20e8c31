"""docs/reports.md: its code runs as written."""

import re
import types
from pathlib import Path

import pytest
import torch

import diffq
from tests.models import attached, mlp

PAGE = (Path(__file__).parents[2] / "docs" / "reports.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def test_the_code_runs(tmp_path, monkeypatch):
    """The page's blocks write a page and a figure, and log each number once for each logger."""
    matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is missing: extra `plot`")
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    _, quantizer = attached(mlp)
    logged, scalars = [], {}
    names = {
        "diffq": diffq,
        "torch": torch,
        "quantizer": quantizer,
        "step": 7,
        "wandb": types.SimpleNamespace(log=lambda numbers, step: logged.append((numbers, step))),
        "writer": types.SimpleNamespace(
            add_scalar=lambda name, value, step: scalars.update({name: value})
        ),
    }
    assert len(BLOCKS) == 5
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"reports.md, block {number}", "exec"), names)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bits.png", "page.html"]
    assert scalars == quantizer.metrics()
    assert logged == [(quantizer.metrics(), 7)] * 2

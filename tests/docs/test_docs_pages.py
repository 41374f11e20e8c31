"""docs/index.md and docs/choose.md: their code runs as written, and every page is on the site."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import diffq
from tests.models import evaluate_alike

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
NAVIGATION = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def _make_model():
    return nn.Sequential(nn.Linear(32, 96), nn.ReLU(), nn.Linear(96, 64))


def _run(page, names):
    """Runs the page's blocks one after the other; returns what they define."""
    torch.manual_seed(0)
    names = {"torch": torch, "diffq": diffq, "model": _make_model(), **names}
    text = (DOCS / page).read_text(encoding="utf-8")
    for block in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        exec(compile(block, page, "exec"), names)
    return names


def test_start(tmp_path, monkeypatch):
    """The first page's loop trains to the size that it names, and the file loads."""
    monkeypatch.chdir(tmp_path)
    batches = [(torch.randn(16, 32), torch.randint(64, (16,))) for _ in range(40)]
    given = {"batches": batches, "steps": 40, "target_mb": 0.008, "fresh_model": _make_model()}
    names = _run("index.md", given)
    assert names["quantizer"].target.phase == "done"
    assert Path("model.diffq").stat().st_size <= 0.008 * 2**20
    assert evaluate_alike(names["fresh_model"], names["model"], torch.randn(5, 32))


def test_choose(tmp_path, monkeypatch):
    """The sweep writes a file for each of its sizes."""
    monkeypatch.chdir(tmp_path)

    def train(model, opt, steps):
        for _ in range(steps):
            opt.zero_grad()
            model(torch.randn(16, 32)).square().mean().backward()
            opt.step()

    given = {"make_model": _make_model, "train": train, "steps": 10, "evaluate": lambda model: 0.0}
    names = _run("choose.md", {"target_mb": 0.02, **given})
    assert names["target_mb"] == 0.02
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model_0.02.diffq",
        "model_0.04.diffq",
        "model_0.08.diffq",
    ]


@pytest.mark.parametrize("path", sorted(DOCS.rglob("*.md")), ids=lambda path: path.name)
def test_every_page_is_in_the_navigation(path):
    """Each page of docs/ is in the navigation of the site."""
    name = re.escape(path.relative_to(DOCS).as_posix())
    assert re.search(rf"^ *- (.*: )?{name}$", NAVIGATION, re.MULTILINE)


def test_reference_lists_every_name():
    """The first page of the reference links to every name but errors and the earlier ones."""
    index = (DOCS / "api" / "index.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\[(\w+)\](?:\[|\()", index))
    errors = {name for name in diffq._LAZY if name.endswith("Error")}
    assert {*diffq._LAZY} - linked - errors == {"LSQ", "UniformQuantizer"}

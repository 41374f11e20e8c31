"""The README: its code runs, and what it names exists."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import diffq
from tests.compare import same_bits
from tests.holder import weight_quantizers
from tests.models import evaluate_alike

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
#: A size for the model of the tests, in place of the README's, which is that of a larger one.
SIZE = 0.005
BLOCKS = [
    block.replace("target_mb=5.0", f"target_mb={SIZE}")
    for block in re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
]
DOCS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


class _Net(nn.Module):
    """What the README's patterns speak of: a body, a head, and biases."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 96), nn.BatchNorm1d(96), nn.ReLU())
        self.head = nn.Linear(96, 64)

    def forward(self, x):
        return self.head(self.body(x))


def _preamble():
    """The names that the README's code takes as given."""
    torch.manual_seed(0)
    batches = [(torch.randn(16, 32), torch.randint(64, (16,))) for _ in range(20)]
    return {
        "model": _Net(),
        "fresh_model": _Net(),
        "batches": batches,
        "loader": batches,
        "inputs": batches[0][0],
    }


def _run(folder, count=None):
    """Runs the README's blocks in their order, in a folder; returns their names."""
    names = _preamble()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for number, block in enumerate(BLOCKS[:count]):
            exec(compile(block, f"README.md, block {number}", "exec"), names)
    return names


def test_readme_has_code():
    """The README shows the loop, and how to store and restore."""
    code = "\n".join(BLOCKS)
    for name in ("setup_optimizer", "model_size", "get_quantized_state", "restore_quantized_state"):
        assert f"{name}(" in code


def test_readme_code_runs(tmp_path, capsys):
    """All blocks of the README run one after the other, and print a size in MB."""
    names = _run(tmp_path)
    assert names["quantizer"].true_model_size() > 0
    assert re.search(r"\d MB$", capsys.readouterr().out, re.MULTILINE)


def test_readme_loop_trains(tmp_path):
    """The README's loop moves weights and bitwidths, and ends with a file of the size."""
    names = _run(tmp_path, 1)
    assert not same_bits(names["model"].body[0].weight, _preamble()["model"].body[0].weight)
    assert torch.unique(weight_quantizers(names["model"])["body.0.weight"].logits).numel() > 1
    file = diffq.save(names["quantizer"], tmp_path / "model.diffq")
    assert 0.99 * SIZE <= file / 2**20 <= SIZE


def test_readme_restores(tmp_path):
    """After the README's code the fresh model computes what the quantized one does."""
    count = next(i for i, block in enumerate(BLOCKS) if "restore_quantized_state" in block) + 1
    names = _run(tmp_path, count)
    assert evaluate_alike(names["fresh_model"], names["model"], torch.randn(5, 32))
    assert any(path.stat().st_size > 0 for path in tmp_path.iterdir())


def test_readme_names_exist():
    """Every `diffq.name`, and every option and method of a quantizer that is named, exists."""
    for name in set(re.findall(r"diffq\.([A-Za-z_]\w*)", README)):
        assert hasattr(diffq, name), name
    for name in set(re.findall(r"quantizer\.([a-z_]+)", README)):
        assert hasattr(diffq.DiffQuantizer, name), name


def test_readme_shows_the_version():
    """The version that the README's Install section prints is the package's."""
    shown = re.search(r"print\(diffq\.__version__\)\"\n(.*)\n", README)
    assert shown[1] == diffq.__version__


def test_readme_commands_exist():
    """Every make target that the README names is in the Makefile."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"(?:^\$ |`)make ([a-z-]+)", README, re.MULTILINE))
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    """Every link of a page to a file of the project leads to one."""
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
    missing = [link for link in links if not (path.parent / link).exists()]
    assert missing == []

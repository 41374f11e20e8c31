"""Faults of the machine and of what users pass in: one line and an exit code, no traceback."""

import pytest
import torch

from diffq.cli import main


@pytest.fixture
def checkpoint(tmp_path):
    """A small checkpoint."""
    path = tmp_path / "model.pt"
    torch.save({"weight": torch.randn(8, 8)}, path)
    return path


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at x.cpp] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("place", ["torch.load", "diffq.ptq.checkpoint.quantize_checkpoint"])
def test_out_of_memory(place, error, checkpoint, tmp_path, monkeypatch, capsys):
    """Where the memory does not suffice, that is what the line says."""

    def fail(*args, **options):
        raise error

    monkeypatch.setattr(place, fail)
    assert main(["pack", str(checkpoint), str(tmp_path / "out.diffq"), "--bits", "4"]) == 1
    assert capsys.readouterr().err == (
        "diffq: error: The memory does not suffice for this model.\n"
    )


def test_other_faults_are_not_hidden(checkpoint, tmp_path, monkeypatch):
    """A fault of the program itself is not taken for a lack of memory."""

    def fail(*args, **options):
        raise RuntimeError("a fault")

    monkeypatch.setattr("diffq.ptq.checkpoint.quantize_checkpoint", fail)
    with pytest.raises(RuntimeError, match="a fault"):
        main(["pack", str(checkpoint), str(tmp_path / "out.diffq"), "--bits", "4"])


@pytest.mark.parametrize(
    "options",
    [["--target-mb", "1e308"], ["--bits", "4", "--metadata", "a=" + "[" * 5000 + "]" * 5000]],
    ids=["size", "metadata"],
)
def test_values_beyond_reach(options, checkpoint, tmp_path, capsys):
    """Numbers and JSON beyond what can be held are errors of the command line."""
    with pytest.raises(SystemExit) as caught:
        main(["pack", str(checkpoint), str(tmp_path / "out.diffq"), *options])
    assert caught.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("line", ["raise ValueError('mine')", "import sys; sys.exit(0)", "def ("])
def test_models_that_fail(line, checkpoint, tmp_path, monkeypatch, capsys):
    """What the user's module raises when the model is made is named, whatever it is."""
    (tmp_path / "failing.py").write_text(f"{line}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "failing", raising=False)
    assert main(["convert", str(checkpoint), "out.diffq", "--model", "failing:make"]) == 1
    assert "but it raised" in capsys.readouterr().err
    assert not (tmp_path / "out.diffq").exists()

"""examples/sweep.py on another task: it trains to the sizes asked for, resumes, and draws."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import sweep

SIZE = 0.012
COMMAND = ["--sizes", str(SIZE), "--methods", "float32", "qat", "rounding", "entropy"]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a sweep of a small task; returns the lines of its results."""
    inputs = torch.randn(64, 32)
    data = (inputs, inputs[:, :8].argmax(1))
    monkeypatch.setattr(sweep, "MIN_SIZE", 0.001)
    monkeypatch.setattr(sweep, "load_data", lambda seed: (data, data))
    monkeypatch.setattr(
        sweep, "make_model", lambda: nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 8))
    )
    monkeypatch.setattr(
        sweep, "training_loss", lambda model, data, _: F.cross_entropy(model(data[0]), data[1])
    )
    monkeypatch.setattr(
        sweep,
        "quality",
        lambda model, data: -F.cross_entropy(model.eval()(data[0]), data[1]).item(),
    )
    out = tmp_path / "curve.svg"

    def run(*arguments):
        fixed = ["--steps", "20", "--qat-bits", "2", "--out", str(out)]
        monkeypatch.setattr(sys, "argv", ["sweep.py", *arguments, *fixed])
        sweep.main()
        lines = out.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    return run


def test_files_have_the_sizes(run, tmp_path):
    """Every sized training's file has the size asked for, and is among the results and drawn."""
    rows = {row["method"]: row for row in run(*COMMAND)}
    assert set(rows) == {"float32", "qat", "rounding", "entropy"}
    for name in ("rounding", "entropy"):
        assert 0.99 * SIZE <= rows[name]["mb"] <= SIZE
        path = tmp_path / "curve" / f"{name}_{SIZE}_mb_seed_0.diffq"
        assert path.stat().st_size == rows[name]["mb"] * 2**20
    assert "rounding" in (tmp_path / "curve.svg").read_text(encoding="utf-8")


def test_the_same_command_trains_what_is_missing(run, monkeypatch, tmp_path):
    """Results stay as they are; a line cut off by an interruption is trained again."""
    rows = run(*COMMAND)
    path = tmp_path / "curve.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    trained = []
    fit = sweep.fit
    monkeypatch.setattr(
        sweep,
        "fit",
        lambda method, *rest, **more: trained.append(method) or fit(method, *rest, **more),
    )
    assert run(*COMMAND) == rows
    assert [method.name for method in trained] == [f"entropy {SIZE:g} MB"]


def test_seeds_add_to_the_results(run, capsys):
    """The table has mean and standard deviation over the seeds of all commands."""
    run("--sizes", "1", "--methods", "qat")
    rows = run("--sizes", "1", "--methods", "qat", "--seeds", "1")
    assert [row["seed"] for row in rows] == [0, 1]
    qualities = torch.tensor([row["quality"] for row in rows])
    shown = f"{qualities.mean():.2f} ± {qualities.std():.2f}"
    assert shown in capsys.readouterr().out


def test_other_settings_are_other_results(run):
    """A result counts only for the settings that it was trained with."""
    assert len(run("--sizes", "1", "--methods", "qat")) == 1
    assert len(run("--sizes", "1", "--methods", "qat", "--small-bits", "0")) == 2


def test_prices_in_place_of_sizes(run):
    """A higher price gives a smaller file, with a plan and from the first step on."""
    command = ["--lams", "1", "1000", "--methods", "rounding", "--bits-lr", "0.1"]
    planned = run(*command)
    unplanned = run(*command, "--no-plan")[2:]
    for low, high in (planned, unplanned):
        assert high["mb"] < low["mb"]


def test_a_refused_size_leaves_the_others(run, capsys):
    """A method that cannot reach a size is reported, and the sweep goes on."""
    rows = run("--sizes", "0.001", "0.012", "--methods", "rounding")
    assert [row["asked"] for row in rows] == ["0.012 MB"]
    assert "No rounding 0.001 MB: target_mb must be at least" in capsys.readouterr().out


def test_a_sweep_without_results_fails(run, capsys):
    """If no method reaches any size, the sweep ends with an error in place of an empty picture."""
    with pytest.raises(SystemExit, match="ask for more MB"):
        run("--sizes", "0.001", "--methods", "rounding")
    assert "target_mb must be at least" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["curve.txt", "curve"])
def test_a_picture_that_cannot_be_drawn_ends_before_training(name, monkeypatch, capsys):
    """The suffix of the picture is checked first, with the two that are known."""
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--sizes", "1", "--out", name])
    with pytest.raises(SystemExit):
        sweep.main()
    assert "--out must end in .svg or .png" in capsys.readouterr().err


def test_without_matplotlib_the_remedy_is_named(monkeypatch, capsys):
    """A missing matplotlib ends the sweep before any training."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--sizes", "1"])
    with pytest.raises(SystemExit):
        sweep.main()
    assert "pip install matplotlib" in capsys.readouterr().err

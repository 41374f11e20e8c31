"""Figures of matplotlib: bars add up to what the model has, whatever is drawn from."""

import sys

import numpy as np
import pytest

import diffq
from diffq.format.container import encode
from diffq.reports.summary import summarize
from tests.format.samples import grid, product, raw
from tests.models import attached, mlp
from tests.reports.samples import records

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is missing: the extra `plot`")
matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def _closed():
    from matplotlib import pyplot

    yield
    pyplot.close("all")


def _file(folder, tensors):
    path = folder / "model.diffq"
    path.write_bytes(encode(tensors))
    return path


def _widths(axes):
    """Lengths of the bars of each row."""
    rows = {}
    for bar in axes.patches:
        rows.setdefault(round(bar.get_y() + bar.get_height() / 2), []).append(bar.get_width())
    return rows


def test_bits_are_shares(tmp_path):
    """Each layer's bar is full, and its parts are its shares of weights."""
    path = _file(tmp_path, records())
    with diffq.open(path) as stored:
        summary = summarize(stored.reader)
        axes = diffq.plot.bits(stored)
    rows = _widths(axes)
    assert len(rows) == len(summary.quantized)
    for row, tensor in enumerate(summary.quantized):
        assert axes.get_yticklabels()[row].get_text() == tensor.name
        counts = np.array([*tensor.counts.values()] or [1])
        assert rows[row] == pytest.approx(counts / counts.sum())
    (strip,) = axes.child_axes
    assert [bar.get_width() for bar in strip.patches] == [t.size for t in summary.quantized]
    assert f"{summary.mean_bits:.2f}" in axes.get_title(loc="left")


def test_sizes_add_up_to_the_file(tmp_path):
    """The bars of all rows are the bytes of the file."""
    path = _file(tmp_path, records())
    axes = diffq.plot.sizes(path)
    assert sum(bar.get_width() for bar in axes.patches) == path.stat().st_size
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[-2:] == ["3 raw tensors", "index, metadata"]


@pytest.mark.parametrize("draw", [diffq.plot.bits, diffq.plot.sizes])
def test_quantizers_are_drawn_as_their_file(draw, tmp_path):
    """A quantizer, its file, and the open file give the same bars."""
    _, quantizer = attached(mlp)
    path = tmp_path / "model.diffq"
    diffq.save(quantizer, path)
    with diffq.open(path) as stored:
        drawn = [_widths(draw(source)) for source in (quantizer, path, stored)]
    assert drawn[0] == drawn[1] == drawn[2]


@pytest.mark.parametrize("draw", [diffq.plot.bits, diffq.plot.sizes])
@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"x": raw(np.ones(3, "f4"))},
        {"x": product(40, 8)},
        {"$x": grid(80), "$\\frac{": grid(80), "y\u202e": grid(80)},
        {f"layers.{i}.weight": grid(64 + i) for i in range(60)},
    ],
    ids=["empty", "raw", "codebook", "mathematics", "many"],
)
def test_any_file_is_drawn(draw, tensors, tmp_path):
    """Files without levels, with names that look like mathematics, or with many layers."""
    axes = draw(_file(tmp_path, tensors))
    axes.figure.savefig(tmp_path / "picture.png")
    assert len(_widths(axes)) <= 43
    assert all("\u202e" not in label.get_text() for label in axes.get_yticklabels())


def test_axes_can_be_given(tmp_path):
    """A figure is drawn on the axes that it is given, and nowhere else."""
    from matplotlib import pyplot

    _, axes = pyplot.subplots(1, 2)
    path = _file(tmp_path, records())
    assert diffq.plot.bits(path, ax=axes[0]) is axes[0]
    assert diffq.plot.sizes(path, ax=axes[1]) is axes[1]
    assert len(pyplot.get_fignums()) == 1


def test_without_matplotlib(tmp_path, monkeypatch):
    """Without matplotlib, the error names the extra."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(diffq.ConfigError, match=r"needs the package matplotlib.*diffq\[plot\]"):
        diffq.plot.bits(_file(tmp_path, records()))

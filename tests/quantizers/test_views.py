"""A quantizer as people see it: metrics for a log, pages, and tables in notebooks."""

import os

import pytest
import torch
from torch import nn

import diffq
from diffq.reports.text import size
from tests.compare import same_bits
from tests.models import QUANTIZERS, attached, mlp, snapshot_of


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_metrics_are_the_sizes_and_bits(kind):
    """Metrics are plain floats: size, mean bits, and the mean of each quantized tensor."""
    model, quantizer = attached(mlp, kind)
    before = snapshot_of(model)
    metrics = quantizer.metrics()
    assert all(type(value) is float for value in metrics.values())
    assert metrics.pop("diffq/size_mb") == quantizer.true_model_size()
    assert metrics.pop("diffq/mean_bits") == quantizer.mean_bits()
    named = {plan.name for plan in quantizer.plan if plan.quantized}
    assert {name.removeprefix("diffq/bits/") for name in metrics} <= named
    weights = {plan.name: plan.numel for plan in quantizer.plan}
    total = sum(weights[name.removeprefix("diffq/bits/")] * b for name, b in metrics.items())
    count = sum(weights[name.removeprefix("diffq/bits/")] for name in metrics)
    assert total / count == pytest.approx(quantizer.mean_bits())
    assert same_bits(snapshot_of(model), before)


def test_metrics_follow_each_tensor():
    """Each tensor's number is the mean of its groups."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 4, bias=False))
    settings = {"0.weight": {"bits": 3}, "1.weight": {"bits": 6}}
    quantizer = diffq.QATQuantizer(model, min_size=0, overrides=settings)
    metrics = quantizer.metrics()
    assert metrics["diffq/bits/0.weight"] == 3
    assert metrics["diffq/bits/1.weight"] == 6
    assert metrics["diffq/mean_bits"] == (64 * 3 + 32 * 6) / 96


def test_metrics_without_bits():
    """Where nothing is quantized there are no bits, and no NaN that a log would draw."""
    with pytest.warns(diffq.DiffqWarning):
        quantizer = diffq.DiffQuantizer(nn.Linear(2, 2))
    assert quantizer.metrics() == {"diffq/size_mb": 24 / 2**20}


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_report_is_the_page_of_the_file(kind, tmp_path):
    """The page of a quantizer has the size of the file that `save` writes, and is written whole."""
    _, quantizer = attached(mlp, kind)
    diffq.save(quantizer, tmp_path / "model.diffq")
    page = quantizer.report(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page
    assert f"<h1>{type(quantizer).__name__} of {type(quantizer.model).__name__}</h1>" in page
    assert f">{size(os.path.getsize(tmp_path / 'model.diffq'))}</span>" in page


def test_report_checks_before_it_writes(tmp_path):
    """A weight that is not finite, or an unknown codec, is an error, and no page is written."""
    model, quantizer = attached(mlp)
    with pytest.raises(diffq.ConfigError, match="codec"):
        quantizer.report(tmp_path / "page.html", codec="zip")
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(diffq.WeightError):
        quantizer.report(tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", [lambda q: q.metrics(), lambda q: q.report()])
def test_after_detach(call):
    """Without a model there is nothing to show."""
    quantizer = diffq.DiffQuantizer(mlp(), min_size=0)
    quantizer.detach()
    with pytest.raises(diffq.AttachError, match="detached"):
        call(quantizer)
    assert quantizer._repr_html_() == "<p>DiffQuantizer(detached)</p>"


def test_notebooks_show_the_table():
    """A notebook shows the rows of `repr` as a table, with names as text."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_parameter("<b>weight", nn.Parameter(torch.randn(16, 8)))

    quantizer = diffq.DiffQuantizer(Odd(), min_size=0)
    shown = quantizer._repr_html_()
    assert "<td>&lt;b&gt;weight</td><td>16x8</td><td>16</td><td>8.00</td>" in shown
    assert "<b>" not in shown
    assert shown.startswith("<p>DiffQuantizer</p><table>")


def test_notebooks_show_errors_as_text():
    """Weights that are not finite are said, and no exception, in the place of the table."""
    model, quantizer = attached(mlp)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    shown = quantizer._repr_html_()
    assert "must be finite" in shown
    assert "<table>" not in shown
    assert repr(quantizer).startswith(f"{type(quantizer).__name__}(")


def test_notebooks_show_files(tmp_path):
    """An open file is a table of its tensors, of which none is decoded, also once it is closed."""
    _, quantizer = attached(mlp)
    diffq.save(quantizer, tmp_path / "model.diffq")
    with diffq.open(tmp_path / "model.diffq") as stored:
        shown = stored._repr_html_()
    assert stored._repr_html_() == shown
    for name in stored.entries:
        assert f"<tr><td>{name}</td>" in shown
        assert f"<td>{stored.stored_bytes(name):,}</td></tr>" in shown

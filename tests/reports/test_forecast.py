"""Bitwidths in smaller files: the same bits from every group, and bytes by the levels' entropy."""

import numpy as np
import pytest

from diffq.format.container import encode
from diffq.format.entropy import entropy_bits
from diffq.format.reader import Reader
from diffq.format.records import GridRecord
from diffq.reports.forecast import Rates, forecast
from diffq.reports.summary import summarize
from tests.format.samples import grid, product, random_levels, raw
from tests.reports.samples import reader


def _measured(file):
    rates = {}
    summary = summarize(file, look=lambda name, record: rates.update({name: Rates.of(record)}))
    return summary, {name: each for name, each in rates.items() if each is not None}


def _recoded(record, fewer):
    """A record with its levels rounded to grids of `fewer` bits less, at least 1."""
    bits = np.maximum(record.bits - fewer, 1).astype(np.uint8)
    repeated = [np.repeat(b.astype(np.int64), record.group_size) for b in (record.bits, bits)]
    before, after = ((1 << each[: record.numel]) - 1 for each in repeated)
    levels = np.rint(record.levels * after / before).astype(np.uint16)
    head = record.shape, record.dtype, record.group_size, 1, bits, levels
    return GridRecord(*head, record.ranges)


@pytest.mark.parametrize("fewer", [0, 1, 2])
def test_rates_are_those_of_rounded_levels(fewer):
    """The predicted bytes of levels are the entropy of the levels when they are really rounded."""
    record = grid(8000, bits=(4, 8))
    recoded = _recoded(record, fewer)
    rates = Rates.of(record)
    # Streams of the groups that had one bitwidth, as bitwidths may meet at 1.
    wanted = 0.0
    widths = np.repeat(record.bits, record.group_size)[: record.numel]
    for width in np.unique(widths):
        wanted += entropy_bits(np.bincount(recoded.levels[widths == width])) / 8
    assert rates.bytes(fewer) == pytest.approx(wanted)
    assert rates.mean_bits(fewer) == pytest.approx(np.maximum(widths - fewer, 1.0).mean())


def test_no_group_falls_below_one_bit():
    """Groups that have 1 bit left keep it."""
    bits = np.array([1, 3], np.uint8)
    levels = random_levels(bits, 8, 16, 0)
    record = GridRecord((16,), "float32", 8, 1, bits, levels, np.float32([[-1, 1]]))
    rates = Rates.of(record)
    assert rates.mean_bits(1) == pytest.approx((1 + 2) / 2)
    assert rates.mean_bits(9) == 1


@pytest.mark.parametrize("share", [0.9, 0.75, 0.65])
def test_forecast_has_the_size_that_was_asked_for(share):
    """The bytes that a forecast predicts are the share, and all tensors lose the same bits."""
    summary, rates = _measured(reader())
    found = forecast(summary, rates, share)
    assert found.reached
    assert found.size == pytest.approx(share * summary.size, rel=1e-4)
    assert set(found.bits) == {"encoder.layers.0.weight", "encoder.layers.1.weight"}
    for tensor in summary.tensors:
        if tensor.name in found.bits:
            assert 1 <= found.bits[tensor.name] < tensor.mean_bits
            assert tensor.mean_bits - found.bits[tensor.name] <= found.fewer + 1e-9


@pytest.mark.parametrize("fewer", [1, 2])
def test_forecast_is_what_is_written(fewer):
    """A file of the rounded levels has the predicted size, within 3 %."""
    record = grid(60_000, group_size=64, bits=(4, 8))
    file = Reader(encode({"w": record}))
    smaller = len(encode({"w": _recoded(record, fewer)}))
    summary, rates = _measured(file)
    found = forecast(summary, rates, smaller / file.size)
    assert found.fewer == pytest.approx(fewer, abs=0.15)
    assert found.bits["w"] == pytest.approx(rates["w"].mean_bits(fewer), abs=0.15)


def test_packed_levels_count_their_bits():
    """Levels that are stored without entropy coding shrink by bits and not by entropy."""
    file = Reader(encode({"w": grid(8000, bits=(8, 8))}, codec="packed"))
    summary, rates = _measured(file)
    half = forecast(summary, rates, 0.5)
    assert half.bits["w"] == pytest.approx(4, abs=0.1)


def test_what_bits_cannot_reach():
    """Where raw tensors alone are more than the share, the smallest file is told instead."""
    noise = np.random.default_rng(0).standard_normal(4000, "f4")
    summary, rates = _measured(Reader(encode({"w": grid(4000), "raw": raw(noise)})))
    found = forecast(summary, rates, 0.5)
    assert not found.reached
    assert found.size > 0.5 * summary.size
    assert found.bits == {"w": 1.0}


def test_codebooks_and_constants_have_no_rates():
    """Tensors without levels take part with the bytes they have."""
    constant = grid(64)
    constant = GridRecord(**{**vars(constant), "ranges": np.float32([[2, 2]])})
    assert Rates.of(product(40, 8)) is None
    assert Rates.of(constant) is None
    assert Rates.of(raw(np.ones(3, "f4"))) is None

"""The coder: every run of symbols comes back, in as few bits as its frequencies say."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from diffq.errors import FormatError
from diffq.format import rans
from diffq.format.entropy import entropy_bits
from diffq.format.wire import Cursor
from tests.format.craft import frequencies, in_runs

COUNTS = hnp.arrays(np.int64, st.integers(1, 300), elements=st.integers(0, 1 << 20)).filter(np.any)


@st.composite
def runs(draw):
    """Symbols of any number and skew: none, one, one distinct, or 2**15 distinct ones."""
    distinct = draw(st.sampled_from([1, 2, 3, 17, 256, 1 << 15]))
    count = draw(st.sampled_from([0, 1, 2, 5, 100, 3000]))
    skew = draw(st.sampled_from([0, 1, 8, 60]))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    symbols = (distinct * random.random(count) ** (skew + 1)).astype(np.uint16)
    return symbols + np.uint16(draw(st.integers(0, (1 << 16) - distinct)))


def coded(drawn, lanes):
    """Models, states and words of some runs; a run without symbols takes any model."""
    models = [rans.Model.of(np.bincount(run if run.size else [7])) for run in drawn]
    return models, *rans.encode(list(zip(models, drawn, strict=True)), lanes)


@given(st.lists(runs(), max_size=4), st.sampled_from([1, 2, 7, 64, rans.MAX_LANES]))
def test_runs_come_back(drawn, lanes):
    """Runs of any symbols come back in every lane, and leave nothing over."""
    models, states, words = coded(drawn, lanes)
    decoder = rans.Decoder(states, words, "here")
    for model, run in zip(models, drawn, strict=True):
        assert np.array_equal(decoder.run(model, run.size, np.uint16), run)
    decoder.end()


@pytest.mark.parametrize("distinct", [1, 2, 1000, 1 << 15, 1 << 16])
def test_as_many_symbols_as_there_can_be(distinct):
    """Up to all 2**16 symbols in one run come back."""
    symbols = np.random.default_rng(0).permutation(np.arange(distinct, dtype=np.uint16).repeat(2))
    (model,), states, words = coded([symbols], 16)
    decoder = rans.Decoder(states, words, "here")
    assert np.array_equal(decoder.run(model, symbols.size, np.uint16), symbols)
    decoder.end()


@given(COUNTS)
def test_frequencies(counts):
    """Frequencies sum to 2**16 exactly; each symbol that occurs has one, and no other."""
    model = rans.Model.of(counts)
    assert model.symbols.tolist() == np.flatnonzero(counts).tolist()
    assert model.frequencies.min() >= 1
    assert model.frequencies.sum() == rans.TOTAL
    assert model.starts.tolist() == [0, *np.cumsum(model.frequencies)[:-1].tolist()]


@given(COUNTS)
def test_frequencies_are_near_the_shares(counts):
    """A symbol's frequency is within 1 of its share, but for what the rarest are given."""
    model = rans.Model.of(counts)
    shares = counts[model.symbols] * rans.TOTAL / counts.sum()
    given_away = np.maximum(1 - shares, 0).sum()
    assert (abs(model.frequencies - np.maximum(shares, 1)) <= 1 + given_away).all()


@given(COUNTS, st.sampled_from([0, 1, 300, 60_000]))
def test_models_come_back(counts, first):
    """Frequencies come back from their bytes, which are those of the specification."""
    model = rans.Model.of(np.concatenate([np.zeros(first, np.int64), counts]))
    written = model.write()
    pairs = zip(model.symbols.tolist(), model.frequencies.tolist(), strict=True)
    assert written == frequencies(dict(pairs))
    cursor = Cursor(written, "here")
    read = rans.Model.read(cursor, 1 << 16)
    cursor.end()
    assert np.array_equal(read.symbols, model.symbols)
    assert np.array_equal(read.frequencies, model.frequencies)


@given(st.lists(runs(), max_size=3), st.sampled_from([1, 3, 50]))
def test_bytes_are_those_of_the_specification(drawn, lanes):
    """States and words are what a coder written from the specification alone makes."""
    drawn = [run[:200] for run in drawn]
    models, states, words = coded(drawn, lanes)
    tables = [dict(zip(m.symbols.tolist(), m.frequencies.tolist(), strict=True)) for m in models]
    pairs = [(run.tolist(), table) for run, table in zip(drawn, tables, strict=True)]
    wanted = in_runs(*pairs, lanes=lanes, marks=((), {0: rans.TOTAL}), tables=[], columns=())
    assert states.tobytes() + words.tobytes() == wanted[-2 - 4 * lanes - 2 * words.size : -2]


@pytest.mark.parametrize("scale", [0.1, 0.3, 1, 5, 60])
def test_bits_of_a_long_run(scale):
    """Words take at most 1.002 times the entropy of the symbols, and the lanes' states 4 bytes."""
    levels = np.rint(np.random.default_rng(0).laplace(size=300_000) * scale).astype(np.int64)
    symbols = (levels - levels.min()).astype(np.uint16)
    _, states, words = coded([symbols], 64)
    bound = entropy_bits(np.bincount(symbols)) / 8
    assert states.size == 64
    assert words.nbytes <= 1.002 * bound + 4


def test_the_same_bytes_everywhere():
    """Whole numbers alone decide: these are the bytes on every machine."""
    symbols = np.uint16([k * k * 7919 % 65_521 % 9 for k in range(60)])
    (model,), states, words = coded([symbols], 3)
    assert model.frequencies.tolist() == [10923, 10923, 7646, 6554, 5461, 7646, 6553, 3277, 6553]
    assert states.tolist() == [439552675, 2846747223, 743684905]
    assert words.tolist() == [9110, 19329, 18861, 2010, 47008, 20924, 63739, 43092, 2659]


def test_damage_is_noticed():
    """Missing, changed and left over words are errors: never other symbols and no error."""
    symbols = np.random.default_rng(0).integers(0, 5, 1000).astype(np.uint16)
    (model,), states, words = coded([symbols], 4)

    def read(states, words):
        decoder = rans.Decoder(states, words, "here")
        out = decoder.run(model, symbols.size, np.uint8)
        decoder.end()
        return out

    assert np.array_equal(read(states, words), symbols)
    with pytest.raises(FormatError, match=f"here: the runs must need {words.size - 1} words"):
        read(states, words[:-1])
    with pytest.raises(FormatError, match="no word may be left over, got 2"):
        read(states, np.concatenate([words, words[:2]]))
    for place in range(words.size):
        changed = words.copy()
        changed[place] ^= 1
        with pytest.raises(FormatError):
            read(states, changed)
    with pytest.raises(FormatError, match=r"lanes must end|no word|the runs"):
        read(states + np.uint32(1), words)

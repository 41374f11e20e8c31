"""Hypothesis fuzzes the reader: as bytes come, and with all checksums repaired."""

from typing import get_args

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from diffq.format.container import Codec, encode
from tests.format.craft import (
    TOTAL,
    Elements,
    File,
    Levels,
    Runs,
    floats,
    grid,
    in_runs,
    leb,
    name,
    product,
    raw,
    scaled,
    stepped,
    steps,
)
from tests.format.make_golden import FOLDER
from tests.format.samples import RECORDS, codebook_model, matrix, small_model, stepped_model
from tests.fuzz.target import read_and_write, read_repaired, take_apart

STEMS = ("example", "every_dtype", "shared", "zero_points")
SEEDS = [
    encode(small_model(), {"tied": "empty"}, {"a": [1, {"b": None}]}),
    encode(small_model(), codec="packed"),
    File().build(),
    encode(codebook_model()),
    encode(codebook_model(), codec="packed"),
    encode({**small_model(), **codebook_model()}, codec="rans"),
    encode({"a": matrix(12, 10, 0.2), "b": matrix(9, 20, 0.5, group_size=4)}, codec="rans"),
    *(encode(stepped_model(), codec=codec) for codec in get_args(Codec)),
    *((FOLDER / f"{stem}.diffq").read_bytes() for stem in STEMS),
]
FUZZ = settings(max_examples=300)

# Where to change, what to put there, and how many bytes it replaces.
EDITS = st.lists(
    st.tuples(st.floats(0, 1), st.binary(max_size=9), st.integers(0, 9)), min_size=1, max_size=4
)
NUMBERS = st.one_of(
    st.integers(0, 20), st.integers(0, 70).map(lambda n: 2**n), st.integers(0, 2**64)
)
BYTES = st.integers(0, 255)


def edited(data, edits):
    """Bytes with some replaced, inserted or removed."""
    for place, new, removed in edits:
        start = int(place * len(data))
        data = data[:start] + new + data[start + removed :]
    return data


@FUZZ
@given(st.binary(max_size=200))
def test_random_bytes(data):
    """Random bytes are refused, with a sound start or without."""
    assert not read_and_write(data)
    read_and_write(SEEDS[2][:10] + data)


@FUZZ
@given(st.sampled_from(SEEDS), EDITS)
def test_edited_files(data, edits):
    """Edited files are refused, or are what they were."""
    changed = edited(data, edits)
    assert read_and_write(changed) == (changed == data)


@FUZZ
@given(st.sampled_from(SEEDS), EDITS)
def test_edited_index(data, edits):
    """An edited index with sound checksums gives tensors or a FormatError."""
    index, body, meta = take_apart(data)
    read_repaired(edited(index, edits), body, meta)


@FUZZ
@given(st.sampled_from(SEEDS), EDITS)
def test_edited_data(data, edits):
    """Edited segments of unchanged size with sound checksums give tensors or a FormatError."""
    index, body, meta = take_apart(data)
    read_repaired(index, (edited(body, edits) + bytes(len(body)))[: len(body)], meta)


@FUZZ
@given(st.binary(max_size=60) | st.text().map(str.encode))
def test_edited_metadata(meta):
    """Any metadata gives a JSON object or a FormatError."""
    index, body, _ = take_apart(SEEDS[2])
    read_repaired(index, body, meta)


@FUZZ
@given(st.lists(RECORDS, min_size=1, max_size=3), EDITS, st.sampled_from(get_args(Codec)))
def test_edited_models(records, edits, codec):
    """Edits in the index of models of all kinds give tensors or a FormatError."""
    model = {f"layer.{i}.weight": record for i, record in enumerate(records)}
    index, body, meta = take_apart(encode(model, codec=codec))
    read_repaired(edited(index, edits), body, meta)


TENSORS = st.one_of(
    st.builds(
        raw,
        st.lists(NUMBERS, max_size=3),
        st.integers(0, 18),
        st.none() | st.integers(0, 18),
        NUMBERS,
    ),
    st.builds(
        grid,
        st.lists(NUMBERS, max_size=3),
        NUMBERS,
        st.integers(0, 17),
        st.integers(0, 9),
        st.lists(NUMBERS, min_size=1, max_size=2),
        st.integers(8, 13),
    ),
    *(
        st.builds(
            kind,
            st.lists(NUMBERS, max_size=3),
            NUMBERS,
            st.integers(0, 17),
            st.lists(NUMBERS, min_size=1, max_size=2),
        )
        for kind in (scaled, stepped)
    ),
    st.builds(
        product,
        st.lists(NUMBERS, max_size=3),
        NUMBERS,
        NUMBERS,
        st.lists(NUMBERS, min_size=1, max_size=2),
        st.sampled_from([1, 9, 11]) | st.integers(0, 17),
        st.binary(min_size=5, max_size=5) | st.just(b""),
    ),
)


@st.composite
def crafted_runs(draw):
    """A segment in rANS, sound in itself, of any marks, columns and levels."""
    marks = draw(st.lists(st.integers(0, 31), min_size=1, max_size=12))
    levels = draw(st.lists(st.integers(0, 3), min_size=1, max_size=12))
    stored = in_runs(
        (levels, dict.fromkeys(range(4), TOTAL // 4)),
        marks=(marks, dict.fromkeys(range(32), TOTAL // 32)),
        lanes=draw(st.integers(1, 4)),
        bounds=(draw(st.integers(0, 31)), draw(st.integers(0, 31))),
        columns=draw(st.lists(NUMBERS, max_size=2)),
        tail=draw(st.binary(max_size=2)),
    )
    return Runs(stored, used=draw(st.sampled_from([2, 4, 6, 8])))


SEGMENTS = st.one_of(
    st.builds(Elements, st.binary(max_size=20)),
    st.builds(lambda pair: Elements(floats(*sorted(pair))), st.tuples(BYTES, BYTES)),
    st.builds(
        lambda numbers: Elements(steps(*numbers)),
        st.lists(st.integers(-(2**15), 2**15 - 1) | st.integers(-9, 9), min_size=1, max_size=4),
    ),
    st.builds(
        Levels,
        st.binary(max_size=20),
        payload=st.none() | NUMBERS.filter(lambda n: n < 2**63),
        used=st.integers(0, 2**16 - 1) | st.sampled_from([2, 4, 6, 12]),
        map_width=st.integers(0, 9),
        widths=st.lists(st.integers(0, 9), max_size=3).map(tuple),
    ),
    st.builds(
        Runs, st.binary(max_size=20), used=st.integers(0, 2**16 - 1) | st.sampled_from([2, 4, 6])
    ),
    crafted_runs(),
)


@FUZZ
@given(st.lists(TENSORS, max_size=3), st.lists(SEGMENTS, max_size=5), st.data())
def test_built_files(tensors, segments, data):
    """Files put together from hostile numbers give tensors or a FormatError."""
    names = tuple(f"t{i}" for i in range(len(tensors)))
    version = 1, data.draw(st.integers(0, 1))
    aliases = tuple(data.draw(st.lists(st.sampled_from(["a", "b", "t0"]), max_size=2)))
    targets = tuple(data.draw(st.integers(0, 3)) for _ in aliases)
    parts = names, aliases, targets, tuple(tensors), tuple(segments)
    read_and_write(File(*parts, version=version).build())


@FUZZ
@given(NUMBERS, NUMBERS, st.lists(st.tuples(NUMBERS, st.binary(max_size=5)), max_size=4))
def test_built_names(tensors, aliases, names):
    """Indexes with hostile counts and lengths of names are refused."""
    rows = [leb(size) + text for size, text in names]
    assert not read_repaired(leb(tensors + 1) + leb(aliases) + b"".join(rows), b"")


def test_seeds_are_sound():
    """The files that are edited are sound before, with their checksums and with repaired ones."""
    for data in SEEDS:
        assert read_and_write(data)
        assert read_repaired(*take_apart(data))
    assert np.frombuffer(name("ab"), np.uint8).tolist() == [2, 97, 98]

"""Every known attack is refused with a clear error, before memory is spent on it."""

import tracemalloc

import numpy as np
import pytest

from diffq.errors import FormatError
from diffq.format.container import decode
from diffq.format.reader import Reader, default_budget
from tests.format import hostile, hostile_runs, hostile_steps
from tests.format.craft import (
    FLOAT32,
    TOTAL,
    Elements,
    File,
    Levels,
    Runs,
    chunk,
    floats,
    frame,
    frequencies,
    grid,
    in_runs,
    raw,
    stepped,
)
from tests.format.hostile import LEVELS, PARAMETERS, SPLIT, SPLIT_FIRST

CASES = hostile.CASES | hostile_runs.CASES | hostile_steps.CASES
MOST_MEMORY = 16_000_000


def read_everything(data):
    """Reads a file in every way that there is."""
    reader = Reader(data)
    for name in reader.entries:
        reader.stored_bytes(name)
    decoded = decode(data)
    reader.verify()
    reader.values_of()
    return decoded


def read_values(data):
    """Reads values where there are any, and raw tensors."""
    reader = Reader(data)
    reader.values_of()
    reader.records(name for name, entry in reader.entries.items() if entry.kind == "raw")


@pytest.mark.parametrize("case", CASES)
def test_attack(case):
    """The error names the rule that the file breaks, and takes less than 16 MB to find."""
    data, rule = CASES[case]
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=f"(?s){rule}"):
            read_everything(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MOST_MEMORY


@pytest.mark.parametrize("case", CASES)
def test_verify_meets_the_same_checks(case):
    """verify, which keeps nothing of what it decodes, refuses what reading refuses."""
    data, rule = CASES[case]
    with pytest.raises(FormatError, match=f"(?s){rule}"):
        Reader(data).verify()


@pytest.mark.parametrize("case", CASES)
def test_values_meet_the_same_checks(case):
    """The fast way to values refuses what is wrong with levels and parameters."""
    data, rule = CASES[case]
    with pytest.raises(FormatError, match=f"(?s){rule}"):
        read_values(data)


def test_message_has_rule_got_and_remedy():
    """An error gives the place, the rule, what was got, and what to do."""
    with pytest.raises(FormatError) as error:
        read_everything(CASES["bitwidth below min bits"][0])
    assert str(error.value) == (
        "tensor 'w': bitwidths are at least 3, got 2. The file is damaged or was not written by "
        "diffq; fetch it again or write it anew."
    )


def test_crafted_file_is_sound():
    """What the cases are made from is a sound file: each breaks one rule alone."""
    records, _, _ = read_everything(File().build())
    assert records["w"].levels.tolist() == [0, 1, 2, 3, 3, 2, 1, 0]
    assert records["w"].values().tolist() == [0, 1, 2, 3, 3, 2, 1, 0]


@pytest.mark.parametrize("lanes", [1, 3, 8, 12])
def test_crafted_runs_are_sound(lanes):
    """So is the file in rANS, whatever its number of lanes."""
    runs = Runs(in_runs(hostile_runs.RUN, lanes=lanes))
    records, _, _ = read_everything(File(segments=(PARAMETERS, runs), version=(1, 1)).build())
    assert records["w"].levels.tolist() == [0, 1, 2, 3, 3, 2, 1, 0]


@pytest.mark.parametrize("count", [1, 61])
def test_unknown_optional_chunks_are_skipped(count):
    """Chunks whose tag starts with a small letter are skipped, up to 64 chunks in all."""
    sound = read_everything(File().build())[0]["w"]
    extra = (chunk(b"evil", b"anything"),) * count
    for parts in ({"extra": extra}, {"chunks": ("INDX", "DATA", *extra, "DONE")}):
        assert (
            read_everything(File(**parts).build())[0]["w"].levels.tolist() == sound.levels.tolist()
        )


def test_group_over_two_segments():
    """A group that fills two segments is read if both say the same bitwidth."""
    second = Levels(b"\xe4\x1b")
    data = File(tensors=(SPLIT,), segments=(PARAMETERS, SPLIT_FIRST, second)).build()
    record = Reader(data).record("w")
    assert record.bits.tolist() == [2]
    assert record.levels[-8:].tolist() == [0, 1, 2, 3, 3, 2, 1, 0]
    assert Reader(data).values("w")[-8:].tolist() == [0, 1, 2, 3, 3, 2, 1, 0]


def test_part_joins_a_segment_of_a_long_part():
    """A part may join any segment of its kind that has room, the last of a long part too."""
    data = File(
        names=("a", "b"),
        tensors=(raw(((1 << 22) + 2,), dtype=1), raw((3,), dtype=1, place=1)),
        segments=(Elements(frame(bytes(1 << 22))), Elements(b"abcde")),
    ).build()
    records, _, _ = read_everything(data)
    assert records["a"].data[-2:].tobytes() == b"ab"
    assert records["b"].data.tobytes() == b"cde"


def test_largest_honest_bomb():
    """A tiny file of constant weights is read within the memory of a hostile one."""
    zeros = Levels(frame(bytes(1 << 18)), payload=1 << 18)
    tensor = grid((2 << 20,), 2 << 20)
    data = File(tensors=(tensor,), segments=(PARAMETERS, zeros, zeros)).build()
    assert len(data) < 1024
    tracemalloc.start()
    try:
        values = Reader(data, threads=2).values("w")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert not values.any()
    assert peak < MOST_MEMORY


@pytest.mark.parametrize(("item", "dtype"), [(1, 1), (4, FLOAT32), (16, 14)])
def test_largest_bomb_of_elements(item, dtype):
    """A file of 1 KiB that decodes to as many elements as it may stays within that memory."""
    count, most = default_budget(1024) // item, (1 << 22) // item
    sizes = [min(most, count - start) for start in range(0, count, most)]
    segments = tuple(Elements(frame(bytes(size * item))) for size in sizes)
    parts = {"tensors": (raw((count,), dtype=dtype),), "segments": segments}
    fill = 1024 - len(File(**parts).build()) - len(chunk(b"fill"))
    data = File(**parts, extra=(chunk(b"fill", bytes(fill)),)).build()
    assert len(data) == 1024
    for read in (lambda: Reader(data).verify(), lambda: Reader(data).records()):
        tracemalloc.start()
        try:
            read()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < MOST_MEMORY


def test_largest_bomb_of_steps():
    """A tiny file with as many steps as it may have is read within that memory."""
    count, most = default_budget(0) // 7, 1 << 20
    sizes = [most, count - most]
    parts = [Elements(frame(bytes(2 * count)))]
    parts += [Levels(frame(bytes(-(-size // 4))), payload=-(-size // 4)) for size in sizes]
    data = File(tensors=(stepped((count,), 1),), segments=tuple(parts), version=(1, 1)).build()
    assert len(data) < 1024
    for read in (lambda: Reader(data).verify(), lambda: Reader(data).values("w")):
        tracemalloc.start()
        try:
            read()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < MOST_MEMORY


@pytest.mark.parametrize("columns", [0, 1, 1 << 10, 1 << 19])
def test_largest_bomb_in_rans(columns):
    """A tiny file whose levels, classes and lanes take all that rANS can is read likewise."""
    count = 1 << 20
    tables = [frequencies({1: TOTAL})] * 2
    stored = in_runs(states=[TOTAL] * 64, columns=(columns,), bounds=(0, 30), tables=tables)
    segments = (PARAMETERS, Runs(stored), Runs(stored))
    data = File(tensors=(grid((2 * count,), 2 * count),), segments=segments, version=(1, 1)).build()
    assert len(data) < 1024
    tracemalloc.start()
    try:
        values = Reader(data).values("w")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (values == 1).all()
    assert peak < MOST_MEMORY


def test_negative_zero_of_a_constant():
    """A constant of -0.0 decodes to what level * step + low gives, 0.0."""
    data = File(
        tensors=(grid(flags=2, places=(0,)),), segments=(Elements(floats(-0.0, -0.0)),)
    ).build()
    reader = Reader(data)
    assert not np.signbit(reader.record("w").values()).any()
    assert not np.signbit(reader.values("w")).any()


def test_levels_without_weights():
    """A grid without weights has parameters and no levels."""
    data = File(tensors=(grid((0, 5), 1, places=(0,)),), segments=(PARAMETERS,)).build()
    assert read_everything(data)[0]["w"].values().shape == (0, 5)
    assert LEVELS.stored == b"\xe4\x1b"

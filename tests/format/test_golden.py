"""Files of all versions are read for ever, by diffq and by a reader made from the specification."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import zstandard

from diffq.format.chunks import FILL, HEADER_BYTES
from diffq.format.container import decode, encode
from diffq.format.reader import Reader
from diffq.format.records import RawRecord
from tests.format.make_golden import FOLDER, MODELS
from tests.format.samples import expected_array

ROOT = Path(__file__).parents[2]
GOLDEN = sorted(path.stem for path in FOLDER.glob("*.diffq"))
BUDGET = 1 << 26
# The version of zstd that the golden files were written with.
ZSTD = (1, 5, 7)


@pytest.fixture(scope="module")
def example():
    """examples/decode_without_diffq.py as a module."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import decode_without_diffq
    finally:
        sys.path.pop(0)
    return decode_without_diffq


def expected(name):
    """The arrays, aliases and metadata of a golden file."""
    with np.load(FOLDER / f"{name}.npz") as stored:
        text = json.loads(str(stored["text"]))
        arrays = {key[7:]: stored[key] for key in stored.files if key.startswith("tensor:")}
    return arrays, text["aliases"], text["metadata"]


def assert_arrays_equal(arrays, wanted):
    """Two models have the same names, and arrays equal to the bit."""
    assert list(arrays) == list(wanted)
    for name, array in wanted.items():
        assert arrays[name].dtype == array.dtype, name
        assert arrays[name].shape == array.shape, name
        assert arrays[name].tobytes() == array.tobytes(), name


def test_there_are_golden_files():
    """The golden files that the other tests go through are there."""
    assert {*MODELS, "unknown_chunk"} <= set(GOLDEN)


@pytest.mark.parametrize("name", GOLDEN)
def test_diffq_reads(name):
    """diffq decodes a golden file to the arrays that were kept with it."""
    arrays, aliases, metadata = expected(name)
    data = (FOLDER / f"{name}.diffq").read_bytes()
    records, read_aliases, read_metadata = decode(data, BUDGET)
    assert_arrays_equal({key: expected_array(r) for key, r in records.items()}, arrays)
    assert (read_aliases, read_metadata) == (aliases, metadata)
    values = Reader(data, BUDGET).values_of()
    levels = {key: r.values() for key, r in records.items() if not isinstance(r, RawRecord)}
    assert_arrays_equal(values, levels)


@pytest.mark.parametrize("name", GOLDEN)
def test_versions(name):
    """Files with a segment in rANS or a stepped tensor are of version 1.1, all others of 1.0."""
    data = (FOLDER / f"{name}.diffq").read_bytes()
    reader = Reader(data, BUDGET)
    in_runs = any("rans" in reader.codings(tensor) for tensor in reader.entries)
    stepped = any(entry.kind == "stepped" for entry in reader.entries.values())
    assert data[8:10] == bytes([1, in_runs or stepped])
    assert in_runs == (name.startswith("runs") or name == "steps_runs")
    assert stepped == name.startswith("steps")


@pytest.mark.parametrize("name", GOLDEN)
def test_example_reads(name, example):
    """The reader that was written from docs/format.md alone decodes it to the same arrays."""
    arrays, aliases, metadata = expected(name)
    decoded = example.decode((FOLDER / f"{name}.diffq").read_bytes())
    assert_arrays_equal(decoded[0], arrays)
    assert decoded[1:] == (aliases, metadata)


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.skipif(zstandard.ZSTD_VERSION != ZSTD, reason="another zstd finds other bytes")
def test_diffq_still_writes(name):
    """What was decoded is encoded to the same bytes as when the file was made.

    Two are older than the chunk `fill`, which is left out of the comparison.
    """
    data = (FOLDER / f"{name}.diffq").read_bytes()
    written, end = encode(*decode(data, BUDGET), codec=MODELS[name][-1]), data[-HEADER_BYTES:]
    content, found, zeros = written.removesuffix(end).partition(FILL)
    assert content + end == data
    assert bool(found) == (name in ("long", "product_long"))
    assert not any(zeros[HEADER_BYTES - len(FILL) :])


def test_example_runs_as_a_script(example, tmp_path, monkeypatch, capsys):
    """The example prints what a file holds and writes its arrays."""
    target = tmp_path / "arrays.npz"
    command = ["decode_without_diffq.py", str(FOLDER / "example.diffq"), str(target)]
    monkeypatch.setattr(sys, "argv", command)
    example.main()
    assert re.search(r"w +float32 +\[3, 4\]", capsys.readouterr().out)
    with np.load(target) as arrays:
        assert_arrays_equal(dict(arrays), expected("example")[0])


def test_example_notices_damage(example):
    """The example refuses a file with a damaged byte."""
    data = bytearray((FOLDER / "example.diffq").read_bytes())
    data[-20] ^= 1
    with pytest.raises(ValueError, match="damaged"):
        example.decode(bytes(data))


def test_example_needs_no_diffq():
    """The example imports NumPy, zstandard and the standard library alone."""
    source = (ROOT / "examples" / "decode_without_diffq.py").read_text()
    imported = set(re.findall(r"^(?:import|from) ([a-z_]+)", source, re.MULTILINE))
    assert imported - sys.stdlib_module_names == {"numpy", "zstandard"}


def test_bytes_of_the_specification():
    """The file that docs/format.md takes apart is what diffq writes, byte for byte."""
    page = (ROOT / "docs" / "format.md").read_text()
    rows = re.findall(r"^    [0-9a-f]{4}  ((?:[0-9a-f]{2} ?)+)$", page, re.MULTILINE)
    assert bytes.fromhex("".join(rows)) == encode(*MODELS["example"])

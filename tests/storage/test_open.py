"""Files that are open: lazy, without torch, closed for good, and clear about what is wrong."""

import gc
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import diffq
from tests.holder import Holder, bits_of
from tests.models import QUANTIZERS, Recurrent, TiedModules, mlp, seeded

ROOT = Path(__file__).parents[2]
NEEDS_PROC = pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs /proc")
READERS = [diffq.open, diffq.verify, diffq.load, lambda path: diffq.load(path, mlp())]


@pytest.fixture
def tied(tmp_path):
    """The file of a model with a tie, and metadata."""
    path = tmp_path / "tied.diffq"
    quantizer = diffq.QATQuantizer(TiedModules(), min_size=0, bits=4, exclude=["body.bias"])
    diffq.save(quantizer, path, metadata={"epoch": 3})
    return path


def _is_open(path):
    links = [os.path.join("/proc/self/fd", number) for number in os.listdir("/proc/self/fd")]
    return str(path) in {os.readlink(link) for link in links if os.path.islink(link)}


def _damage(path, place=-20):
    """Flips a bit in the data of a file; by default in the last segment."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


# --- A look inside ---


def test_names_of_an_open_file(tied):
    """A file is a mapping of all names, aliases included, in the order of the state dict."""
    names = list(TiedModules().state_dict())
    with diffq.open(tied) as stored:
        assert sorted(stored) == sorted(names)
        assert list(stored.entries) == [name for name in names if name != "head.weight"]
        assert stored.aliases == {"head.weight": "embed.weight"}
        assert len(stored) == len(names) == len(list(stored.keys()))
        assert all(name in stored for name in names)
        assert "head" not in stored
        assert 5 not in stored
        assert stored.path == tied
        assert stored.size == os.path.getsize(tied)
        assert stored.metadata == {"epoch": 3}
        assert "3 tensors" in repr(stored)


def test_values_of_an_open_file(tied):
    """Each name, an alias too, gives the tensor that `load` gives, as a copy of its own."""
    expected = diffq.load(tied)
    with diffq.open(tied) as stored:
        assert {name: bits_of(tensor) for name, tensor in stored.items()} == {
            name: bits_of(tensor) for name, tensor in expected.items()
        }
        stored["embed.weight"].zero_()
        stored["body.bias"].zero_()
        assert bits_of(stored["head.weight"]) == bits_of(expected["embed.weight"])
        assert bits_of(stored["body.bias"]) == bits_of(expected["body.bias"])


@pytest.mark.parametrize("method", QUANTIZERS)
def test_bits_and_stored_bytes(method, tmp_path):
    """Bits are those of the quantizer, and the bytes of all tensors are those of the data."""
    quantizer = QUANTIZERS[method](seeded(Recurrent))
    diffq.save(quantizer, tmp_path / "m.diffq", "packed")
    with diffq.open(tmp_path / "m.diffq") as stored:
        for name, bits in quantizer.bits().items():
            assert np.array_equal(stored.bits(name), bits.numpy())
            assert stored.bits(name).dtype == np.uint8
        total = sum(stored.stored_bytes(name) for name in stored.entries)
        assert total == stored.size - stored.reader.overhead
        assert stored.stored_bytes("head.weight") > 0


def test_names_that_are_not_stored(tied):
    """An unknown name is a KeyError, as of a dict; bits need levels."""
    with diffq.open(tied) as stored:
        with pytest.raises(KeyError, match="nothing"):
            stored["nothing"]
        assert stored.get("nothing") is None
        for ask in (stored.bits, stored.stored_bytes):
            with pytest.raises(diffq.ConfigError, match="nothing"):
                ask("nothing")
        with pytest.raises(diffq.ConfigError, match=r"body\.bias"):
            stored.bits("body.bias")


@pytest.mark.parametrize("kind", [str, Path])
def test_kinds_of_paths(kind, tied):
    """A path is a str or anything with __fspath__."""
    with diffq.open(kind(tied)) as stored:
        assert stored.path == tied
    diffq.verify(kind(tied))
    diffq.load(kind(tied), TiedModules())


@pytest.mark.parametrize("threads", [1, 2, 9])
def test_threads_of_an_open_file(threads, tied):
    """Any number of threads decodes the same tensors."""
    expected = diffq.load(tied)
    with diffq.open(tied, threads=threads) as stored:
        assert all(bits_of(stored[name]) == bits_of(expected[name]) for name in stored)


# --- Lazy ---


@pytest.mark.parametrize("codec", ["zstd", "rans", "packed"])
def test_one_tensor_alone(codec, tmp_path):
    """Damage in one tensor is met when it is asked for; a tensor elsewhere comes back sound."""
    path = tmp_path / "m.diffq"
    quantizer = diffq.QATQuantizer(
        Holder({"first": torch.randn(600, 600), "last": torch.randn(600, 600)}), min_size=0
    )
    diffq.save(quantizer, path, codec)
    expected = diffq.load(path)
    _damage(path, -2000)
    with diffq.open(path) as stored:
        assert bits_of(stored["first"]) == bits_of(expected["first"])
        with pytest.raises(diffq.FormatError, match="last"):
            stored["last"]
        # The error leaves the file in use.
        assert bits_of(stored["first"]) == bits_of(expected["first"])
    with pytest.raises(diffq.FormatError, match="last"):
        diffq.verify(path)


def test_a_budget_for_open_files(tied):
    """A budget below what the tensors take is refused on opening; one that fits is not."""
    for read in (diffq.open, diffq.verify, lambda path, budget: diffq.load(path, budget=budget)):
        with pytest.raises(diffq.FormatError, match="budget of 100"):
            read(tied, budget=100)
    diffq.open(tied, budget=10_000).close()


_WITHOUT_TORCH = """
import sys, diffq
diffq.verify(sys.argv[1])
with diffq.open(sys.argv[1]) as stored:
    assert len(stored) == 4, list(stored)
    assert stored.aliases == {"head.weight": "embed.weight"}
    assert stored.metadata == {"epoch": 3}
    assert set(stored.bits("body.weight")) == {4}
    assert stored.stored_bytes("body.weight") > 0
    assert stored.reader.values("body.weight").shape == (16, 16)
    try:
        stored["nothing"]
    except KeyError:
        pass
    assert "torch" not in sys.modules
    stored["body.weight"]
    assert "torch" in sys.modules
"""


def test_open_needs_no_torch(tied):
    """Names, bits, sizes, NumPy values and `verify` come without an import of torch."""
    subprocess.run([sys.executable, "-c", _WITHOUT_TORCH, tied], cwd=ROOT, check=True, timeout=120)


# --- Closed ---


def test_tensors_outlive_the_file(tied):
    """Tensors and bits that were decoded stay after the file is closed and deleted."""
    expected = diffq.load(tied)
    with diffq.open(tied) as stored:
        tensors, bits = dict(stored), stored.bits("body.weight")
    tied.unlink()
    gc.collect()
    assert all(bits_of(tensors[name]) == bits_of(expected[name]) for name in expected)
    assert set(bits) == {4}


def test_closed_twice(tied):
    """Closing again does nothing; what a closed file knows of its index stays."""
    stored = diffq.open(tied)
    stored.close()
    stored.close()
    with diffq.open(tied) as other:
        other.close()
    assert len(stored) == 4
    assert stored.metadata == {"epoch": 3}


@pytest.mark.parametrize("ask", [lambda s: s["body.weight"], lambda s: s.bits("body.weight")])
def test_closed_files_do_not_decode(ask, tied):
    """A tensor of a closed file is a ValueError that says so, as for Python's own files."""
    stored = diffq.open(tied)
    stored.close()
    with pytest.raises(ValueError, match="closed"):
        ask(stored)


@NEEDS_PROC
def test_close_lets_go_of_the_file(tied):
    """A file is open until it is closed; verify and load close theirs."""
    with diffq.open(tied) as stored:
        stored["body.weight"]
        assert _is_open(tied)
    assert not _is_open(tied)
    diffq.verify(tied)
    diffq.load(tied)
    diffq.load(tied, TiedModules())
    assert not _is_open(tied)


@NEEDS_PROC
def test_errors_let_go_of_the_file(tied):
    """After an error on opening, decoding or in the user's block, nothing stays open."""
    with pytest.raises(ZeroDivisionError), diffq.open(tied):
        raise ZeroDivisionError
    assert not _is_open(tied)
    with pytest.raises(diffq.FormatError):
        diffq.open(tied, budget=1)
    _damage(tied)
    for read in READERS[1:]:
        with pytest.raises((diffq.FormatError, diffq.MismatchError)):
            read(tied)
    _damage(tied, 5)
    with pytest.raises(diffq.FormatError):
        diffq.open(tied)
    assert not _is_open(tied)


def test_an_open_file_outlives_its_replacement(tied):
    """A file that is open keeps its tensors when another is saved in its place or it is deleted."""
    expected = diffq.load(tied)
    with diffq.open(tied) as stored:
        diffq.save(diffq.QATQuantizer(mlp(), min_size=0), tied)
        assert bits_of(stored["body.weight"]) == bits_of(expected["body.weight"])
        tied.unlink()
        assert bits_of(stored["embed.weight"]) == bits_of(expected["embed.weight"])


# --- No file ---


@pytest.mark.parametrize("read", READERS)
def test_missing_files(read, tmp_path):
    """A path without a file is a FileNotFoundError that names it."""
    with pytest.raises(FileNotFoundError, match=r"nothing\.diffq"):
        read(tmp_path / "nothing.diffq")


@pytest.mark.parametrize("read", READERS)
def test_folders(read, tmp_path):
    """A folder is an OSError that names it."""
    with pytest.raises(OSError, match=tmp_path.name):
        read(tmp_path)


@pytest.mark.parametrize("read", READERS)
def test_empty_files(read, tmp_path):
    """An empty file is a FormatError that says so."""
    path = tmp_path / "empty.diffq"
    path.touch()
    with pytest.raises(diffq.FormatError, match="empty"):
        read(path)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    "data", [b"x", b"\0" * 64, b"PK\x03\x04" + b"\0" * 60, pickle.dumps({"a": 1})]
)
def test_other_files(read, data, tmp_path):
    """A file of something else is a FormatError."""
    path = tmp_path / "other"
    path.write_bytes(data)
    with pytest.raises(diffq.FormatError):
        read(path)


def test_save_to_no_folder(tmp_path):
    """Saving into a folder that does not exist is a FileNotFoundError, and makes nothing."""
    quantizer = diffq.QATQuantizer(mlp(), min_size=0)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        diffq.save(quantizer, tmp_path / "nowhere" / "m.diffq")
    with pytest.raises(OSError, match=tmp_path.name):
        diffq.save(quantizer, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert not [path for path in tmp_path.parent.iterdir() if path.suffix == ".tmp"]

"""Open files: cut or changed by others, in memory, and read from streams."""

import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import diffq
from tests.holder import Holder, all_bits, bits_of, blank
from tests.models import TiedModules, mlp

ROOT = Path(__file__).parents[2]
READERS = [diffq.open, diffq.verify, diffq.load, lambda file: diffq.load(file, TiedModules())]


@pytest.fixture
def path(tmp_path):
    """The file of a model with a tie."""
    diffq.save(diffq.QATQuantizer(TiedModules(), min_size=0, bits=4), tmp_path / "m.diffq")
    return tmp_path / "m.diffq"


# --- Changed while it is open ---

_CUT = """
import os, sys, diffq
with diffq.open(sys.argv[1]) as stored:
    os.truncate(sys.argv[1], int(sys.argv[2]))
    for read in (lambda: stored["w"], lambda: stored.bits("w"), stored.reader.verify):
        try:
            read()
        except diffq.FormatError as error:
            assert "must stay as it is" in str(error), error
        else:
            raise AssertionError("read what is gone")
"""


@pytest.mark.parametrize("left", [0, 4096, 100_000])
def test_a_file_that_is_cut_while_open(left, tmp_path):
    """Reading what is gone of an open file is a FormatError; the process lives."""
    path = tmp_path / "m.diffq"
    model = Holder({"w": torch.randn(300, 300)})
    assert diffq.save(diffq.QATQuantizer(model, min_size=0, bits=15), path, "packed") > 150_000
    run = [sys.executable, "-c", _CUT, str(path), str(left)]
    subprocess.run(run, cwd=ROOT, check=True, timeout=120)


def test_a_file_that_is_cut_while_it_is_loaded(path, monkeypatch):
    """A file that another process empties during a load is loaded whole, or not at all."""
    expected = all_bits(diffq.load(path, TiedModules()))
    real = diffq.storage.filling.match

    def cut(*args):
        os.truncate(path, 0)
        return real(*args)

    monkeypatch.setattr("diffq.storage.filling.match", cut)
    assert all_bits(diffq.load(path, TiedModules())) == expected


def test_a_file_that_is_overwritten_while_open(path):
    """Bytes that change under an open file fail their checksum."""
    data = path.read_bytes()
    with diffq.open(path) as stored:
        with path.open("r+b") as file:
            file.write(bytes(len(data)))
        with pytest.raises(diffq.FormatError, match="checksum"):
            stored["body.weight"]


# --- Files that are open already ---


@pytest.mark.parametrize("buffering", [-1, 0])
def test_open_files_are_read(buffering, path):
    """Files on disk and in memory, buffered or not, are read as their paths are."""
    expected = all_bits(diffq.load(path, TiedModules()))
    state = {name: bits_of(tensor) for name, tensor in diffq.load(path).items()}
    for make in (lambda: io.BytesIO(path.read_bytes()), lambda: path.open("rb", buffering)):
        with make() as file:
            diffq.verify(file)
        with make() as file:
            assert {n: bits_of(t) for n, t in diffq.load(file).items()} == state
        with make() as file:
            assert all_bits(diffq.load(file, blank(TiedModules()))) == expected
        with make() as file, diffq.open(file) as stored:
            assert {name: bits_of(stored[name]) for name in stored} == state
            assert stored.path is None
            assert "open file" in repr(stored)


def test_save_and_load_in_memory():
    """A model goes through memory, after other bytes that the file holds already."""
    file = io.BytesIO(b"head")
    file.seek(4)
    quantizer = diffq.QATQuantizer(mlp(), min_size=0)
    diffq.save(quantizer, file)
    file.seek(4)
    loaded = diffq.load(file, blank(mlp()))
    assert all_bits(loaded) == all_bits(quantizer.detach(quantized=True))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("read", READERS)
def test_pipes_are_read(read, path, tmp_path):
    """A named pipe is read as the file that comes out of it."""
    os.mkfifo(tmp_path / "pipe")
    data = path.read_bytes()
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(data,), daemon=True)
    writer.start()
    read(tmp_path / "pipe")
    writer.join(30)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("make", [lambda: io.StringIO("x"), lambda: None, lambda: 7, lambda: b"x"])
def test_what_is_no_binary_file(read, make):
    """A text file and anything else is refused, with what to pass."""
    with pytest.raises(diffq.ConfigError, match="rb"):
        read(make())


@pytest.mark.parametrize("read", READERS)
def test_an_open_file_that_is_empty(read):
    """An open file without bytes left is a FormatError."""
    with pytest.raises(diffq.FormatError, match="empty"):
        read(io.BytesIO())

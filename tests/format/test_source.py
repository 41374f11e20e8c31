"""The bytes of a file, in memory or on the disk."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffq.errors import FormatError
from diffq.format.container import encode
from diffq.format.reader import Reader
from diffq.format.source import FileSource, MemorySource
from tests.format.craft import File, chunk
from tests.format.samples import as_stored, assert_same, small_model


@pytest.fixture
def path(tmp_path):
    """A file of a small model."""
    (tmp_path / "m.diffq").write_bytes(encode(small_model()))
    return tmp_path / "m.diffq"


@pytest.fixture(params=["preadv", "seek"])
def read_by(request, monkeypatch):
    """Reads as systems with and without preadv do."""
    if request.param == "seek":
        monkeypatch.delattr(os, "preadv", raising=False)
    elif not hasattr(os, "preadv"):
        pytest.skip("this system has no preadv")


@pytest.mark.usefixtures("read_by")
def test_files_are_read_like_memory(path):
    """A file on the disk decodes to the records that it was made of, in several threads too."""
    for threads in (1, 8):
        reader = Reader(FileSource(path), threads=threads)
        assert reader.size == path.stat().st_size
        reader.verify()
        for name, record in small_model().items():
            assert_same(reader.record(name), as_stored(record))
        reader.close()


@given(st.binary(min_size=1, max_size=50), st.data())
def test_both_sources_give_the_same_bytes(tmp_path_factory, data, draw):
    """Any range of a file has the same bytes in memory and on the disk."""
    path = tmp_path_factory.getbasetemp() / "bytes"
    path.write_bytes(data)
    start = draw.draw(st.integers(0, len(data)))
    stop = draw.draw(st.integers(start, len(data)))
    on_disk, in_memory = FileSource(path), MemorySource(data)
    assert on_disk.size == in_memory.size == len(data)
    assert bytes(on_disk.read(start, stop)) == in_memory.read(start, stop) == data[start:stop]
    on_disk.close()


@pytest.mark.usefixtures("read_by")
@pytest.mark.parametrize("left", [0, 100])
def test_a_file_that_is_cut(left, path):
    """What is gone of an open file is an error that says where the file ends."""
    source = FileSource(path)
    size = source.size
    os.truncate(path, left)
    with pytest.raises(FormatError, match=f"must stay as it is .* byte {left} of {size}"):
        source.read(0, size)
    source.close()


def test_reads_that_come_in_parts(path, monkeypatch):
    """A system that hands out fewer bytes than were asked for is asked again."""
    real = FileSource._read_into
    monkeypatch.setattr(FileSource, "_read_into", lambda s, data, start: real(s, data[:7], start))
    source = FileSource(path)
    assert bytes(source.read(0, source.size)) == path.read_bytes()
    source.close()


def test_a_closed_file(path):
    """A closed source reads no file that was opened since."""
    source = FileSource(path)
    source.close()
    with path.open("rb"), pytest.raises(ValueError, match="closed"):
        source.read(0, 1)


@pytest.mark.parametrize("sound", [True, False])
def test_long_chunks_that_are_skipped(sound):
    """A chunk that a reader skips is checked to its last byte, however long it is."""
    body = bytes(3 << 20)
    data = bytearray(File(extra=(chunk(b"evil", body),)).build())
    if sound:
        Reader(data).verify()
        return
    data[data.index(b"evil") + 16 + len(body) - 1] ^= 1
    with pytest.raises(FormatError, match="evil: its checksum"):
        Reader(data)

"""Places to write to: what is no regular file is written as a stream or refused, never replaced."""

import codecs
import errno
import io
import os
import socket
import stat
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import diffq
from diffq.cli import main
from diffq.storage import writing
from tests.models import mlp

NEEDS_FIFO = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
NEEDS_LINKS = pytest.mark.skipif(not hasattr(os, "symlink"), reason="needs symbolic links")


@pytest.fixture
def quantizer():
    """A quantizer of a small model."""
    return diffq.QATQuantizer(mlp(), min_size=0)


@pytest.fixture
def data(quantizer):
    """The bytes of its file."""
    buffer = io.BytesIO()
    diffq.save(quantizer, buffer)
    return buffer.getvalue()


@pytest.fixture
def pipe(tmp_path):
    """A named pipe."""
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


@pytest.fixture
def unused(monkeypatch):
    """Fails the test if the model is encoded."""
    monkeypatch.setattr("diffq.storage.save.encode_parts", pytest.fail)


def _fake_mode(monkeypatch, path, kind):
    """Makes a file look like another kind of file to os.stat."""
    real = os.stat

    def fake(file, *args, **options):
        found = real(file, *args, **options)
        if file == path:
            fields = list(found)
            fields[0] = kind | 0o666
            return os.stat_result(fields)
        return found

    monkeypatch.setattr(os, "stat", fake)


def _read_pipe(pipe, action):
    """The bytes that come out of a pipe while `action` runs."""
    got = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()), daemon=True)
    reader.start()
    action()
    reader.join(30)
    return got[0]


# --- Pipes and devices ---


@NEEDS_FIFO
def test_save_to_a_pipe(quantizer, data, pipe):
    """A pipe gets the bytes of the file, and stays a pipe."""
    sizes = []
    got = _read_pipe(pipe, lambda: sizes.append(diffq.save(quantizer, pipe)))
    assert got == data
    assert sizes == [len(data)]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert list(pipe.parent.iterdir()) == [pipe]


@NEEDS_FIFO
@NEEDS_LINKS
def test_save_to_a_link_to_a_pipe(quantizer, data, pipe):
    """A link to a pipe leads to the pipe; both stay."""
    link = pipe.with_name("link")
    link.symlink_to(pipe)
    assert _read_pipe(pipe, lambda: diffq.save(quantizer, link)) == data
    assert link.is_symlink()
    assert stat.S_ISFIFO(pipe.stat().st_mode)


@NEEDS_FIFO
def test_commands_write_to_pipes(pipe, tmp_path, capsys):
    """pack and unpack write to a pipe what they write to a file."""
    torch.save(mlp().state_dict(), tmp_path / "m.pt")
    argv = ["pack", str(tmp_path / "m.pt"), "OUT", "--bits", "4", "--quiet"]
    assert main([str(tmp_path / "m.diffq") if arg == "OUT" else arg for arg in argv]) == 0
    codes = []
    to_pipe = [str(pipe) if arg == "OUT" else arg for arg in argv]
    got = _read_pipe(pipe, lambda: codes.append(main(to_pipe)))
    assert got == (tmp_path / "m.diffq").read_bytes()
    out = pipe.rename(pipe.with_suffix(".pt"))
    unpack = ["unpack", str(tmp_path / "m.diffq"), str(out), "--quiet"]
    got = _read_pipe(out, lambda: codes.append(main(unpack)))
    assert list(torch.load(io.BytesIO(got))) == list(mlp().state_dict())
    assert codes == [0, 0]
    assert capsys.readouterr() == ("", "")
    assert stat.S_ISFIFO(out.stat().st_mode)


@NEEDS_FIFO
def test_a_pipe_without_a_reader(quantizer, pipe, monkeypatch):
    """A pipe that nobody reads is an error that says so, not a program that hangs."""
    monkeypatch.setattr(writing, "_READER_SECONDS", 0)
    with pytest.raises(OSError, match=r"reader.*pipe") as caught:
        diffq.save(quantizer, pipe)
    assert caught.value.errno == errno.ENXIO


@NEEDS_FIFO
def test_a_reader_that_leaves(pipe, capsys):
    """A pipe that is closed before all is read is an error that names it."""

    def leave():
        with pipe.open("rb") as file:
            file.read(1)

    state = {"w": torch.randn(300_000)}
    source = pipe.with_name("m.pt")
    torch.save(state, source)
    reader = threading.Thread(target=leave, daemon=True)
    reader.start()
    assert main(["pack", str(source), str(pipe), "--bits", "8"]) == 1
    reader.join(30)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "closed it" in err
    assert str(pipe) in err


def test_a_character_device(quantizer, data, tmp_path, monkeypatch):
    """What looks like a terminal is written to where it is, without a new file in its place."""
    device = tmp_path / "tty"
    device.touch()
    number = device.stat().st_ino
    _fake_mode(monkeypatch, device, stat.S_IFCHR)
    assert diffq.save(quantizer, device) == len(data)
    monkeypatch.undo()
    assert device.read_bytes() == data
    assert device.stat().st_ino == number


@pytest.mark.parametrize(
    ("kind", "word"), [(stat.S_IFBLK, "block device"), (stat.S_IFSOCK, "socket")]
)
def test_devices_that_are_refused(kind, word, quantizer, tmp_path, monkeypatch, unused):
    """A block device and a socket are refused before the model is encoded, and stay."""
    device = tmp_path / "device"
    device.write_bytes(b"old")
    _fake_mode(monkeypatch, device, kind)
    with pytest.raises(OSError, match=word):
        diffq.save(quantizer, device)
    monkeypatch.undo()
    assert device.read_bytes() == b"old"


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="needs sockets in folders")
def test_a_socket(quantizer, monkeypatch, unused):
    """A socket in a folder is refused, and stays one."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as server:
        path = Path(folder) / "s"
        server.bind(str(path))
        with pytest.raises(OSError, match="socket"):
            diffq.save(quantizer, path)
        assert stat.S_ISSOCK(path.stat().st_mode)


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs /proc")
def test_an_open_file_without_a_name(quantizer, data, tmp_path):
    """A path of /proc to an open file that was deleted writes to that file, and makes no other."""
    with open(tmp_path / "x", "w+b") as file:
        (tmp_path / "x").unlink()
        diffq.save(quantizer, f"/proc/self/fd/{file.fileno()}")
        assert file.read() == data
    assert list(tmp_path.iterdir()) == []


# --- Folders, links, permissions ---


def test_folders_are_refused_before_the_work(quantizer, tmp_path, unused):
    """A folder, and a path in a folder that is missing or a file, are refused at once."""
    (tmp_path / "file").touch()
    for path, error in [
        (tmp_path, IsADirectoryError),
        (tmp_path / "no" / "m.diffq", FileNotFoundError),
        (tmp_path / "file" / "m.diffq", NotADirectoryError),
    ]:
        with pytest.raises(error, match=path.name):
            diffq.save(quantizer, path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@NEEDS_LINKS
def test_links(quantizer, data, tmp_path):
    """A link stays a link, and the file that it leads to is written, also if it was missing."""
    for name, existing in (("old", True), ("new", False)):
        target, link = tmp_path / name, tmp_path / f"{name}.link"
        if existing:
            target.write_bytes(b"old")
        link.symlink_to(target)
        diffq.save(quantizer, link)
        assert link.is_symlink()
        assert target.read_bytes() == data


@NEEDS_LINKS
def test_links_that_lead_nowhere(quantizer, tmp_path, unused):
    """A link in a circle, and one into a folder that is missing, are refused at once."""
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "lost").symlink_to(tmp_path / "no" / "m.diffq")
    for name in ("circle", "lost"):
        with pytest.raises(OSError, match=name):
            diffq.save(quantizer, tmp_path / name)
        assert (tmp_path / name).is_symlink()


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs the permissions of Unix")
@pytest.mark.parametrize("part", ["file", "folder"])
def test_read_only(part, quantizer, unused):
    """A read-only file, and a file in a read-only folder, are refused at once, and stay."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.diffq"
        path.write_bytes(b"old")
        os.chmod(folder, 0o777)
        guarded = path if part == "file" else Path(folder)
        guarded.chmod(0o555)
        # Root may write everywhere.
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            with pytest.raises(PermissionError, match=r"m\.diffq"):
                diffq.save(quantizer, path)
        finally:
            if root:
                os.seteuid(0)
            os.chmod(folder, 0o755)
        assert path.read_bytes() == b"old"


@pytest.mark.parametrize("name", ["é" * 120, "🙂" * 60 + ".diffq", "x" * 255], ids=len)
def test_long_names(name, quantizer, data, tmp_path):
    """Any name that the file system takes can be saved to."""
    diffq.save(quantizer, tmp_path / name)
    assert (tmp_path / name).read_bytes() == data


@pytest.mark.parametrize("command", ["pack", "unpack"])
def test_commands_keep_their_input(command, tmp_path, capsys):
    """A command whose output is its input is refused, and the input stays."""
    torch.save(nn.Linear(4, 4).state_dict(), tmp_path / "m.pt")
    before = (tmp_path / "m.pt").read_bytes()
    bits = ["--bits", "4"] if command == "pack" else []
    path = str(tmp_path / "m.pt")
    assert main([command, path, path, *bits]) == 1
    assert "another file" in capsys.readouterr().err
    assert (tmp_path / "m.pt").read_bytes() == before


@pytest.mark.parametrize("command", ["pack", "unpack"])
def test_commands_refuse_folders_before_the_work(command, tmp_path, capsys, monkeypatch):
    """A command whose output is a folder is refused before its input is read."""
    monkeypatch.setattr("diffq.cli.checkpoint.read_state", pytest.fail)
    (tmp_path / "out.pt").mkdir()
    bits = ["--bits", "4"] if command == "pack" else []
    assert main([command, str(tmp_path / "missing"), str(tmp_path / "out.pt"), *bits]) == 1
    err = capsys.readouterr().err
    assert "got a folder" in err
    assert err.count("\n") == 1


# --- Open files ---


class _Duck:
    """An object with `write` alone, which takes a few bytes at a time and says so."""

    most = 100

    def __init__(self):
        self.taken = bytearray()

    def write(self, data):
        self.taken += bytes(data)[: self.most]
        return min(len(data), self.most)


class _Stream(_Duck, io.RawIOBase):
    """An unbuffered stream that cannot seek, and takes a few bytes at a time."""

    def writable(self):
        return True


class _Silent(_Duck):
    """An object that takes everything, and does not say how much."""

    def write(self, data):
        self.taken += data


class _Truthful(_Silent):
    """An object that takes everything, and says that it did."""

    def write(self, data):
        super().write(data)
        return True


class _Full(_Stream):
    """A stream that takes some bytes, then `end` of each write."""

    end = 0

    def write(self, data):
        return super().write(data) if len(self.taken) < 300 or not len(data) else self.end


class _Waiting(_Full):
    """A stream that does not block: it takes no more, and gives None for that."""

    end = None


class _Miscounting(_Full):
    """A stream that says it took more than it got."""

    end = 10**9


def test_save_to_open_files(quantizer, data, tmp_path):
    """Files in memory, on disk and unbuffered streams get the bytes where they stand."""
    memory = io.BytesIO()
    memory.write(b"head")
    assert diffq.save(quantizer, memory) == len(data)
    assert memory.getvalue() == b"head" + data
    for buffering in (-1, 0):
        with open(tmp_path / "m.diffq", "wb", buffering) as file:
            diffq.save(quantizer, file)
            assert (tmp_path / "m.diffq").read_bytes() == data
            assert not file.closed


@pytest.mark.parametrize("kind", [_Duck, _Stream, _Silent, _Truthful])
def test_writes_that_take_a_part(kind, quantizer, data):
    """However little a file takes at a time, and whatever it returns, it gets each byte once."""
    file = kind()
    assert diffq.save(quantizer, file) == len(data)
    assert file.taken == data
    assert not getattr(file, "closed", False)


@pytest.mark.parametrize("kind", [_Full, _Waiting, _Miscounting])
def test_writes_that_take_nothing(kind, quantizer, data):
    """A file that takes no more is an error, not an endless loop and not half a file in silence."""
    file = kind()
    with pytest.raises(OSError, match="must take at least a byte"):
        diffq.save(quantizer, file)
    assert len(file.taken) >= 300
    assert data.startswith(file.taken)


def test_an_error_is_not_followed_by_a_write(quantizer):
    """After an error nothing more is written: not what the first attempt left over."""
    calls = []

    class Broken(_Stream):
        def write(self, data):
            calls.append(len(data))
            if len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return 0

    with pytest.raises(OSError, match="No space"):
        diffq.save(quantizer, Broken())
    assert len([count for count in calls if count]) == 1


@pytest.mark.parametrize(
    "make",
    [io.StringIO, lambda: io.BufferedReader(io.BytesIO()), lambda: None, lambda: 7, lambda: b"x"],
)
def test_what_is_no_binary_file(make, quantizer, unused):
    """A text file, one open for reading, and anything else are refused at once."""
    with pytest.raises(diffq.ConfigError, match="wb"):
        diffq.save(quantizer, make())


# Names and files that are none


@pytest.mark.parametrize("name", ["", "missing/", "missing/.", "missing/.."])
def test_a_path_without_a_name(name, tmp_path, monkeypatch):
    """A path that ends in no name of a file is refused before the work, and leaves nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diffq.storage.save.encode_parts", pytest.fail)
    with pytest.raises(OSError, match=r"add one|make it first"):
        diffq.save(diffq.QATQuantizer(nn.Linear(4, 4), min_size=0), name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "make",
    [
        lambda path: tempfile.NamedTemporaryFile("w"),  # noqa: SIM115
        lambda path: tempfile.SpooledTemporaryFile(mode="w"),  # noqa: SIM115
        lambda path: codecs.open(str(path), "w", "utf-8"),  # noqa: SIM115
        lambda path: io.BytesIO,
    ],
    ids=["named", "spooled", "codecs", "class"],
)
def test_text_files_of_every_kind(make, tmp_path, monkeypatch):
    """What takes text, or is no file, is refused before the work."""
    monkeypatch.setattr("diffq.storage.save.encode_parts", pytest.fail)
    file = make(tmp_path / "model.diffq")
    with pytest.raises(diffq.ConfigError, match="a path or a binary file"):
        diffq.save(diffq.QATQuantizer(nn.Linear(4, 4), min_size=0), file)


def test_closed_files(tmp_path):
    """A file that was closed is refused as one that is not open for writing."""
    file = (tmp_path / "model.diffq").open("wb")
    file.close()
    with pytest.raises(diffq.ConfigError, match="open for writing"):
        diffq.save(diffq.QATQuantizer(nn.Linear(4, 4), min_size=0), file)

"""Writes that are whole or not at all: killed, out of space, several at once."""

import errno
import io
import os
import random
import select
import signal
import stat
import threading
import time
from contextlib import contextmanager, suppress

import pytest
import torch
from torch import nn

import diffq
from diffq.storage.writing import write_file

NEEDS_FORK = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
FAULTS = ["fdopen", "fsync", "chmod", "replace"]


@pytest.fixture(scope="module")
def states():
    """The quantized states of two models of other sizes."""
    torch.manual_seed(0)
    models = [nn.Linear(300, 200), nn.Linear(150, 250)]
    return [diffq.QATQuantizer(m, min_size=0, bits=5).get_quantized_state() for m in models]


@pytest.fixture(scope="module")
def files(states, tmp_path_factory):
    """The whole files of both states, as bytes."""
    path = tmp_path_factory.mktemp("whole") / "m.diffq"
    whole = []
    for state in states:
        diffq.save(state, path)
        whole.append(path.read_bytes())
    return whole


@pytest.fixture
def saved(states, tmp_path):
    """A file of the first state, alone in its folder."""
    diffq.save(states[0], tmp_path / "m.diffq")
    return tmp_path / "m.diffq"


def _disk_full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _descriptors():
    return len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0


def _untouched(saved, data):
    """Whether the file is the old one, and alone in its folder."""
    diffq.verify(saved)
    return saved.read_bytes() == data and list(saved.parent.iterdir()) == [saved]


@contextmanager
def _forked(work):
    """Runs `work(ready)` in a child process, which calls `ready` once it is under way.

    Gives a pipe that ends with the child; kills the child at the end.
    """
    out, into = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.close(out)
            work(lambda: os.write(into, b"x"))
            status = 0
        finally:
            os._exit(status)
    os.close(into)
    try:
        assert select.select([out], [], [], 60)[0], "the child hangs"
        assert os.read(out, 1) == b"x", "the child failed"
        yield out
    finally:
        os.close(out)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _save_in_turns(states, path):
    """Work of a child: saves the states in turns for ever."""

    def work(ready):
        for turn in range(10**9):
            diffq.save(states[turn % 2], path)
            if turn == 0:
                ready()

    return work


# --- Killed ---


def _kill(count, states, files, folder):
    """Kills a child that saves, `count` times; returns the kills that hit an open write."""
    path, within = folder / "m.diffq", 0
    chance = random.Random(0)
    for _ in range(count):
        with _forked(_save_in_turns(states, path)):
            time.sleep(chance.uniform(0, 0.03))
        diffq.verify(path)
        assert path.read_bytes() in files
        left = [other for other in folder.iterdir() if other != path]
        assert len(left) <= 1
        for other in left:
            assert other.name.startswith(".m.diffq.")
            assert other.name.endswith(".tmp")
            other.unlink()
        within += len(left)
    return within


@NEEDS_FORK
def test_killed_while_saving(states, files, tmp_path):
    """Whenever a process that saves is killed, the file is one of the two that it wrote."""
    _kill(15, states, files, tmp_path)


@pytest.mark.slow
@NEEDS_FORK
def test_killed_300_times(states, files, tmp_path):
    """300 kills at random times leave whole files only; many hit the middle of a write."""
    assert _kill(300, states, files, tmp_path) >= 10


@NEEDS_FORK
@pytest.mark.parametrize("step", ["write", *FAULTS, "replaced", "folder"])
def test_killed_at_each_step(step, states, files, saved):
    """Killed before any system call of a save, the file is the old one; after the last, the new."""

    def kill(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    def parts():
        yield files[1][:1000]
        kill()

    def replaced(one, other, replace=os.replace):
        replace(one, other)
        kill()

    def folder(handle, fsync=os.fsync):
        fsync(handle)
        os.fsync = kill

    def work(ready):
        ready()
        if step == "write":
            write_file(saved, parts())
        elif step == "replaced":
            os.replace = replaced
        elif step == "folder":
            os.fsync = folder
        else:
            setattr(os, step, kill)
        diffq.save(states[1], saved)
        ready()

    with _forked(work) as out:
        assert os.read(out, 1) == b""  # It did not come to the end.
    assert saved.read_bytes() == files[step in ("replaced", "folder")]
    diffq.verify(saved)


# --- Out of space, and other errors of the system ---


@pytest.mark.parametrize("fault", ["fdopen", "fsync", "replace", "write"])
def test_errors_of_the_system(fault, states, files, saved, monkeypatch):
    """An error at any step is raised; the old file is intact, and nothing else is left."""
    open_files = _descriptors()
    if fault == "write":

        class Full(io.FileIO):
            write = _disk_full

        monkeypatch.setattr(os, "fdopen", lambda handle, mode: io.BufferedWriter(Full(handle, "w")))
    else:
        monkeypatch.setattr(os, fault, _disk_full)
    with pytest.raises(OSError, match="No space") as caught:
        diffq.save(states[1], saved)
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert _untouched(saved, files[0])
    if fault != "fdopen":
        assert _descriptors() == open_files
    diffq.save(states[1], saved)
    assert _untouched(saved, files[1])


def test_errors_without_an_old_file(states, tmp_path, monkeypatch):
    """Where there was no file, an error leaves none."""
    monkeypatch.setattr(os, "fsync", _disk_full)
    with pytest.raises(OSError, match="No space"):
        diffq.save(states[0], tmp_path / "m.diffq")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", [0, 1, 10_000])
def test_a_limit_of_the_system(limit, states, files, saved):
    """A write that the kernel really stops, at the limit of file sizes, leaves the old file."""
    resource = pytest.importorskip("resource")
    assert len(files[1]) > limit
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        with pytest.raises(OSError, match="too large") as caught:
            diffq.save(states[1], saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno == errno.EFBIG
    assert _untouched(saved, files[0])


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, SystemExit])
def test_interrupts(error, files, saved):
    """An interrupt while the parts are written leaves the old file, and nothing else."""

    def parts():
        yield files[1][:1000]
        raise error

    with pytest.raises(error):
        write_file(saved, parts())
    assert _untouched(saved, files[0])


def test_errors_while_encoding(saved, files):
    """A model that cannot be stored is refused before anything is written."""
    model = nn.Linear(8, 8)
    quantizer = diffq.QATQuantizer(model, min_size=0)
    with torch.no_grad():
        quantizer.no_optimizer()
        model.weight.fill_(float("nan"))
    with pytest.raises(diffq.WeightError):
        diffq.save(quantizer, saved)
    assert _untouched(saved, files[0])


def test_a_folder_that_cannot_be_synced(states, saved, files, monkeypatch):
    """Where folders cannot be flushed, as on some network disks, the save still succeeds."""
    real = os.fsync

    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    diffq.save(states[1], saved)
    assert _untouched(saved, files[1])


@pytest.mark.skipif(os.name != "posix", reason="needs the modes of Unix")
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666])
@pytest.mark.parametrize("error", [None, errno.EPERM, errno.ENOSYS])
def test_modes(mode, error, files, saved, monkeypatch):
    """The old mode holds from the first byte, and where modes cannot be set, none is wider."""
    saved.chmod(mode)
    seen = []

    def parts():
        seen.extend(stat.S_IMODE(path.stat().st_mode) for path in saved.parent.glob(".*.tmp"))
        yield files[1]

    def chmod(*args):
        raise OSError(error, os.strerror(error))

    if error is not None:
        monkeypatch.setattr(os, "chmod", chmod)
    write_file(saved, parts())
    monkeypatch.undo()
    wanted = [mode] if error is None else [seen[0] & mode]
    assert seen == wanted
    assert [stat.S_IMODE(saved.stat().st_mode)] == wanted
    assert _untouched(saved, files[1])


def test_the_order_of_a_write(states, saved, monkeypatch):
    """The new bytes are on the disk before they take the name, and the name after that."""
    calls = []

    def watched(name, real):
        def call(*args):
            if name == "fsync":
                calls.append("folder" if stat.S_ISDIR(os.fstat(args[0]).st_mode) else "file")
            else:
                calls.append(name)
            return real(*args)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, watched(name, getattr(os, name)))
    diffq.save(states[1], saved)
    assert calls == ["file", "replace", "folder"]


# --- Several at once ---


@NEEDS_FORK
def test_two_processes_at_once(states, files, tmp_path):
    """While two processes save to one path, each look at it sees one whole file."""
    path, seen = tmp_path / "m.diffq", []
    with _forked(_save_in_turns(states, path)), _forked(_save_in_turns(states[::-1], path)):
        # The clock only ends what hangs.
        end = time.monotonic() + 60
        while len(seen) < 100 or len(set(seen)) < 2:
            assert time.monotonic() < end
            seen.append(path.read_bytes())
            diffq.verify(path)
    assert set(seen) == set(files)
    assert path.read_bytes() in files


def test_two_threads_at_once(states, files, tmp_path):
    """Two threads that save to one path leave one whole file, and no other."""
    path, errors = tmp_path / "m.diffq", []

    def work(state):
        try:
            for _ in range(10):
                diffq.save(state, path)
                diffq.verify(path)
                assert path.read_bytes() in files
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(state,)) for state in states]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert path.read_bytes() in files
    assert list(tmp_path.iterdir()) == [path]

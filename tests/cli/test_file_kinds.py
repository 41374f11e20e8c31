"""Files that are no checkpoints: told by their first bytes, in one line, without running them."""

import io
import json
import os
import pickle
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import diffq
from diffq.cli import main


def _zip(*names):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return buffer.getvalue()


def _script():
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.trace(nn.Linear(4, 4), torch.ones(4)), buffer)
    return buffer.getvalue()


def _npz():
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3))
    return buffer.getvalue()


def _npy():
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


KINDS = {
    "torchscript": (_script, "a TorchScript archive", "state_dict()"),
    "package": (
        lambda: _zip("p/.data/extern_modules", "p/data.pkl"),
        "torch.package",
        "state_dict",
    ),
    "export": (lambda: _zip("m/models/model.json"), "torch.export", "state_dict()"),
    "keras": (lambda: _zip("config.json", "model.weights.h5"), "a Keras model", "PyTorch"),
    "npz": (_npz, "a NumPy archive (.npz)", "torch.save"),
    "npy": (_npy, "a NumPy array", "torch.save"),
    "zip": (lambda: _zip("model.pt"), "a zip archive", "Unpack it"),
    "broken zip": (lambda: b"PK\x03\x04rubbish", "a damaged zip archive", "again"),
    "onnx": (lambda: b"\x08\x07\x12\x07pytorch", "an ONNX model", "PyTorch"),
    "onnx graph": (lambda: b"\x08\x0a\x3a\x90\x01", "an ONNX model", "PyTorch"),
    "gguf": (lambda: b"GGUF" + bytes(99), "a GGUF file", "PyTorch"),
    "hdf5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file", "PyTorch"),
    "tensorflow": (lambda: b"\x08\x01\x12\x99\x10", "a TensorFlow model", "PyTorch"),
    "tflite": (lambda: b"\x1c\0\0\0TFL3" + bytes(9), "a TensorFlow Lite model", "PyTorch"),
    "lfs": (lambda: b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS", "git lfs pull"),
    "html": (lambda: b"<!DOCTYPE html><html>", "a web page", "Download"),
    "json": (lambda: json.dumps({"weight_map": {}}).encode(), "JSON text", ".safetensors"),
    "gzip": (lambda: b"\x1f\x8b\x08" + bytes(20), "a gzip archive", "Unpack it"),
    "pickle": (lambda: pickle.dumps({"a": 1}), "a pickle", "state_dict()"),
    "empty": (lambda: b"", "an empty file", "again"),
    "text": (lambda: b"hello", "no model that diffq knows", "torch.save"),
}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a command in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*argv):
        code = main(list(argv))
        return code, *capsys.readouterr()

    return call


def _one_line(err):
    assert err.startswith("diffq: error: ")
    assert err.count("\n") == 1
    assert "\x1b" not in err
    return err


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", ["pack x o --bits 6", "diff x x", "inspect x", "unpack x o.pt"])
def test_other_files(kind, command, run):
    """Each kind is named, with what to do, on one line; nothing is written."""
    make, name, remedy = KINDS[kind]
    Path("x").write_bytes(make())
    code, out, err = run(*command.split())
    assert (code, out) == (1, "")
    assert f"x is {name}" in _one_line(err) or name in err
    assert remedy in err
    assert os.listdir() == ["x"]


def test_verify_names_the_kind(run):
    """verify says of each file what it is."""
    Path("x").write_bytes(_script())
    code, out, _ = run("verify", "x")
    assert code == 1
    assert out.startswith("x: FAILED: x is a TorchScript archive")


@pytest.mark.parametrize("command", ["pack x o --bits 6", "inspect x", "diff x x"])
def test_folders(command, run):
    """A folder is an error that points to a file in it."""
    Path("x").mkdir()
    assert "such as model.safetensors" in _one_line(run(*command.split())[2])
    Path("x/pytorch_model.bin").touch()
    assert f"such as {Path('x', 'pytorch_model.bin')}" in _one_line(run(*command.split())[2])
    Path("x/saved_model.pb").touch()
    assert "a TensorFlow model" in _one_line(run(*command.split())[2])


@pytest.mark.parametrize("zipped", [True, False])
def test_whole_models(zipped, run):
    """A pickled model is named as such, with its classes, and its code does not run."""
    torch.save(nn.Sequential(nn.Linear(4, 4)), "x", _use_new_zipfile_serialization=zipped)
    code, _, err = run("pack", "x", "o", "--bits", "6")
    assert code == 1
    assert "model.state_dict()" in _one_line(err)
    assert "weights_only" in err
    if zipped:
        assert "a whole pickled model" in err
        assert "torch.nn.modules" in err


@pytest.mark.parametrize("zipped", [True, False])
def test_other_kinds_of_diffq(zipped, run):
    """inspect, verify and unpack point from a checkpoint to pack."""
    torch.save({"w": torch.ones(3)}, "x.pt", _use_new_zipfile_serialization=zipped)
    for command in ("inspect x.pt", "unpack x.pt o.pt"):
        err = _one_line(run(*command.split())[2])
        assert "x.pt is a torch checkpoint, not a file of diffq" in err
        assert "diffq pack" in err


@pytest.mark.parametrize("command", ["inspect", "pack"])
def test_files_of_the_earlier_package(command, run):
    """A file of the earlier package points to diffq convert."""
    golden = sorted((Path(__file__).parents[1] / "legacy" / "golden").iterdir())
    named = [path for path in golden if b"diffq.diffq\n" in _pickle_of(path)]
    assert named
    for path in named:
        argv = [command, str(path)] + ["o", "--bits", "6"] * (command == "pack")
        err = _one_line(run(*argv)[2])
        assert "a file of the earlier diffq package" in err
        assert "diffq convert" in err


def _pickle_of(path):
    if not zipfile.is_zipfile(path):
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith("data.pkl")]
        return b"".join(archive.read(name) for name in names)


def test_names_with_escapes(run):
    """What a terminal would obey in a name of a class or a file is spelled out."""
    name = "x\x1b[31m.pt"
    Path(name).write_bytes(b"hello")
    assert "x\\x1b[31m.pt" in _one_line(run("pack", name, "o", "--bits", "6")[2])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_as_a_checkpoint(run):
    """A checkpoint in a pipe is refused at once, because it cannot be read twice."""
    os.mkfifo("x")
    assert "Write it to a file first" in _one_line(run("pack", "x", "o", "--bits", "6")[2])


def test_a_damaged_file_of_diffq(run):
    """A file of diffq that a transfer in text mode changed gets the reader's own error."""
    diffq.save(diffq.QATQuantizer(nn.Linear(4, 4), min_size=0), "x")
    Path("x").write_bytes(Path("x").read_bytes().replace(b"\r\n", b"\n"))
    assert "text mode" in _one_line(run("inspect", "x")[2])

"""Kinds of files by their first bytes. No code in a file is run, and torch is not needed."""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path

from diffq.errors import FormatError
from diffq.format.chunks import MAGIC

_STATE = "Save model.state_dict() with torch.save, and pack that."
_EXPORTED = f"diffq reads checkpoints of PyTorch, not exported models. {_STATE}"
_UNPACK = "Unpack it first."

# What a file starts with, what it is, and what to do.
_STARTS = (
    (b"version https://git-lfs", "a Git LFS pointer to the file", "Fetch it with git lfs pull."),
    (b"GGUF", "a GGUF file", _EXPORTED),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, such as a Keras model", _EXPORTED),
    (b"\x93NUMPY", "a NumPy array", "Save a dict of tensors with torch.save."),
    (b"\x1f\x8b", "a gzip archive", _UNPACK),
    (b"BZh", "a bzip2 archive", _UNPACK),
    (b"\xfd7zXZ", "an xz archive", _UNPACK),
    (b"7z\xbc\xaf", "a 7z archive", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", _UNPACK),
    (b"<", "a web page or XML text", "Download the file itself."),
    (b"{", "JSON text", "Pass the file of the weights, such as model.safetensors."),
    (b"\x08\x01\x12", "a TensorFlow model", _EXPORTED),
)

# What the name of a member of a zip archive ends with, and what the archive is. In order:
# TorchScript has the members of a torch checkpoint too.
_MEMBERS = (
    (("constants.pkl", "bytecode.pkl"), "a TorchScript archive",
     "Save torch.jit.load(path).state_dict() with torch.save, and pack that."),
    ((".data/extern_modules",), "an archive of torch.package", _STATE),
    (("models/model.json", "serialized_exported_program.json"),
     "a program of torch.export", _EXPORTED),
    ((".npy",), "a NumPy archive (.npz)", "Save a dict of tensors with torch.save."),
    ((".weights.h5",), "a Keras model", _EXPORTED),
)  # fmt: skip

# In all versions of pickle, torch.save without zip begins with this number.
_TORCH_NUMBER = b"l\xfc\x9cF\xf9 j\xa8P\x19"
# Fields that follow the version at the start of an ONNX model: producer, domain, graph, opset.
_ONNX_FIELDS = b"\x12\x1a\x22\x2a\x32\x3a\x42"
# The pickle instruction "c" comes before the module of a class.
_EARLIER = re.compile(rb"(?:c|[^\w.])diffq\.(?:diffq|uniform|lsq)\W")
_MOST_PICKLE = 1 << 24


def kind_of(path: str) -> str:
    """The kind of a file that holds a model: "diffq", "safetensors" or "torch".

    Raises:
        FormatError: the file is of another kind, which the message names.
        OSError: the file cannot be read.
    """
    if os.path.isdir(path):
        raise _refusal(path, _folder(path))
    if not os.path.isfile(path) and os.path.exists(path):
        raise _refusal(path, ("no regular file", "Write it to a file first."))
    with open(path, "rb") as file:
        start = file.read(64)
    # The reader explains a signature that a transfer has changed.
    if MAGIC[1:4] in start[:7]:
        return "diffq"
    # safetensors: the length of a JSON object, then the object.
    header = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and header < os.path.getsize(path):
        return "safetensors"
    if _TORCH_NUMBER in start:
        return "torch"
    other = _zip(path) if start.startswith(b"PK") else _by_start(path, start)
    if other:
        raise _refusal(path, other)
    return "torch"


def check_diffq(path: str) -> None:
    """Checks that a file is one of diffq, as far as its first bytes tell.

    Raises:
        FormatError: the file is of another kind, which the message names.
        OSError: the file cannot be read.
    """
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        return  # A pipe can be read only once.
    kind = kind_of(path)
    if kind == "torch" and is_earlier(path):
        raise earlier(path)
    if kind != "diffq":
        name = "a torch checkpoint" if kind == "torch" else "a safetensors file"
        raise _refusal(path, (f"{name}, not a file of diffq", "Make one of it with diffq pack."))


def is_earlier(path: str) -> bool:
    """Tells whether a torch checkpoint names a quantizer of the earlier diffq package."""
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            return bool(_EARLIER.search(file.read(_MOST_PICKLE)))
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("data.pkl")]
        for name in pickles:
            with archive.open(name) as member:
                if _EARLIER.search(member.read(_MOST_PICKLE)):
                    return True
    return False


def earlier(path: str) -> FormatError:
    """The error for a file of the earlier package."""
    return _refusal(path, ("a file of the earlier diffq package", "Read it with diffq convert."))


def _refusal(path: str, kind: tuple[str, str]) -> FormatError:
    return FormatError(f"{path} is {kind[0]}. {kind[1]}")


def _folder(path: str) -> tuple[str, str]:
    names = sorted(os.listdir(path))
    if "saved_model.pb" in names:
        return "a TensorFlow model", _EXPORTED
    endings = (".safetensors", ".bin", ".pt", ".pth", ".diffq")
    found = [name for name in names if name.endswith(endings)]
    pass_ = f"such as {Path(path, found[0])}" if found else "such as model.safetensors"
    return "a folder", f"Pass a file, {pass_}."


def _zip(path: str) -> tuple[str, str] | None:
    """The kind of a zip archive that is no torch checkpoint."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, EOFError):
        return "a damaged zip archive or torch checkpoint", "Fetch it again, or save it anew."
    for endings, what, remedy in _MEMBERS:
        if any(name.endswith(endings) for name in names):
            return what, remedy
    checkpoint = any(name.endswith("data.pkl") for name in names)
    return None if checkpoint else ("a zip archive without a torch checkpoint", _UNPACK)


def _by_start(path: str, start: bytes) -> tuple[str, str]:
    if not start:
        return "an empty file", "Save it again."
    for signature, what, remedy in _STARTS:
        if start.startswith(signature):
            return what, remedy
    if start[4:8] == b"TFL3":
        return "a TensorFlow Lite model", _EXPORTED
    if start[0] == 8 and start[2:3] and start[2] in _ONNX_FIELDS:
        return "an ONNX model", _EXPORTED
    if start[0] == 0x80:
        rule = "Reading it would run its code. Load it where you trust it, and save"
        return "a pickle without a torch checkpoint", f"{rule} model.state_dict()."
    ending = Path(path).suffix.lower()
    if ending in (".onnx", ".pb", ".tflite", ".h5", ".keras"):
        return f"a damaged {ending} file", _EXPORTED
    return "no model that diffq knows", "Pass a file of diffq, safetensors or torch.save."

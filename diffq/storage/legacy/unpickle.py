"""Reads a pickled file of the earlier package: data only, no code of the file or for it.

In plain words: `torch.load(weights_only=True)` follows a short list of globals and
refuses all others. This adds those that the earlier package's files name, each as an
inert stand-in of ours. The real class or function is never looked up nor called.
"""

from __future__ import annotations

import math
import os
import threading
import zipfile
from collections.abc import Iterable
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from diffq.errors import ConfigError, StateError

PathLike = str | os.PathLike[str]

#: Globals in the files of the earlier package and of the training packages that used it.
#: They stand for themselves only: a stand-in does nothing and keeps nothing.
KNOWN = (
    "diffq.diffq.DiffQuantizer",
    "diffq.uniform.UniformQuantizer",
    "diffq.lsq.LSQ",
    "demucs.demucs.Demucs",
    "demucs.hdemucs.HDemucs",
    "demucs.htdemucs.HTDemucs",
    "fractions.Fraction",
)

#: Where NumPy of any version says that its arrays are made.
NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")

_LIST_IN_USE = threading.Lock()


class StandIn:
    """Takes the place of a class that a file names; swallows whatever it is given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes the arguments of any class, and keeps none."""

    def __setstate__(self, state: Any) -> None:
        """Takes any state, and keeps none."""


class StandInDtype:
    """Takes the place of `numpy.dtype`."""

    def __init__(self, code: Any = None, *rest: Any) -> None:
        self.code = code
        self.order: Any = None

    def __setstate__(self, state: Any) -> None:
        self.order = state[1] if isinstance(state, tuple) and len(state) > 1 else None


class StandInArray:
    """Takes the place of `numpy.ndarray`: the pieces of an array, not yet looked at."""

    def __init__(self, *args: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def words(self) -> NDArray[np.uint64]:
        """The array, which must hold 64-bit words: the only ones in the files.

        Raises:
            StateError: it holds something else, or its pieces contradict each other.
        """
        _, shape, dtype, fortran, data = self._pieces()
        sizes = isinstance(shape, tuple) and all(type(n) is int and 0 <= n < 2**48 for n in shape)
        plain = isinstance(dtype, StandInDtype) and (dtype.code, dtype.order) == ("u8", "<")
        if not sizes or not plain or fortran or not isinstance(data, bytes):
            raise StateError("NumPy arrays of a legacy file hold little-endian uint64 in C order.")
        if len(data) != 8 * math.prod(shape):
            raise StateError(f"A NumPy array of shape {shape} has {len(data)} bytes.")
        words: NDArray[np.uint64] = np.frombuffer(data, "<u8").reshape(shape)
        return words

    def _pieces(self) -> tuple[Any, ...]:
        if not isinstance(self.state, tuple) or len(self.state) != 5:
            raise StateError("A NumPy array in the file is malformed.")
        return self.state


def read_file(path: PathLike, stand_ins: Iterable[str] = ()) -> Any:
    """The objects in a file that `torch.save` wrote, of any age.

    Args:
        path: the file; it may come from anywhere.
        stand_ins: full names of further classes in the file, such as the model's, to be
            replaced by inert ones. Nothing of that name is imported.

    Raises:
        StateError: the file is damaged, or names a global that is not on the list.
        ConfigError: a stand-in is not a full name.
        OSError: the file cannot be read.
    """
    allowed = _allowed(stand_ins)
    with open(path, "rb") as file:
        return _load(file, path, allowed)


def _load(file: BinaryIO, path: PathLike, allowed: list[Any]) -> Any:
    _check_archive(file, path)
    try:
        # torch has one list of safe globals for all threads.
        with _LIST_IN_USE, torch.serialization.safe_globals(allowed):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises of every kind for what is damaged
        raise StateError(_explain(error, path)) from error


def _explain(error: Exception, path: PathLike) -> str:
    name = str(error).partition("Unsupported global: GLOBAL ")[2].partition(" ")[0]
    if name:
        # torch leaves the module of builtins out.
        name = name if "." in name else f"builtins.{name}"
        return (
            f"{path} names {name!r}, which legacy files do not need, so it was not read. "
            f"If it is a class that was saved along, pass stand_ins=[{name!r}]: it is "
            "replaced by an empty one, and nothing of the file is run."
        )
    # torch's reason without its advice, which is to turn the protection off.
    lines = str(error).rpartition("WeightsUnpickler error: ")[2].splitlines()
    reasons = [line for line in lines if line and "eights" not in line]
    reason = reasons[0] if reasons else type(error).__name__
    return f"{path} cannot be read as a file that torch.save wrote: {reason:.300}"


def _allowed(stand_ins: Iterable[str]) -> list[Any]:
    allowed: list[Any] = [
        _named("numpy.dtype", StandInDtype),
        _named("numpy.ndarray", StandInArray),
        _named("builtins.bytes", _NoBytes),
        StandInArray,
        *(_named(f"{module}._reconstruct", _Reconstruct) for module in NUMPY),
    ]
    for name in (*KNOWN, *stand_ins):
        if not isinstance(name, str) or not all(map(str.isidentifier, name.split("."))):
            raise ConfigError(
                f"stand_ins are full names such as 'package.module.Class', got {name!r}."
            )
        allowed.append(_named(name, StandIn))
    return allowed


def _named(full_name: str, base: type) -> type:
    """A subclass that torch's unpickler finds under another name."""
    module, _, name = full_name.rpartition(".")
    return type(name, (base,), {"__module__": module, "__qualname__": name})


class _Reconstruct:
    """Takes the place of NumPy's function that makes an empty array."""

    def __new__(cls, *args: Any) -> Any:
        return StandInArray()


class _NoBytes:
    """Takes the place of `bytes`, which pickles of protocol 2 call for empty bytes only."""

    def __new__(cls, *args: Any) -> Any:
        return b""


def _check_archive(file: BinaryIO, path: PathLike) -> None:
    """Raises StateError for an archive that unpacks to more bytes than it has."""
    if not zipfile.is_zipfile(file):
        file.seek(0)
        return
    try:
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(info.file_size for info in archive.infolist())
    except Exception as error:  # so does zipfile
        raise StateError(f"{path} is a damaged archive: {error}") from error
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if unpacked > size:
        raise StateError(
            f"{path} would unpack to {unpacked} bytes, more than the file has. "
            "torch.save stores tensors as they are."
        )

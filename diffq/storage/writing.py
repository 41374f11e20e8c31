"""Writing files: whole or not at all, and as a stream where a path is no regular file."""

from __future__ import annotations

import errno
import io
import os
import secrets
import stat
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NoReturn

from diffq.errors import ConfigError

PathLike = str | os.PathLike[str]
#: Where a model can be written: a path, or a binary file that is open for writing.
Target = PathLike | IO[bytes]

# How long to wait for the reader of a named pipe. Without a limit, a pipe that was given by
# mistake would stop the program for ever, without a word.
_READER_SECONDS = 10.0


def check_target(target: Target) -> None:
    """Checks that a target can be written, before the work for it is done.

    Raises:
        ConfigError: the target is neither a path nor a binary file open for writing.
        OSError: the path is a folder, a socket or a block device; its folder is missing;
            or the file or its folder is read-only.
    """
    if not isinstance(target, (str, os.PathLike)):
        _check_open_file(target)
        return
    resolved = Path(os.path.realpath(target))
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        if os.path.basename(os.fspath(target)) in ("", ".", ".."):
            _refuse(errno.ENOENT, "A file to write needs a name; add one", target)
        _check_folder(resolved.parent, target)
        return
    if stat.S_ISDIR(mode):
        _refuse(errno.EISDIR, "A model is written to a file, got a folder; add a name", target)
    if stat.S_ISSOCK(mode) or stat.S_ISBLK(mode):
        kind = "socket" if stat.S_ISSOCK(mode) else "block device"
        _refuse(errno.EINVAL, f"A model is written to a file or a pipe, got a {kind}", target)
    if not _may_write(target):
        _refuse(errno.EACCES, "A file to write must not be read-only; choose another", target)
    if not _is_stream(target):
        _check_folder(resolved.parent, target)


def write_file(target: Target, parts: Iterable[bytes]) -> int:
    """Writes a file so that whoever looks sees the old one or the whole new one.

    For a path, a temporary file in the same folder is written, flushed to the disk and
    renamed. Pipes and character devices, such as a terminal or `/dev/fd/63`, cannot be
    renamed over: they get the bytes as a stream, as do files that are open already.

    Returns:
        Bytes written.

    Raises:
        ConfigError: see `check_target`.
        OSError: see `check_target`; the disk is full, or a pipe has no reader; an old file
            at a path is intact.
    """
    check_target(target)
    if not isinstance(target, (str, os.PathLike)):
        return _write_stream(target, parts)
    if not _is_stream(target):
        return _replace(Path(os.path.realpath(target)), parts)
    try:
        with _open_stream(target) as stream:
            return _write_stream(stream, parts)
    except BrokenPipeError:
        _refuse(errno.EPIPE, "A pipe must be read to its end, but its reader closed it", target)


def _check_open_file(file: Any) -> None:
    try:
        if not getattr(file, "writable", lambda: True)():
            raise io.UnsupportedOperation
        file.write(b"")
    except (TypeError, AttributeError) as error:
        got = f"{type(file).__name__}, which is text" if _is_text(file) else repr(file)
        raise ConfigError(
            f"A model is written to a path or a binary file, got {got}. "
            "Pass a path, or a file opened with mode 'wb'."
        ) from error
    except ValueError as error:  # A file that is closed, or open for reading.
        rule = "A file to write must be open for writing. Open it with mode 'wb'."
        raise ConfigError(rule) from error


def _is_text(file: object) -> bool:
    return hasattr(file, "write") and not isinstance(file, type)


def _check_folder(folder: Path, target: PathLike) -> None:
    if not folder.exists():
        _refuse(errno.ENOENT, "A file needs its folder to exist; make it first", target)
    if not _may_write(folder, os.W_OK | os.X_OK):
        rule = "A new file takes the place of an old one, so its folder must be writable"
        _refuse(errno.EACCES, rule, target)


def _may_write(path: PathLike, mode: int = os.W_OK) -> bool:
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def _refuse(code: int, rule: str, target: PathLike) -> NoReturn:
    # OSError makes itself the subclass of the code, such as IsADirectoryError.
    raise OSError(code, rule, os.fspath(target)) from None


def _is_stream(path: PathLike) -> bool:
    """Tells whether a path leads to something that a new file cannot take the place of."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return False
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
        return True
    # Links of /proc lead to open files that may have lost their names.
    resolved = os.path.realpath(path)
    return not os.path.exists(resolved) or not os.path.samefile(path, resolved)


def _open_stream(path: PathLike) -> IO[bytes]:
    """Opens a pipe or device, and gives the reader of a pipe some time to come."""
    flags = os.O_WRONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    end = time.monotonic() + _READER_SECONDS
    while True:
        try:
            handle = os.open(path, flags)
            break
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            if time.monotonic() >= end:
                rule = f"A pipe needs a reader, got none in {_READER_SECONDS:g} s; start it first"
                _refuse(errno.ENXIO, rule, path)
            time.sleep(0.01)
    if hasattr(os, "O_NONBLOCK"):
        os.set_blocking(handle, True)
    # Unbuffered, so that closing it after an error does not write again.
    return os.fdopen(handle, "wb", buffering=0)


def _write_stream(file: IO[bytes], parts: Iterable[bytes]) -> int:
    """Writes to an open file where it stands; returns the bytes written."""
    size = 0
    for part in parts:
        _write_part(file, part)
        size += len(part)
    if hasattr(file, "flush"):
        file.flush()
    return size


def _write_part(file: IO[bytes], part: bytes) -> None:
    """Writes all of a part, of which an unbuffered file may take a few bytes at a time."""
    left: bytes | memoryview = part
    while left:
        count: object = file.write(left)
        if count is None and isinstance(file, io.RawIOBase):
            count = 0
        if isinstance(count, bool) or not isinstance(count, int):
            return  # The file does not count: it takes everything.
        if not 0 < count <= len(left):
            rule = "A file must take at least a byte of each write, and wait until it can"
            raise OSError(errno.EAGAIN, f"{rule}, got {count} of {len(left)}")
        left = memoryview(left)[count:]


def _replace(target: Path, parts: Iterable[bytes]) -> int:
    # A name of 32 characters of 4 bytes leaves room for the rest within 255 bytes.
    temporary = target.with_name(f".{target.name[:32]}.{secrets.token_hex(8)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        mode = target.stat().st_mode & 0o777
    except FileNotFoundError:
        mode = None
    # With the old mode from the start, so that nobody reads what they could not read before.
    handle = os.open(temporary, flags, 0o666 if mode is None else mode)
    try:
        with os.fdopen(handle, "wb") as file:
            if mode is not None:
                # The umask took bits away. Some file systems, such as FAT, have none to give.
                with suppress(OSError):
                    os.chmod(temporary, mode)
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_folder(target.parent)
    return size


def _sync_folder(folder: Path) -> None:
    # Windows cannot open folders; its rename is durable by itself.
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

"""The integers of a file, read within bounds, and the errors of a file that breaks a rule."""

from __future__ import annotations

from typing import Any

from diffq.errors import FormatError

#: A varint keeps 7 bits a byte, so nine bytes hold every number below 2**63.
MAX_VARINT_BYTES = 9


#: What to do about a file that breaks a rule.
REMEDY = "The file is damaged or was not written by diffq; fetch it again or write it anew."


def damaged(where: str, rule: str, got: Any) -> FormatError:
    """The error for bytes that break a rule of docs/format.md."""
    return FormatError(f"{where}: {rule}, got {got}. {REMEDY}")


def unknown(where: str, known: str, got: Any) -> FormatError:
    """The error for bytes that later versions may have a meaning for."""
    return FormatError(
        f"{where}: this diffq knows {known}, got {got}. "
        "A newer diffq may have written this file; upgrade to read it."
    )


def varint(number: int) -> bytes:
    """A number from 0 to 2**63 - 1 as docs/format.md, section 2 writes it."""
    if number.bit_length() > 7 * MAX_VARINT_BYTES or number < 0:
        raise FormatError(f"A file holds numbers from 0 to 2**63 - 1, got {number}.")
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


class Cursor:
    """Reads forward through bytes and never past their end.

    Args:
        data: the bytes.
        where: what they are, for errors.
    """

    def __init__(self, data: bytes | memoryview, where: str) -> None:
        self._data = memoryview(data)
        self._offset = 0
        self.where = where

    @property
    def remaining(self) -> int:
        """Bytes not yet read."""
        return len(self._data) - self._offset

    def take(self, size: int, what: str) -> memoryview:
        """The next `size` bytes, without a copy.

        Raises:
            FormatError: fewer bytes remain.
        """
        if size > self.remaining:
            rule = f"{what} needs {size} more bytes"
            raise damaged(self.where, rule, f"only {self.remaining}")
        self._offset += size
        return self._data[self._offset - size : self._offset]

    def fixed(self, size: int, what: str) -> int:
        """An unsigned little-endian integer of `size` bytes."""
        return int.from_bytes(self.take(size, what), "little")

    def varint(self, what: str) -> int:
        """A varint of at most 63 bits in its shortest form (docs/format.md, section 2)."""
        number = 0
        for index in range(MAX_VARINT_BYTES):
            byte = self.fixed(1, what)
            number |= (byte & 0x7F) << 7 * index
            if byte < 0x80:
                if index and not byte:
                    rule = f"{what} must take its shortest form"
                    raise damaged(self.where, rule, "a longer one")
                return number
        raise damaged(self.where, f"{what} must be below 2**63", "a larger number")

    def code(self, count: int, what: str, where: str) -> int:
        """One of `count` codes, in a byte.

        Raises:
            FormatError: it is another one.
        """
        code = self.fixed(1, what)
        if code >= count:
            raise unknown(where, f"the {what}s 0 to {count - 1}", code)
        return code

    def end(self) -> None:
        """Checks that every byte was read."""
        if self.remaining:
            raise damaged(self.where, "no byte may be left over", f"{self.remaining}")

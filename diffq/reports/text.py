"""Text from files and numbers, as people read them."""

from __future__ import annotations

from collections.abc import Sequence

MEGABYTE = 2**20
KILOBYTE = 2**10


def printable(text: str) -> str:
    """Text from a file without what a terminal or a page would obey, such as escape sequences."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shortened(text: str, most: int) -> str:
    """Printable text of at most `most` characters, with an ellipsis in its middle.

    Both ends of a tensor's name tell which one it is.
    """
    # Before it is made printable too: a name may have megabytes.
    text = printable(_cut(text, most))
    return _cut(text, most)


def _cut(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    head = (most - 1) // 2
    return f"{text[:head]}…{text[head + 1 - most :]}"


def size(count: float) -> str:
    """Bytes with a unit that keeps three digits."""
    if abs(count) >= MEGABYTE / 10:
        return f"{count / MEGABYTE:,.3f} MB"
    if abs(count) >= KILOBYTE:
        return f"{count / KILOBYTE:.1f} kB"
    return f"{count:.0f} B"


def percent(part: float, whole: float) -> str:
    """A share of something, or a dash where there is nothing."""
    return f"{part / whole:.1%}" if whole else "-"


def shape(sizes: Sequence[int]) -> str:
    """Sizes of a tensor's dimensions."""
    return "x".join(map(str, sizes)) or "()"

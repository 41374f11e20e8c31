"""HTML and SVG from code: text is escaped, and only elements are markup."""

from __future__ import annotations

import re
from html import escape

from diffq.reports.text import printable

_VOID = frozenset({"meta", "rect", "wbr"})


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def tag(name: str, /, *children: str, **attributes: str | float | bool) -> Markup:
    """An element.

    Args:
        name: of the element.
        children: text, which is escaped, and markup.
        attributes: a trailing underscore is left out, others become hyphens. True is an
            attribute without a value; False is none.
    """
    head = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in _VOID:
        return Markup(f"<{name}{head}/>" if name == "rect" else f"<{name}{head}>")
    return Markup(f"<{name}{head}>{joined(*children)}</{name}>")


def joined(*children: str) -> Markup:
    """Text and markup, one after the other."""
    return Markup("".join(c if isinstance(c, Markup) else text(c) for c in children))


def breakable(name: str) -> Markup:
    """A name that lines may break in after a dot, a slash or an underscore."""
    parts = re.split(r"(?<=[._/])", name)
    return Markup(tag("wbr").join(map(text, parts)))


def text(content: str) -> Markup:
    """Text that may come from a file."""
    return Markup(escape(printable(content)))


def _attribute(key: str, value: str | float | bool) -> str:
    if value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{text(_shown(value))}"'


def _shown(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"

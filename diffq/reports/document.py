"""A page in one file: its style and script are in it, and its policy allows nothing else."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable
from hashlib import sha256
from importlib.resources import files

from diffq.reports.colors import letters_on, ramp
from diffq.reports.markup import Markup, joined, tag
from diffq.reports.text import shortened


def document(title: str, widths: Iterable[int], *body: Markup) -> str:
    """A whole page, which loads nothing from anywhere.

    Args:
        title: of the page.
        widths: the bitwidths that have colours in it.
        body: what the page shows.
    """
    widths = sorted(set(widths))
    style, script = Markup(_resource("page.css") + _colors(widths)), Markup(_resource("page.js"))
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", shortened(title, 100)),
        tag("style", style),
    )
    shown = tag("body", tag("main", *body), tag("script", script))
    return joined(Markup("<!doctype html>\n"), tag("html", head, shown, lang="en"), Markup("\n"))


def section(heading: str, *body: Markup) -> Markup:
    """A part of the page under a heading."""
    return tag("section", tag("h2", heading), *body)


def folded(summary: str, *body: Markup) -> Markup:
    """A part of the page that is shown on demand."""
    return tag("details", tag("summary", summary), *body)


def facts(pairs: Iterable[tuple[str, str]]) -> Markup:
    """Numbers in large letters: label and value."""
    items = (tag("div", tag("dt", label), tag("dd", value)) for label, value in pairs)
    return tag("dl", *items, class_="facts")


def _colors(widths: list[int]) -> str:
    light, dark = (_rules(ramp(widths, scheme)) for scheme in (False, True))
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n"


def _rules(colors: dict[int, str]) -> str:
    return "\n".join(
        f".b{width} {{ fill: {color}; }} text.on.b{width} {{ fill: {letters_on(color)}; }}"
        for width, color in colors.items()
    )


def _resource(name: str) -> str:
    return files("diffq.reports").joinpath(name).read_text(encoding="utf-8")


def _digest(content: str) -> str:
    return f"sha256-{b64encode(sha256(content.encode()).digest()).decode()}"

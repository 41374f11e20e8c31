"""Figures of a page, in SVG that takes any width: positions are percentages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from diffq.reports.markup import Markup, breakable, joined, tag
from diffq.reports.text import percent, shortened, size

#: Layers that a figure shows; the smaller ones are counted together.
MOST_LAYERS = 40
_NAME, _LAYER = 30, 64
# The part of a bar that a letter in it takes on a phone, and the widest bar of a histogram.
_LETTER = 0.035
_SLOT = 16.0
_HEIGHT, _TOP, _BOTTOM = 150, 20, 22


class Part(NamedTuple):
    """A part of a stacked bar: its weight, its style, a label in it, and what it is."""

    weight: float
    style: str
    label: str
    what: str


class Line(NamedTuple):
    """Shares of one layer of one model at each bitwidth, and its bytes.

    `model` is the model's name if there are several, and `style` that of its bytes.
    """

    parts: Sequence[Part]
    mean: float | None
    size: int
    model: str
    style: str


class Layer(NamedTuple):
    """A row of the figure of layers: one line for each model."""

    name: str
    lines: Sequence[Line]


def level_parts(counts: Mapping[int, int]) -> list[Part]:
    """Shares of the weights at each bitwidth."""
    return [
        Part(count, f"b{width}", str(width), f"{width} bits") for width, count in counts.items()
    ]


def stacked(parts: Sequence[Part], what: str) -> Markup:
    """A bar of full width, shared by its parts."""
    total = sum(part.weight for part in parts) or 1
    shapes, start = [], 0.0
    for part in parts:
        share = part.weight / total
        box = {"x": f"{100 * start:.3f}%", "width": f"{100 * share:.3f}%", "height": "100%"}
        shapes.append(tag("rect", class_=part.style, **box))
        if part.label and share >= _LETTER * len(part.label):
            middle = f"{100 * (start + share / 2):.3f}%"
            place = {"x": middle, "y": "50%", "class_": f"on {part.style}"}
            shapes.append(tag("text", part.label, **place))
        start += share
    shares = ", ".join(f"{p.what} {percent(p.weight, total)}" for p in parts)
    return tag("svg", *shapes, class_="bar", role="img", aria_label=f"{what}: {shares}")


def length(share: float, style: str = "accent", start: float = 0.0) -> Markup:
    """A bar as long as a share of the width."""
    box = {"x": f"{100 * start:.3f}%", "width": f"{100 * share:.3f}%", "height": "100%"}
    return tag("svg", tag("rect", class_=style, **box), class_="strip", aria_hidden="true")


def sizes(bars: Iterable[tuple[str, float, str]]) -> Markup:
    """Sizes of files as lengths: name, bytes, style."""
    bars = list(bars)
    most = max((count for _, count, _ in bars), default=0) or 1
    rows = [
        tag("li", tag("span", shortened(name, _NAME), class_="name"),
            length(count / most, style), tag("span", size(count), class_="num"))
        for name, count, style in bars
    ]  # fmt: skip
    return tag("ul", *rows, class_="sizes")


def composition(parts: Sequence[Part]) -> Markup:
    """A bar of bytes by what they are for, over a list of them."""
    total = sum(part.weight for part in parts)
    rows = [
        tag("li", swatch(part.style), tag("span", part.what),
            tag("span", size(part.weight), class_="num"),
            tag("span", percent(part.weight, total), class_="num"))
        for part in parts
    ]  # fmt: skip
    return joined(stacked(parts, "Bytes"), tag("ul", *rows, class_="legend"))


def swatch(style: str) -> Markup:
    """A small square in the colour of a style."""
    box = tag("rect", class_=style, width="100%", height="100%")
    return tag("svg", box, class_="swatch", aria_hidden="true")


def histogram(counts: Mapping[int, int]) -> Markup:
    """Share of the weights at each bitwidth between the lowest and the highest in use."""
    widths = range(min(counts), max(counts) + 1)
    total, most = sum(counts.values()), max(counts.values())
    slot = min(100 / len(widths), _SLOT)
    floor = _HEIGHT - _BOTTOM
    shapes = []
    for place, width in enumerate(widths):
        count = counts.get(width, 0)
        tall = (floor - _TOP) * count / most
        left, middle = slot * (place + 0.12), f"{slot * (place + 0.5):.3f}%"
        box = {"x": f"{left:.3f}%", "width": f"{0.76 * slot:.3f}%"}
        shapes.append(tag("rect", class_=f"b{width}", y=floor - tall, height=tall, **box))
        if count >= total / 100:
            above = f"{100 * count / total:.0f}%"
            shapes.append(tag("text", above, x=middle, y=floor - tall - 6, class_="above"))
        shapes.append(tag("text", str(width), x=middle, y=_HEIGHT - 6, class_="below"))
    shapes.append(
        tag("rect", class_="axis", x="0", y=floor, height=1, width=f"{slot * len(widths):.3f}%")
    )
    shares = ", ".join(f"{width} bits {percent(count, total)}" for width, count in counts.items())
    return tag("svg", *shapes, class_="histogram", role="img", aria_label=f"Weights: {shares}")


def layers(rows: Sequence[Layer], left_out: tuple[int, int]) -> Markup:
    """Shares of each layer's weights at each bitwidth, beside its bytes.

    Args:
        rows: the layers, in the order of the model.
        left_out: the number of further layers, and their bytes.
    """
    most = max((line.size for row in rows for line in row.lines), default=0) or 1
    heads = tag("span", "weights at each bitwidth"), tag("span", "mean", class_="num")
    bytes_ = tag("span", "bytes", class_="wide"), tag("span", class_="num")
    line = tag("span", *heads, *bytes_, class_="line")
    head = tag("div", tag("span", "layer"), line, class_="layer head", aria_hidden="true")
    items = [tag("li", _name(row.name), *_lines(row, most), class_="layer") for row in rows]
    shown = joined(head, tag("ol", *items, class_="layers"))
    if not left_out[0]:
        return shown
    rest = f"and {left_out[0]:,} smaller tensors, {size(left_out[1])} together"
    return joined(shown, tag("p", rest, class_="note"))


def changes(rows: Sequence[tuple[str, int]]) -> Markup:
    """Bytes that tensors gain or lose: name and difference.

    If some gain and some lose, gains are to the right of the middle and losses to the left.
    """
    most = max((abs(change) for _, change in rows), default=0) or 1
    both = min(change for _, change in rows) < 0 < max(change for _, change in rows)
    items = []
    for name, change in rows:
        share = abs(change) / most / (2 if both else 1)
        start = 0.0 if not both else 0.5 if change > 0 else 0.5 - share
        bar = length(share, "more" if change > 0 else "accent", start)
        number = tag("span", signed(change, size(abs(change))), class_="num")
        items.append(tag("li", _name(name), bar, number, class_="change"))
    return tag("ol", *items, class_="layers")


def signed(change: float, shown: str) -> str:
    """A difference, shown without its sign, with it."""
    return f"{'+' if change > 0 else '−' if change < 0 else ''}{shown}"


def _name(name: str) -> Markup:
    shown = breakable(shortened(name, _LAYER))
    return tag("span", shown, class_="name", title=shortened(name, 200))


def _lines(row: Layer, most: int) -> Iterable[Markup]:
    for line in row.lines:
        label = f"{shortened(row.name, _LAYER)}{f', {line.model}' if line.model else ''}"
        mean = "-" if line.mean is None else f"{line.mean:.2f}"
        yield tag(
            "span",
            stacked(line.parts, label),
            tag("span", mean, class_="num"),
            length(line.size / most, line.style),
            tag("span", size(line.size), class_="num"),
            class_="line",
        )

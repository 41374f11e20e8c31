"""The page of two files: what changed from one to the other, tensor by tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from diffq.format.reader import Reader
from diffq.reports import figures
from diffq.reports.document import document, facts, folded, section
from diffq.reports.listing import MOST_ROWS, Cell, Column, listing
from diffq.reports.markup import Markup, tag
from diffq.reports.model import bits_cell, footer, headline, line
from diffq.reports.summary import Progress, Summary, Tensor, quiet, summarize
from diffq.reports.text import shape, shortened, size

_MOST_CHANGES = 24

_COLUMNS = (
    Column("tensor"),
    Column("bits A", number=True),
    Column("bits B", number=True),
    Column("change", number=True),
    Column("bytes A", number=True),
    Column("bytes B", number=True),
    Column("change", number=True),
    Column("note"),
)


class Pair(NamedTuple):
    """A tensor in two files; None where it is missing."""

    name: str
    a: Tensor | None
    b: Tensor | None

    @property
    def size(self) -> int:
        """The larger of its sizes in the two files."""
        return max(tensor.size for tensor in (self.a, self.b) if tensor)

    @property
    def change(self) -> int:
        """Bytes that it has more in the second file."""
        return (self.b.size if self.b else 0) - (self.a.size if self.a else 0)

    @property
    def note(self) -> str:
        """What differs besides bits and bytes."""
        if self.a is None or self.b is None:
            return "only in B" if self.a is None else "only in A"
        for of in (_shape, _dtype, _kind):
            if of(self.a) != of(self.b):
                return f"{of(self.a)} to {of(self.b)}"
        return ""


def pairs(a: Summary, b: Summary) -> list[Pair]:
    """The tensors of both files, by any of their names: those of A in its order, then B's own."""
    in_b = {name: tensor for tensor in b.tensors for name in (tensor.name, *tensor.tied)}
    found, matched = [], set()
    for tensor in a.tensors:
        other = next((in_b[n] for n in (tensor.name, *tensor.tied) if n in in_b), None)
        if other is not None and other.name in matched:
            other = None
        if other is not None:
            matched.add(other.name)
        found.append(Pair(tensor.name, tensor, other))
    return found + [Pair(t.name, None, t) for t in b.tensors if t.name not in matched]


def comparison_page(a: Reader, b: Reader, names: tuple[str, str], report: Progress = quiet) -> str:
    """The page of two files side by side.

    Args:
        a: the file before.
        b: the file after.
        names: of the files, as the page shows them.
        report: told about the progress.

    Raises:
        FormatError: a tensor is damaged.
    """
    before, after = (summarize(reader, report=report) for reader in (a, b))
    found = pairs(before, after)
    parts = [_head(before, after, names), _changes(found), _bits(found), _table(found), footer()]
    title = f"{names[0]} and {names[1]}: diffq report"
    return document(title, {*before.counts, *after.counts}, *parts)


def _head(a: Summary, b: Summary, names: tuple[str, str]) -> Markup:
    bars = [
        ("float32", a.float32_bytes, "rest"),
        (f"A: {names[0]}", a.size, "raw"),
        (f"B: {names[1]}", b.size, "accent"),
    ]
    bits = (bits_cell(each.mean_bits).shown for each in (a, b))
    times = (f"{each.float32_bytes / each.size:.1f}" for each in (a, b))
    return tag(
        "header",
        tag("h1", f"A: {shortened(names[0], 100)}, B: {shortened(names[1], 100)}"),
        tag("p", headline(a.size / b.size, "than A", "B is "), class_="lede"),
        figures.sizes(bars),
        facts(
            [
                ("bits per weight", " → ".join(bits)),
                ("times smaller than float32", " → ".join(times)),
                ("tensors", f"{len(a.tensors):,} → {len(b.tensors):,}"),
            ]
        ),
    )


def _changes(found: Sequence[Pair]) -> Markup:
    changed = sorted((pair for pair in found if pair.change), key=lambda pair: -abs(pair.change))
    if not changed:
        return section(
            "Bytes by tensor", tag("p", "Every tensor has the same bytes in both files.")
        )
    rows = [(pair.name, pair.change) for pair in changed[:_MOST_CHANGES]]
    rest = changed[_MOST_CHANGES:]
    note = f"and {len(rest):,} smaller changes, {_signed(sum(p.change for p in rest))} together"
    return section(
        "Where the bytes changed",
        tag("p", "From A to B, the largest changes first.", class_="note"),
        figures.changes(rows),
        tag("p", note, class_="note") if rest else Markup(),
    )


def _bits(found: Sequence[Pair]) -> Markup:
    quantized = [p for p in found if any(t and t.mean_bits is not None for t in (p.a, p.b))]
    chosen = {p.name for p in sorted(quantized, key=lambda p: -p.size)[: figures.MOST_LAYERS]}
    rows = [figures.Layer(p.name, _lines(p)) for p in quantized if p.name in chosen]
    if not rows:
        return Markup()
    rest = [pair for pair in quantized if pair.name not in chosen]
    left_out = len(rest), sum(pair.size for pair in rest)
    note = tag("p", "A above, with its bytes in grey; B below.", class_="note")
    return section("Bits by layer", note, figures.layers(rows, left_out))


def _lines(pair: Pair) -> list[figures.Line]:
    before = [line(pair.a, "A", "rest")] if pair.a else []
    return before + ([line(pair.b, "B")] if pair.b else [])


def _table(found: Sequence[Pair]) -> Markup:
    changed = [pair for pair in found if pair.change or pair.note]
    same = [pair for pair in found if not (pair.change or pair.note)]
    summary = f"{len(same):,} tensors of the same size"
    return section(
        "Tensors",
        _listed(changed, "Tensors that changed") if changed else Markup(),
        folded(summary, _listed(same, "Tensors of the same size")) if same else Markup(),
    )


def _listed(found: Sequence[Pair], caption: str) -> Markup:
    shown = sorted(found, key=lambda pair: -pair.size)[:MOST_ROWS]
    left = len(found) - len(shown)
    rest = f"and {left:,} smaller tensors" if left else ""
    rows = [_row(pair) for pair in sorted(shown, key=lambda pair: pair.change)]
    return listing(f"{caption}. Press a heading to sort.", _COLUMNS, rows, rest)


def _row(pair: Pair) -> list[str | Cell]:
    bits = [tensor.mean_bits if tensor else None for tensor in (pair.a, pair.b)]
    change = None if bits[0] is None or bits[1] is None else bits[1] - bits[0]
    sizes = [tensor.size if tensor else None for tensor in (pair.a, pair.b)]
    return [
        pair.name,
        *map(bits_cell, bits),
        Cell("-" if change is None else figures.signed(change, f"{abs(change):.2f}"), change),
        *(Cell("-" if count is None else f"{count:,}", count) for count in sizes),
        Cell(_signed(pair.change), pair.change),
        pair.note,
    ]


def _signed(change: int) -> str:
    return figures.signed(change, size(abs(change)))


def _shape(tensor: Tensor) -> str:
    return shape(tensor.entry.shape)


def _dtype(tensor: Tensor) -> str:
    return tensor.entry.dtype


def _kind(tensor: Tensor) -> str:
    return tensor.kind

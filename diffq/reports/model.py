"""The page of one model: how small it is, where its bytes and bits are, what could go."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from diffq.format.kinds.base import Record
from diffq.format.reader import Reader
from diffq.reports import figures
from diffq.reports.document import document, facts, folded, section
from diffq.reports.forecast import Forecast, Rates, forecast
from diffq.reports.listing import MOST_ROWS, Cell, Column, listing
from diffq.reports.markup import Markup, joined, tag
from diffq.reports.summary import Progress, Summary, Tensor, largest, quiet, summarize
from diffq.reports.text import percent, shape, shortened, size

_SHARES = (0.75, 0.5)
_MOST_METADATA = 4000
_MOST_FORECAST = 16

_COLUMNS = (
    Column("tensor"),
    Column("bits", number=True),
    Column("bytes", number=True),
    Column("share", number=True),
    Column("shape", number=True),
    Column("kind"),
    Column("coding"),
)


def model_page(reader: Reader, name: str, report: Progress = quiet) -> str:
    """The page of a file.

    Args:
        reader: the file.
        name: of the file, as the page shows it.
        report: told about the progress.

    Raises:
        FormatError: a tensor is damaged.
    """
    rates: dict[str, Rates] = {}

    def measure(tensor: str, record: Record) -> None:
        measured = Rates.of(record)
        if measured is not None:
            rates[tensor] = measured

    summary = summarize(reader, report=report, look=measure)
    parts = [_head(summary, name), _bytes(summary)]
    if any(tensor.mean_bits for tensor in summary.quantized):
        parts.append(_bits(summary))
    if rates:
        parts.append(_smaller(summary, rates))
    parts.append(_tensors(summary))
    if summary.metadata:
        parts.append(section("Metadata", _metadata(summary.metadata)))
    return document(f"{name}: diffq report", summary.counts, *parts, footer())


def footer() -> Markup:
    """The units."""
    return tag(
        "footer",
        "MB is 2²⁰ bytes and kB is 2¹⁰. Tied tensors count once. The entropy is that of single "
        "levels, which most coders cannot go below. float32 is a checkpoint with 4 bytes for each "
        "float.",
    )


def line(tensor: Tensor, model: str = "", style: str = "accent") -> figures.Line:
    """A tensor in the figure of layers."""
    parts = figures.level_parts(tensor.counts)
    if not parts:
        parts = [figures.Part(1, "book", tensor.kind, tensor.kind)]
    return figures.Line(parts, tensor.mean_bits, tensor.size, model, style)


def bits_cell(bits: float | None) -> Cell:
    """A mean bitwidth in a table."""
    return Cell("-" if bits is None else f"{bits:.2f}", bits)


def _head(summary: Summary, name: str) -> Markup:
    times = summary.float32_bytes / summary.size
    bound, mean = summary.bound_bytes, summary.mean_bits
    return tag(
        "header",
        tag("h1", shortened(name, 200)),
        tag("p", headline(times, "than float32"), class_="lede"),
        figures.sizes(
            [("float32", summary.float32_bytes, "rest"), ("this file", summary.size, "accent")]
        ),
        facts(
            [
                ("bits per weight", "-" if mean is None else f"{mean:.2f}"),
                ("quantized weights", f"{summary.weights:,}"),
                ("tensors", f"{len(summary.tensors):,}"),
                ("times the entropy", f"{summary.size / bound:.3f}" if bound else "-"),
            ]
        ),
    )


def headline(times: float, than: str, subject: str = "") -> str:
    """A ratio of sizes in words."""
    if not times:
        return "No weights"
    if 0.95 < times < 1.05:
        words = f"{abs(1 - times):.1%} {'smaller' if times > 1 else 'larger'} {than}"
        words = f"As large as {than.removeprefix('than ')}" if times == 1 else words
    else:
        words = f"{max(times, 1 / times):.1f} times {'smaller' if times > 1 else 'larger'} {than}"
    return subject + (words[0].lower() + words[1:] if subject else words)


def _bytes(summary: Summary) -> Markup:
    quantized = sum(tensor.size for tensor in summary.quantized)
    raw = sum(tensor.size for tensor in summary.raw)
    parts = [
        figures.Part(quantized, "accent", "quantized", f"{len(summary.quantized):,} quantized"),
        figures.Part(raw, "raw", "raw", f"{len(summary.raw):,} raw"),
        figures.Part(summary.overhead, "rest", "", "index, metadata"),
    ]
    wide = [t for t in summary.raw if t.detail["stored_dtype"] in ("float32", "float64")]
    could = sum(tensor.size for tensor in wide)
    note = (
        f"Raw floats in float32 or wider take {size(could)}. float16=True halves the parameters "
        "among them, and leaves buffers as they are."
    )
    worth = could >= 0.01 * summary.size
    return section(
        "Where the bytes are",
        figures.composition([part for part in parts if part.weight > 0]),
        tag("p", note, class_="note") if worth else Markup(),
    )


def _bits(summary: Summary) -> Markup:
    shown, rest = largest(summary.layers, figures.MOST_LAYERS)
    rows = [figures.Layer(tensor.name, [line(tensor)]) for tensor in shown]
    spread = Markup()
    if len(summary.counts) > 1:
        spread = joined(
            tag("p", "Share of all weights at each bitwidth.", class_="note"),
            figures.histogram(summary.counts),
        )
    return section("Bits by layer", spread, figures.layers(rows, rest))


def _smaller(summary: Summary, rates: Mapping[str, Rates]) -> Markup:
    forecasts = [forecast(summary, rates, share) for share in _SHARES]
    shown, rest = largest([t for t in summary.tensors if t.name in rates], _MOST_FORECAST)
    columns = [Column("tensor"), Column("bits", number=True)]
    columns += [Column(f"at {each.share:.0%}", number=True) for each in forecasts]
    rows: list[list[str | Cell]] = [
        [t.name, bits_cell(t.mean_bits), *(bits_cell(each.bits[t.name]) for each in forecasts)]
        for t in shown
    ]
    caption = "Bits per weight in today's file, and in smaller ones"
    explained = (
        "Computed from the levels in the file, for the case that its bits are where they are worth "
        "most: a smaller file then takes the same number of bits from every group, down to 1, and "
        "raw tensors stay. Training to that size may find better ones."
    )
    return section(
        "In a smaller file",
        *(tag("p", _in_words(each)) for each in forecasts),
        tag("p", explained, class_="note"),
        listing(caption, columns, rows, _left_out(rest)),
    )


def _in_words(found: Forecast) -> str:
    if found.reached:
        return (
            f"For {found.share:.0%} of the bytes, {size(found.size)}, every group of weights loses "
            f"up to {found.fewer:.1f} bits."
        )
    return (
        f"{found.share:.0%} of the bytes is out of reach: with 1 bit for every quantized weight, "
        f"the file has {size(found.size)}."
    )


def _tensors(summary: Summary) -> Markup:
    raw = sum(tensor.size for tensor in summary.raw)
    counted = f"{len(summary.raw):,} raw tensors, {size(raw)}"
    return section(
        "Tensors",
        _listed(summary.quantized, summary, "Quantized tensors") if summary.quantized else Markup(),
        folded(counted, _listed(summary.raw, summary, "Raw tensors")) if summary.raw else Markup(),
    )


def _listed(tensors: Sequence[Tensor], summary: Summary, caption: str) -> Markup:
    shown, rest = largest(tensors, MOST_ROWS)
    rows = [_row(tensor, summary) for tensor in sorted(shown, key=lambda t: -t.size)]
    caption = f"{caption}. Press a heading to sort."
    return listing(caption, _COLUMNS, rows, _left_out(rest), falling=2)


def _row(tensor: Tensor, summary: Summary) -> list[str | Cell]:
    share = Cell(percent(tensor.size, summary.size), tensor.size)
    return [
        " = ".join([tensor.name, *tensor.tied]),
        bits_cell(tensor.mean_bits),
        Cell(f"{tensor.size:,}", tensor.size),
        share,
        Cell(shape(tensor.entry.shape), tensor.entry.numel),
        tensor.kind,
        "+".join(tensor.codings) or "-",
    ]


def _left_out(rest: tuple[int, int]) -> str:
    return f"and {rest[0]:,} smaller tensors, {size(rest[1])} together" if rest[0] else ""


def _metadata(metadata: Mapping[str, object]) -> Markup:
    text = json.dumps(metadata, ensure_ascii=False, indent=2, sort_keys=True)
    cut = "\n…" if len(text) > _MOST_METADATA else ""
    lines = (text[:_MOST_METADATA] + cut).split("\n")
    return tag("pre", Markup("\n".join(map(joined, lines))))

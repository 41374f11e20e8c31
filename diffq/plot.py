"""Figures of a model with matplotlib: of a quantizer while it trains, or of a file.

import diffq.plot
axes = diffq.plot.bits(quantizer)
axes.figure.savefig("bits.png")

They need the extra `plot`. A model that is sharded is gathered: call them on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from diffq.errors import missing_package
from diffq.quantizers.base import BaseQuantizer
from diffq.reports.colors import letters_on, ramp
from diffq.reports.figures import MOST_LAYERS
from diffq.reports.summary import Summary, Tensor, largest, reader_of, summarize
from diffq.reports.text import MEGABYTE, shortened, size
from diffq.storage.open import Readable, StoredModel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ACCENT, _REST, _SOFT = "#1c6fc9", "#b3bcc6", "#596470"
_NAME = 44
# Inches of a row and of everything else, and the share of a bar that a number needs.
_ROW, _FRAME, _WIDTH = 0.26, 1.5, 9.0
_LABELLED = 0.06


def bits(source: BaseQuantizer[Any] | StoredModel | Readable, ax: Axes | None = None) -> Axes:
    """Shares of each layer's weights at each bitwidth, with the layer's bytes beside them.

    Shows the 40 largest layers, in the order of the model, without small tensors of one scale.

    Args:
        source: a quantizer, a file, or what `diffq.open` returned.
        ax: what to draw on; by default a new figure of pyplot.

    Returns:
        What was drawn on. Its `figure` saves the picture.

    Raises:
        ConfigError: matplotlib is missing.
        WeightError, AttachError: as `quantizer.snapshot()`.
        FormatError, OSError: the file is damaged, or cannot be read.
    """
    summary = _summary(source)
    shown, rest = largest(summary.layers, MOST_LAYERS)
    axes = ax or _new_axes(len(shown))
    colors = ramp(summary.counts)
    for row, tensor in enumerate(shown):
        _draw_shares(axes, row, tensor, colors)
    mean = summary.mean_bits
    title = "Nothing is quantized" if mean is None else f"Bits by layer, {mean:.2f} on average"
    axes.set_title(title, loc="left")
    _name_rows(axes, [tensor.name for tensor in shown])
    axes.set(xlim=(0, 1), xticks=[])
    strip = axes.inset_axes((1.02, 0.0, 0.22, 1.0), sharey=axes)
    _draw_sizes(strip, [tensor.size for tensor in shown], [_ACCENT] * len(shown))
    strip.set_title("bytes", loc="left", fontsize="medium", color=_SOFT)
    strip.tick_params(labelleft=False)
    note = f"and {rest[0]:,} smaller layers, {size(rest[1])} together" if rest[0] else ""
    axes.set_xlabel(note, color=_SOFT, loc="left")
    _draw_legend(axes, colors, len(shown))
    return axes


def sizes(source: BaseQuantizer[Any] | StoredModel | Readable, ax: Axes | None = None) -> Axes:
    """Bytes of the file: of the 40 largest layers, of raw tensors and of all else.

    Takes, returns and raises what `bits` does.
    """
    summary = _summary(source)
    shown, (count, rest) = largest(summary.quantized, MOST_LAYERS)
    rows = [(tensor.name, tensor.size, _ACCENT) for tensor in shown]
    rows += [(f"{count:,} smaller layers", rest, _ACCENT)] if count else []
    raw = sum(tensor.size for tensor in summary.raw)
    rows += [(f"{len(summary.raw):,} raw tensors", raw, _REST)] if summary.raw else []
    rows.append(("index, metadata", summary.overhead, _REST))
    axes = ax or _new_axes(len(rows))
    names, counts, colors = zip(*rows, strict=True)
    _draw_sizes(axes, counts, colors)
    _name_rows(axes, names)
    times = summary.float32_bytes / summary.size
    title = f"{summary.size / MEGABYTE:.3f} MB, {times:.1f} times smaller than float32"
    axes.set_title(title, loc="left")
    return axes


def _summary(source: BaseQuantizer[Any] | StoredModel | Readable) -> Summary:
    if isinstance(source, BaseQuantizer):
        snapshot = source.snapshot()
        return summarize(reader_of(snapshot.records, snapshot.aliases))
    if isinstance(source, StoredModel):
        return summarize(source.reader)
    with StoredModel(source) as stored:
        return summarize(stored.reader)


def _new_axes(rows: int) -> Axes:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise missing_package("matplotlib", "diffq.plot", "plot") from error
    height = _FRAME + _ROW * rows
    axes: Axes = pyplot.subplots(figsize=(_WIDTH, height), layout="constrained")[1]
    return axes


def _draw_shares(axes: Axes, row: int, tensor: Tensor, colors: dict[int, str]) -> None:
    total, start = sum(tensor.counts.values()), 0.0
    if not total:
        axes.barh(row, 1, color=_REST, height=0.8)
        axes.text(0.5, row, tensor.kind, ha="center", va="center", fontsize="small")
    for width, count in tensor.counts.items():
        share = count / total
        axes.barh(row, share, left=start, color=colors[width], height=0.8)
        if share >= _LABELLED:
            label = axes.text(start + share / 2, row, str(width), ha="center", fontsize="small")
            label.set(va="center_baseline", color=letters_on(colors[width]))
        start += share


def _draw_sizes(axes: Axes, counts: Sequence[int], colors: Sequence[str]) -> None:
    axes.barh(range(len(counts)), counts, color=colors, height=0.55)
    for row, count in enumerate(counts):
        axes.annotate(
            size(count), (count, row), (4, 0), textcoords="offset points",
            va="center_baseline", fontsize="small", color=_SOFT,
        )  # fmt: skip
    # Room for the number at the longest bar.
    axes.set(xlim=(0, 1.35 * max([*counts, 1])), xticks=[])
    _clear(axes)


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    labels = [shortened(name, _NAME) for name in names]
    axes.set_yticks(range(len(names)), labels, parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    _clear(axes)


def _clear(axes: Axes) -> None:
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _draw_legend(axes: Axes, colors: dict[int, str], rows: int) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=color, label=str(width)) for width, color in colors.items()]
    if not handles:
        return
    handles[0].set_label(f"bits: {handles[0].get_label()}")
    axes.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0, -0.25 / (_ROW * (rows + 1))),
        ncols=len(handles), frameon=False, fontsize="small", handlelength=1, columnspacing=1,
        borderaxespad=0, borderpad=0,
    )  # fmt: skip

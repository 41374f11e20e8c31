"""A picture of where a DiffQ model spends its bits, after Figure 3 of the DiffQ paper."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

import diffq

KILOBYTE = 2**10
FLOOR = 0.1  # KB; the bars start here, as a logarithmic axis has no zero
FLOAT32_COLOR = "#dcdcdc"
OTHER_COLOR = "#8c8c8c"


def plot_bits(quantizer: diffq.DiffQuantizer, group_size: int, path: Path) -> None:
    """Draws each tensor's size in float32, and its quantized size split by bitwidth."""
    chosen = {plan.name for plan in quantizer.plan if plan.quantized}
    widths = quantizer.bits()
    bits = {name: widths[name] for name in widths if name in chosen}
    numel = {plan.name: plan.numel for plan in quantizer.plan}
    levels = {name: _kilobytes(bits[name], group_size, numel[name]) for name in bits}
    quantized = {name: sum(parts.values()) for name, parts in levels.items()}
    others = sum(
        p.numel * (int(widths[p.name]) / 8 if p.small else p.dtype.itemsize) / KILOBYTE
        for p in quantizer.plan
        if not p.quantized
    )
    overhead = quantizer.true_model_size() * KILOBYTE - others - sum(quantized.values())

    figure = Figure(figsize=(10, 5.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    colors = _colors(levels)
    for x, name in enumerate(bits):
        original = numel[name] * 4 / KILOBYTE
        axes.bar(x, original - FLOOR, bottom=FLOOR, width=0.9, color=FLOAT32_COLOR)
        _stacked_bar(axes, x, levels[name], colors)
        axes.text(x, original * 1.08, f"{original / quantized[name]:.1f}x", ha="center")
    for x, size in enumerate((others, overhead), start=len(bits)):
        axes.bar(x, size - FLOOR, bottom=FLOOR, width=0.6, color=OTHER_COLOR)
    labels = [name.removesuffix(".weight") for name in bits]
    axes.set_xticks(
        range(len(bits) + 2),
        [*labels, "small tensors, buffers", "bit maps, ranges"],
        rotation=35,
        ha="right",
        rotation_mode="anchor",
    )
    title = f"Bits by layer, {quantizer.mean_bits():.2f} on average"
    axes.set(title=title, ylabel="size (KB, logarithmic)", yscale="log")
    axes.set_ylim(FLOOR, 2 * max(numel[name] for name in bits) * 4 / KILOBYTE)
    axes.spines[["top", "right"]].set_visible(False)
    patches = [Patch(color=FLOAT32_COLOR, label="float32")]
    patches += [Patch(color=color, label=f"{width} bits") for width, color in colors.items()]
    axes.legend(handles=patches, loc="upper left", frameon=False, ncols=2)
    figure.savefig(path)


def _kilobytes(bits: Tensor, group_size: int, numel: int) -> dict[int, float]:
    """KB spent on the groups of each bitwidth that occurs; the last group may be short."""
    weights = torch.full(bits.shape, group_size)
    weights[-1] = numel - group_size * (len(bits) - 1)
    return {
        int(width): int(width) * weights[bits == width].sum().item() / 8 / KILOBYTE
        for width in bits.unique()
    }


def _colors(levels: dict[str, dict[int, float]]) -> dict[int, str]:
    widths = sorted({width for parts in levels.values() for width in parts})
    palette = colormaps["viridis_r"].resampled(max(2, len(widths)))
    return {width: to_hex(palette(i)) for i, width in enumerate(widths)}


def _stacked_bar(axes: Axes, x: int, parts: dict[int, float], colors: dict[int, str]) -> None:
    """Shares the bar's height among the parts; sums would not be readable on a log axis."""
    total, done, bottom = sum(parts.values()), 0.0, FLOOR
    for width, size in parts.items():
        done += size
        top = FLOOR * (total / FLOOR) ** (done / total)
        axes.bar(x, top - bottom, bottom=bottom, width=0.6, color=colors[width])
        bottom = top

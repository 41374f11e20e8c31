"""Colours of bitwidths: one hue, from few bits to many, for pages and for plots."""

from __future__ import annotations

from collections.abc import Iterable

# From few bits to many; on a dark page the ends change places in lightness.
_LIGHT = ("#d3e4f7", "#8fbce8", "#3f87cf", "#1c569c", "#0b2c5a")
_DARK = ("#1d3a5c", "#2a65a6", "#4a93de", "#92c2f3", "#dcecfd")
# Luminance above which black letters are the easier to read.
_LIGHT_ENOUGH = 0.18


def ramp(widths: Iterable[int], dark: bool = False) -> dict[int, str]:
    """A colour for each bitwidth, as far apart as the scale allows.

    Args:
        widths: the bitwidths in use.
        dark: for a dark background.
    """
    ordered = sorted(set(widths))
    if not ordered:
        return {}
    low, span = ordered[0], max(1, ordered[-1] - ordered[0])
    scale = _DARK if dark else _LIGHT
    # A single bitwidth, and two, need no ends of the scale.
    margin = 0.5 if len(ordered) == 1 else 0.15 if span == 1 else 0.0
    return {
        width: _mix(scale, margin + (1 - 2 * margin) * (width - low) / span) for width in ordered
    }


def letters_on(color: str) -> str:
    """Black or white: the colour of letters that can be read on this one."""
    red, green, blue = (_linear(part / 255) for part in _parts(color))
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return "#000000" if luminance > _LIGHT_ENOUGH else "#ffffff"


def _mix(scale: tuple[str, ...], position: float) -> str:
    place = position * (len(scale) - 1)
    start = min(int(place), len(scale) - 2)
    pairs = zip(_parts(scale[start]), _parts(scale[start + 1]), strict=True)
    mixed = (round(a + (b - a) * (place - start)) for a, b in pairs)
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _parts(color: str) -> tuple[int, ...]:
    return tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))


def _linear(part: float) -> float:
    return part / 12.92 if part <= 0.04045 else float(((part + 0.055) / 1.055) ** 2.4)

"""Tables as plain text. No torch needed."""

from __future__ import annotations

from collections.abc import Sequence


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    left: int = 1,
    footer: Sequence[str] | None = None,
) -> str:
    """Aligns rows under a header: the first `left` columns to the left, the others to the right.

    An empty line sets the footer, a last row, apart.
    """
    lines = [header, *rows, *([footer] if footer else [])]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    aligned = [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    rule = "-" * max(map(len, aligned))
    body, end = (aligned[1:-1], ["", aligned[-1]]) if footer else (aligned[1:], [])
    return "\n".join([aligned[0], rule, *body, *end])

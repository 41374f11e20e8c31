"""Tables for notebooks: a part of a page, which takes the notebook's style."""

from __future__ import annotations

from collections.abc import Sequence

from diffq.reports.markup import Markup, tag
from diffq.reports.text import shortened

#: Rows from each end of a table; those between them are counted.
_END = 30
_TEXT = 100


def fragment(
    header: Sequence[str], rows: Sequence[Sequence[str]], last: Sequence[Sequence[str]]
) -> Markup:
    """A table, with the middle of a long one left out.

    Args:
        header: names of the columns.
        rows: texts, of which the first is a name.
        last: rows that are always shown, below.
    """
    left_out = len(rows) - 2 * _END
    if left_out > 0:
        gap = [f"… {left_out} more …", *[""] * (len(header) - 1)]
        rows = [*rows[:_END], gap, *rows[-_END:]]
    head = tag("tr", *(tag("th", title) for title in header))
    body = (tag("tr", *(tag("td", shortened(c, _TEXT)) for c in row)) for row in [*rows, *last])
    return tag("table", tag("thead", head), tag("tbody", *body))

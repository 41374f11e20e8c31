"""Tables of a page, which sort by a click on a heading, or by a key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from diffq.reports.markup import Markup, breakable, joined, tag
from diffq.reports.text import shortened

#: Rows that a table shows, so that a page of any model opens at once.
MOST_ROWS = 1000
_TEXT = 160
# A table of more rows scrolls by itself, under its headings.
_TALL = 50


class Column(NamedTuple):
    """A column: its heading, and whether it holds numbers."""

    title: str
    number: bool = False


class Cell(NamedTuple):
    """A number as it is shown, and as it is sorted; None comes last."""

    shown: str
    value: float | None


def listing(
    caption: str,
    columns: Sequence[Column],
    rows: Sequence[Sequence[str | Cell]],
    rest: str = "",
    falling: int | None = None,
) -> Markup:
    """A table that sorts.

    Args:
        caption: says what the rows are.
        columns: the headings.
        rows: texts and numbers, at most `MOST_ROWS` of which should be given.
        rest: a line below the rows about those that are left out.
        falling: the column that the rows are sorted by already, from high to low.
    """
    head = tag("tr", *(_heading(c, number == falling) for number, c in enumerate(columns)))
    body = tag("tbody", *(tag("tr", *map(_cell, row)) for row in rows))
    parts = [tag("thead", head), body]
    if rest:
        parts.append(tag("tfoot", tag("tr", tag("td", rest, colspan=len(columns)))))
    table = tag("table", *parts, class_="sortable", aria_label=caption)
    style = "scroll tall" if len(rows) > _TALL else "scroll"
    box = tag("div", table, class_=style, role="region", aria_label=caption, tabindex="0")
    return joined(tag("p", caption, class_="note"), box)


def _heading(column: Column, falling: bool) -> Markup:
    button = tag("button", column.title, type="button")
    order = "descending" if falling else False
    return tag("th", button, scope="col", class_=column.number and "num", aria_sort=order)


def _cell(cell: str | Cell) -> Markup:
    if isinstance(cell, Cell):
        value = "" if cell.value is None else f"{cell.value:.9g}"
        return tag("td", cell.shown, class_="num", data_v=value)
    return tag("td", breakable(shortened(cell, _TEXT)))

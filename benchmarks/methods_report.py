"""The results of benchmarks/methods.py: a JSON file, a table per task, and a plot."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

Result = dict[str, Any]

#: Task to the name of its quality, and the format of it.
QUALITY = {
    "language-model": ("bits/character", "{:.3f}"),
    "digits": ("accuracy, %", "{:.1f}"),
}


class Results:
    """Rows in a JSON file, which is written anew after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Result] = []
        if path.exists():
            self.rows = json.loads(path.read_text(encoding="utf-8"))

    def has(self, key: Result) -> bool:
        return any(key.items() <= row.items() for row in self.rows)

    def add(self, row: Result) -> None:
        self.rows.append(row)
        lines = ",\n".join(map(json.dumps, self.rows))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        partial.replace(self.path)


def markdown(rows: list[Result]) -> str:
    """A table for each task."""
    tasks = dict.fromkeys(row["task"] for row in rows)
    return "\n\n".join(task_table(task, [r for r in rows if r["task"] == task]) for task in tasks)


def task_table(task: str, rows: list[Result]) -> str:
    """Means over seeds; each seed's quality in brackets where there are several."""
    quality, digits = QUALITY[task]
    cells = [["method", quality, "bytes on disk", "times smaller", "bits"]]
    by_method = grouped(rows)
    full = mean(row["bytes"] for row in by_method.get("float32", []) or [{"bytes": float("nan")}])
    for method, runs in by_method.items():
        shown = digits.format(mean(row["quality"] for row in runs))
        if len(runs) > 1:
            shown += f" ({', '.join(digits.format(row['quality']) for row in runs)})"
        size, bits = (mean(row[key] for row in runs) for key in ("bytes", "mean_bits"))
        cells.append([method, shown, f"{size:,.0f}", f"{full / size:.1f}", f"{bits:.2f}"])
    return f"**{task}**\n\n{aligned(cells)}"


def grouped(rows: list[Result]) -> dict[str, list[Result]]:
    """Method to its runs, in the order of the seeds."""
    methods: dict[str, list[Result]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        methods.setdefault(row["method"], []).append(row)
    return methods


def aligned(cells: list[list[str]]) -> str:
    """A Markdown table whose columns also line up as text; numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [cells[0], rule, *cells[1:]]
    return "\n".join(
        "| "
        + " | ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in lines
    )


def plot(rows: list[Result], path: Path) -> None:
    """Quality against bytes, a panel for each task, a line for each family; the first seed."""
    from matplotlib import colormaps, rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"] = "diffq"  # the same results give the same file
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    families = list(dict.fromkeys(row["family"] for row in rows))
    figure = Figure(figsize=(6 * len(tasks), 5.5), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for number, family in enumerate(families):
            points = sorted(
                (row["bytes"] / 1000, row["quality"])
                for row in rows
                if (row["task"], row["family"], row["seed"]) == (task, family, 0)
            )
            style = {"marker": "osD^v<>"[number % 7], "color": colormaps["tab20"](number % 20)}
            line = "" if family == "subset" else "-"
            axes.plot(*zip(*points, strict=True), line, label=family, markersize=5, **style)
        axes.set(title=task, xlabel="kB on disk", ylabel=QUALITY[task][0], xscale="log")
        axes.grid(alpha=0.3, which="both")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, metadata=metadata)

"""The results of benchmarks/methods.py: a JSON file, a table per task, and a plot."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib import colormaps, rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure

#: What was measured of one row with one seed.
Result = dict[str, Any]

#: Task to the name of its quality, and the format of it.
QUALITY = {
    "language-model": ("bits/character", "{:.3f}"),
    "digits": ("accuracy, %", "{:.1f}"),
}
HEADER = ["bytes on disk", "times smaller", "bits"]
MARKERS = "osD^v<>"
TICKS = (20, 50, 100, 200, 500, 1000)
#: Qualities that the plot shows, where single methods would squeeze all others.
LIMITS = {"digits": (91.0, 97.2)}


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
        unfinished = self.path.with_suffix(".partial")
        unfinished.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        unfinished.replace(self.path)


def average(runs: list[Result]) -> Result:
    """One row for all seeds of a method."""
    return {**runs[0], **{key: mean(run[key] for run in runs) for key in ("quality", "bytes")}}


def methods_of(rows: list[Result], task: str) -> dict[str, list[Result]]:
    """Method to its runs, in the order of the seeds."""
    methods: dict[str, list[Result]] = {}
    for row in rows:
        if row["task"] == task:
            methods.setdefault(row["method"], []).append(row)
    return {name: sorted(runs, key=lambda run: run["seed"]) for name, runs in methods.items()}


def markdown(rows: list[Result]) -> str:
    """A table for each task."""
    tasks = dict.fromkeys(row["task"] for row in rows)
    return "\n\n".join(
        f"### {task}\n\n{aligned(task_cells(task, methods_of(rows, task)))}" for task in tasks
    )


def task_cells(task: str, methods: dict[str, list[Result]]) -> list[list[str]]:
    """Header and rows: means over seeds, and the quality of each seed where there are several."""
    quality, number = QUALITY[task]
    cells = [["method", quality, *HEADER]]
    whole = average(methods["float32"])["bytes"] if "float32" in methods else float("nan")
    for method, runs in methods.items():
        row = average(runs)
        shown = number.format(row["quality"])
        if len(runs) > 1:
            shown += f" ({', '.join(number.format(run['quality']) for run in runs)})"
        size = row["bytes"]
        cells.append(
            [method, shown, f"{size:,.0f}", f"{whole / size:.1f}", f"{row['mean_bits']:.2f}"]
        )
    return cells


def aligned(cells: list[list[str]]) -> str:
    """A Markdown table whose columns also line up as text; numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [
        [line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]
        for line in (cells[0], rule, *cells[1:])
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def plot(rows: list[Result], path: Path) -> None:
    """Quality against bytes: a panel for each task, a line for each family of methods."""
    rcParams["svg.hashsalt"] = "diffq"  # the same results give the same file
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    families = list(dict.fromkeys(row["family"] for row in rows))
    figure = Figure(figsize=(6.5 * len(tasks), 7), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        runs = [average(runs) for runs in methods_of(rows, task).values()]
        for number, family in enumerate(families):
            draw_family(axes, number, family, [run for run in runs if run["family"] == family])
        axes.set(title=task, xlabel="kB on disk", ylabel=QUALITY[task][0], xscale="log")
        axes.set_xticks(TICKS, list(map(str, TICKS)))
        axes.minorticks_off()
        axes.set_ylim(LIMITS.get(task))
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def draw_family(axes: Axes, number: int, family: str, runs: list[Result]) -> None:
    """A line of its sizes; subsets are points with their names."""
    runs = sorted(runs, key=lambda run: run["bytes"])
    points = [(run["bytes"] / 1000, run["quality"]) for run in runs]
    style = MARKERS[number % len(MARKERS)] + ("" if family == "subset" else "-")
    color = colormaps["tab20"](number % 20)
    sizes, qualities = [size for size, _ in points], [quality for _, quality in points]
    axes.plot(sizes, qualities, style, color=color, markersize=5, label=family)
    if family == "subset":
        for run, point in zip(runs, points, strict=True):
            name = run["method"].removeprefix("subset, ")
            axes.annotate(name, point, (4, 4), textcoords="offset points", size=8)

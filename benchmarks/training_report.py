"""From the times that benchmarks/training.py took to its table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

Row = dict[str, Any]
#: What a worker says of a model: its memory, or the error that ended it.
Answer = dict[str, Any]
#: Contender to one dict a round: "train" and "evaluate" to seconds of a step.
Times = dict[str, list[dict[str, float]]]


def summarize(case: str, answers: dict[str, Answer], times: Times) -> list[Row]:
    """A row for each contender: medians, and what it adds to plain training."""
    rows = []
    for name, answer in answers.items():
        row: Row = {"model": case, "contender": name}
        if "error" in answer:
            rows.append(row | {"error": answer["error"]})
            continue
        for mode in ("train", "evaluate"):
            seconds, plain = ([turn[mode] for turn in times[n]] for n in (name, "plain"))
            row |= compare(mode, seconds, plain)
        added = answer["peak_mb"] - answers["plain"]["peak_mb"]
        row |= {"peak_mb": answer["peak_mb"], "added_mb": added}
        row |= {"copies": added / answer["quantized_mb"], "device": answer["device"]}
        row["rounds"] = len(times[name])
        if "launches" in answer:
            row |= {"launches": answer["launches"], "gpu_ms": answer["gpu_ms"]}
            row["gpu_ratio"] = answer["gpu_ms"] / answers["plain"]["gpu_ms"]
        rows.append(row)
    return rows


def compare(mode: str, seconds: Sequence[float], plain: Sequence[float]) -> Row:
    """Medians over rounds of a time and of its ratio to plain's; the ratios' middle half."""
    ratios = sorted(mine / its for mine, its in zip(seconds, plain, strict=True))
    quarter = len(ratios) // 4
    return {
        f"{mode}_ms": 1000 * median(seconds),
        f"{mode}_ratio": median(ratios),
        f"{mode}_ratio_quartiles": [ratios[quarter], ratios[-1 - quarter]],
    }


HEADER = (
    "model",
    "contender",
    "step, ms",
    "× plain (middle half)",
    "added",
    "eval, ms",
    "× plain",
    "memory over plain, MB",
    "copies",
)

#: Columns that follow where a GPU was measured.
GPU_HEADER = ("launches", "GPU, ms", "GPU × plain")


def markdown(rows: Sequence[Row]) -> str:
    gpu = any("launches" in row for row in rows)
    header = HEADER + GPU_HEADER if gpu else HEADER
    table = [header, ["---"] * 2 + ["---:"] * (len(header) - 2)]
    table += [cells(row) + (gpu_cells(row) if gpu else []) for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in table)


def gpu_cells(row: Row) -> list[str]:
    if "error" in row:
        return [""] * len(GPU_HEADER)
    return [str(row["launches"]), f"{row['gpu_ms']:.2f}", f"{row['gpu_ratio']:.2f}"]


def cells(row: Row) -> list[str]:
    start = [row["model"], row["contender"]]
    if "error" in row:
        return [*start, row["error"].splitlines()[0][:80], *[""] * (len(HEADER) - 3)]
    low, high = row["train_ratio_quartiles"]
    return [
        *start,
        f"{row['train_ms']:.1f}",
        f"{row['train_ratio']:.2f} ({low:.2f}–{high:.2f})",
        f"{row['train_ratio'] - 1:+.0%}",
        f"{row['evaluate_ms']:.1f}",
        f"{row['evaluate_ratio']:.2f}",
        f"{row['added_mb']:.1f}",
        f"{row['copies']:.1f}",
    ]


def write(path: Path, settings: Row, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    results = {"settings": settings, "rows": rows}
    Path(f"{path}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    Path(f"{path}.md").write_text(markdown(rows) + "\n", encoding="utf-8")

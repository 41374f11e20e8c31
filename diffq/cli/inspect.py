"""`diffq inspect`: what a file holds, tensor by tensor. Needs no torch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from diffq.cli.common import (
    Subparsers,
    add_budget,
    add_command,
    budget,
    megabytes,
    print_json,
    print_table,
    progress,
    ratio,
    say,
)
from diffq.cli.kinds import check_diffq
from diffq.reports.text import printable, shape

if TYPE_CHECKING:
    from diffq.reports.summary import Summary, Tensor

# Raw tensors below this share of the file are one row, unless all are asked for.
_LITTLE = 0.01

_BARS = "▁▂▃▄▅▆▇█"


def add_parser(subparsers: Subparsers) -> None:
    """Adds the command."""
    parser = add_command(
        subparsers,
        "inspect",
        run,
        "list what a file holds",
        "Lists the tensors of a file: shape, bitwidths, bytes, and how near the bytes are to "
        "the entropy of levels, bit map and raw tensors, which no coder of single symbols can "
        "beat. The bars show how many weights have each bitwidth.",
        "diffq inspect model.diffq\n"
        "diffq inspect --index huge.diffq\n"
        "diffq inspect --json model.diffq | jq '.tensors[].mean_bits'",
    )
    parser.add_argument("file", metavar="FILE", help="a file of diffq")
    parser.add_argument(
        "--all", action="store_true", help="list the raw tensors below 1%% of the file too"
    )
    parser.add_argument(
        "--index",
        action="store_true",
        help="read the index only, which takes no time: no bitwidths, no entropy",
    )
    add_budget(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from diffq.reports.summary import summarize
    from diffq.storage.open import StoredModel

    check_diffq(args.file)
    with StoredModel(args.file, budget(args)) as stored, progress(args) as report:
        summary = summarize(stored.reader, not args.index, report)
    if args.json:
        print_json(describe(str(stored.path), summary))
    else:
        _print(summary, args.all)
    return 0


def describe(path: str, summary: Summary) -> dict[str, Any]:
    """Everything that is printed, as plain JSON."""
    return {
        "file": path,
        "bytes": summary.size,
        "overhead_bytes": summary.overhead,
        "float32_bytes": summary.float32_bytes,
        "times_smaller": summary.float32_bytes / summary.size,
        "entropy_bound_bytes": summary.bound_bytes,
        "quantized_weights": summary.weights,
        "mean_bits": summary.mean_bits,
        "metadata": dict(summary.metadata),
        "tensors": [_describe_tensor(tensor, summary) for tensor in summary.tensors],
    }


def _describe_tensor(tensor: Tensor, summary: Summary) -> dict[str, Any]:
    entry, decoded = tensor.entry, tensor.decoded
    return {
        "name": tensor.name,
        "tied": list(tensor.tied),
        "shape": list(entry.shape),
        "weights": entry.numel,
        "dtype": entry.dtype,
        "kind": entry.kind,
        **tensor.detail,
        "codings": list(tensor.codings),
        "bits": {str(width): count for width, count in tensor.counts.items()} or None,
        "mean_bits": tensor.mean_bits,
        "bytes": tensor.size,
        "share": tensor.size / summary.size,
        "entropy_bound_bytes": decoded.bound_bytes if decoded else None,
    }


def _print(summary: Summary, everything: bool) -> None:
    header = ["tensor", "shape", "dtype", "kind", "groups", "bits", "mean", "coding"]
    header += ["bytes", "share", "bound"]
    folded = [] if everything else _little(summary)
    rows = [_row(tensor, summary) for tensor in summary.tensors if tensor not in folded]
    if folded:
        what = "raw" if all(tensor.entry.kind == "raw" for tensor in folded) else "small"
        rows.append(_rest(f"({len(folded)} {what} tensors, see --all)", folded, summary))
    size, overhead = summary.size, summary.overhead
    head = ["(index, metadata)", *[""] * 7]
    rows.append([*head, f"{overhead:,}", f"{overhead / size:.1%}", ""])
    total = [f"{len(summary.tensors)} tensors", *[""] * 5, ratio(summary.mean_bits), ""]
    total += [f"{size:,}", "100.0%", _bound(summary.bound_bytes)]
    if summary.bound_bytes is None:
        header, total, *rows = (line[:-1] for line in (header, total, *rows))
    print_table(header, rows, total, left=4)
    times, in_float32 = summary.float32_bytes / size, megabytes(summary.float32_bytes)
    say(f"{megabytes(size)}: {times:.2f} times smaller than float32 ({in_float32})")
    if bound := summary.bound_bytes:
        say(f"{size / bound:.4f} times the entropy bound ({megabytes(bound)})")
    if summary.metadata:
        text = json.dumps(summary.metadata, ensure_ascii=False, sort_keys=True)
        say(f"metadata: {printable(text)}")


def _little(summary: Summary) -> list[Tensor]:
    """Raw tensors, and those with one scale, that are one row; none if that would save no row."""
    alike = [tensor for tensor in summary.tensors if tensor.entry.kind in ("raw", "scaled")]
    little = [tensor for tensor in alike if tensor.size < _LITTLE * summary.size]
    return little if len(little) > 1 else []


def _row(tensor: Tensor, summary: Summary) -> list[str]:
    detail = tensor.detail
    return [
        printable(" = ".join([tensor.name, *tensor.tied])),
        shape(tensor.entry.shape),
        tensor.entry.dtype,
        tensor.kind,
        str(detail["groups"]) if detail["group_size"] else "-",
        histogram(tensor.counts) if tensor.counts else "-",
        ratio(tensor.mean_bits),
        "+".join(tensor.codings) or "-",
        *_sizes([tensor], summary),
    ]


def _rest(name: str, tensors: list[Tensor], summary: Summary) -> list[str]:
    return [name, *[""] * 7, *_sizes(tensors, summary)]


def _sizes(tensors: list[Tensor], summary: Summary) -> list[str]:
    size = sum(tensor.size for tensor in tensors)
    bounds = [tensor.decoded.bound_bytes for tensor in tensors if tensor.decoded]
    return [f"{size:,}", f"{size / summary.size:.1%}", _bound(sum(bounds))]


def _bound(size: float | None) -> str:
    return "" if size is None else f"{size:,.0f}"


def histogram(counts: Mapping[int, int]) -> str:
    """Weights at each bitwidth as bars between the lowest and highest in use: `2▂█▅5`."""
    lowest, highest = min(counts), max(counts)
    if lowest == highest:
        return str(lowest)
    most = max(counts.values())
    heights = [counts.get(width, 0) for width in range(lowest, highest + 1)]
    bars = (_BARS[height * (len(_BARS) - 1) // most] if height else " " for height in heights)
    return f"{lowest}{''.join(bars)}{highest}"

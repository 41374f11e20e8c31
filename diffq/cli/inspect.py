"""`diffq inspect`: what a file holds, tensor by tensor. Needs no torch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from diffq.cli.common import (
    Report,
    Subparsers,
    add_budget,
    add_command,
    budget,
    coded_bits,
    level_counts,
    mean_bits,
    megabytes,
    print_json,
    print_table,
    printable,
    progress,
    ratio,
    say,
)
from diffq.cli.kinds import check_diffq

if TYPE_CHECKING:
    from diffq.format.kinds.base import Entry, Record
    from diffq.storage.open import StoredModel

# What some kinds of tensors have, and what is told of others.
_DETAILS = {
    "stored_dtype": None,
    "group_size": None,
    "groups": 0,
    "zero_point": False,
    "block_size": None,
    "codewords": None,
}

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
        "--index",
        action="store_true",
        help="read the index only, which takes no time: no bitwidths, no entropy",
    )
    add_budget(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from diffq.storage.open import StoredModel

    check_diffq(args.file)
    with StoredModel(args.file, budget(args)) as stored, progress(args) as report:
        described = describe(stored, not args.index, report)
    if args.json:
        print_json(described)
    else:
        _print(described)
    return 0


def describe(stored: StoredModel, decode: bool, report: Report) -> dict[str, Any]:
    """Everything that is printed, as plain JSON.

    Args:
        stored: the file.
        decode: decode the levels for bitwidths and entropy.
        report: told about the progress.
    """
    from diffq.format.kinds.base import QuantizedEntry

    tied: dict[str, list[str]] = {name: [] for name in stored.entries}
    for alias, name in stored.aliases.items():
        tied[name].append(alias)
    tensors, coded = [], []
    for number, (name, entry) in enumerate(stored.entries.items()):
        report("reading levels", number, len(tied) if decode else 0)
        described = _describe_tensor(stored, name, entry, tied[name])
        if decode:
            record = stored.reader.record(name)
            described |= _describe_record(record)
            coded.append(coded_bits(record))
        tensors.append(described)
    in_float32 = sum(_float32_bytes(entry) for entry in stored.entries.values())
    return {
        "file": str(stored.path),
        "bytes": stored.size,
        "overhead_bytes": stored.size - sum(tensor["bytes"] for tensor in tensors),
        "float32_bytes": in_float32,
        "times_smaller": in_float32 / stored.size,
        "entropy_bound_bytes": sum(t["entropy_bound_bytes"] for t in tensors) if decode else None,
        "quantized_weights": sum(
            e.numel for e in stored.entries.values() if isinstance(e, QuantizedEntry)
        ),
        "mean_bits": mean_bits(coded),
        "metadata": dict(stored.metadata),
        "tensors": tensors,
    }


def _describe_tensor(
    stored: StoredModel, name: str, entry: Entry, tied: list[str]
) -> dict[str, Any]:
    """What the index tells."""
    size = stored.stored_bytes(name)
    return {
        "name": name,
        "tied": tied,
        "shape": list(entry.shape),
        "weights": entry.numel,
        "dtype": entry.dtype,
        "kind": entry.kind,
        **{key: getattr(entry, key, absent) for key, absent in _DETAILS.items()},
        "codings": stored.reader.codings(name),
        "bits": None,
        "mean_bits": None,
        "bytes": size,
        "share": size / stored.size,
        "entropy_bound_bytes": None,
    }


def _describe_record(record: Record) -> dict[str, Any]:
    """What only the decoded levels or indices tell."""
    counts = level_counts(record)
    return {
        "bits": {str(width): count for width, count in counts.items()} or None,
        "mean_bits": mean_bits([coded_bits(record)]),
        "entropy_bound_bytes": record.entropy_bound_bits() / 8,
    }


def _float32_bytes(entry: Entry) -> int:
    """Bytes of the tensor in a float32 checkpoint; integers and the like as they are."""
    from diffq.format.dtypes import ITEM_SIZES

    return entry.numel * (4 if "float" in entry.dtype else ITEM_SIZES[entry.dtype])


def _print(described: dict[str, Any]) -> None:
    tensors = described["tensors"]
    header = ["tensor", "shape", "dtype", "kind", "groups", "bits", "mean", "coding"]
    header += ["bytes", "share"]
    total = [
        *(f"{len(tensors)} tensors", "", "", "", ""),
        *("", ratio(described["mean_bits"]), "", f"{described['bytes']:,}", "100.0%"),
    ]
    overhead = described["overhead_bytes"]
    rest = ["(index, metadata)", *[""] * 7, f"{overhead:,}", _share(described)]
    bound = described["entropy_bound_bytes"]
    lines = [_row(tensor) for tensor in tensors]
    if bound is not None:
        header.append("bound")
        total.append(f"{bound:,.0f}")
        rest.append("")
        lines = [
            [*line, f"{t['entropy_bound_bytes']:,.0f}"]
            for line, t in zip(lines, tensors, strict=True)
        ]
    print_table(header, [*lines, rest], total, left=4)
    times = described["times_smaller"]
    size, in_float32 = megabytes(described["bytes"]), megabytes(described["float32_bytes"])
    say(f"{size}: {times:.2f} times smaller than float32 ({in_float32})")
    if bound:
        say(f"{described['bytes'] / bound:.4f} times the entropy bound ({megabytes(bound)})")
    if described["metadata"]:
        text = json.dumps(described["metadata"], ensure_ascii=False, sort_keys=True)
        say(f"metadata: {printable(text)}")


def _row(tensor: dict[str, Any]) -> list[str]:
    return [
        printable(" = ".join([tensor["name"], *tensor["tied"]])),
        "x".join(map(str, tensor["shape"])) or "()",
        tensor["dtype"],
        _kind(tensor),
        str(tensor["groups"]) if tensor["group_size"] else "-",
        histogram(tensor["bits"]) if tensor["bits"] else "-",
        ratio(tensor["mean_bits"]),
        "+".join(tensor["codings"]) or "-",
        f"{tensor['bytes']:,}",
        f"{tensor['share']:.1%}",
    ]


def _kind(tensor: dict[str, Any]) -> str:
    """The kind, with what is special: a zero point, a codebook, what elements are stored as."""
    words, stored = [tensor["kind"]], tensor["stored_dtype"]
    if tensor["codewords"]:
        words.append(f"{tensor['codewords']}x{tensor['block_size']}")
    if tensor["zero_point"]:
        words.append("zero-point")
    # A raw tensor can be stored in another dtype than it is restored to.
    if tensor["codewords"] or stored not in (None, tensor["dtype"]):
        words.append(stored)
    return " ".join(words)


def _share(described: dict[str, Any]) -> str:
    return f"{described['overhead_bytes'] / described['bytes']:.1%}"


def histogram(bits: Mapping[str, int]) -> str:
    """Weights at each bitwidth as bars between the lowest and highest in use: `2▂█▅5`."""
    lowest, highest = min(map(int, bits)), max(map(int, bits))
    if lowest == highest:
        return str(lowest)
    most = max(bits.values())
    counts = [bits.get(str(width), 0) for width in range(lowest, highest + 1)]
    bars = (_BARS[count * (len(_BARS) - 1) // most] if count else " " for count in counts)
    return f"{lowest}{''.join(bars)}{highest}"

"""`diffq diff`: how two models differ, tensor by tensor."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING, Any

from diffq.cli.common import (
    Subparsers,
    add_budget,
    add_command,
    budget,
    error_measures,
    finite,
    megabytes,
    note,
    print_json,
    print_table,
    progress,
    ratio,
    say,
)
from diffq.reports.text import printable

if TYPE_CHECKING:
    from torch import Tensor

    from diffq.cli.checkpoint import OpenModel
    from diffq.reports.summary import Progress

_DESCRIPTION = """\
Compares two models: files of diffq, safetensors or torch checkpoints, in any combination.
A is the reference. For each tensor: the bitwidths, the relative error |B - A| / |A| (2-norm),
the largest difference of two elements, and the signal-to-noise ratio
20 log10(|A| / |B - A|) in dB. The exit code is 1 if names, shapes or dtypes differ, and 0
however much the values do.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Adds the command."""
    parser = add_command(
        subparsers,
        "diff",
        run,
        "compare two models: sizes, bits, errors",
        _DESCRIPTION,
        "diffq diff model.safetensors model.diffq\n"
        "diffq diff checkpoint.pt model.diffq --key model\n"
        "diffq diff --json old.diffq new.diffq | jq .snr_db",
    )
    parser.add_argument("a", metavar="A", help="the reference")
    parser.add_argument("b", metavar="B", help="what is compared with it")
    parser.add_argument("--key", help="where torch checkpoints keep their state dict, if nested")
    add_budget(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from diffq.cli.checkpoint import open_model
    from diffq.cli.kinds import kind_of

    # A file of diffq needs no key, whatever the other one is.
    keys = [args.key if kind_of(path) == "torch" else None for path in (args.a, args.b)]
    tell = partial(note, args)
    with (
        progress(args) as report,
        open_model(args.a, keys[0], budget(args), tell) as a,
        open_model(args.b, keys[1], budget(args), tell) as b,
    ):
        compared = compare(a, b, report) | {"a": args.a, "b": args.b}
    if args.json:
        print_json(compared)
    else:
        _print(compared)
    return 0 if compared["comparable"] else 1


def compare(a: OpenModel, b: OpenModel, report: Progress) -> dict[str, Any]:
    """Everything that is printed, as plain JSON."""
    both = [name for name in a.names if name in b.names]
    # Tied names are compared once.
    pairs = {(a.names[name], b.names[name]): name for name in reversed(both)}
    tensors, error, power = [], 0.0, 0.0
    for done, ((in_a, in_b), name) in enumerate(reversed(pairs.items())):
        report("comparing", done, len(pairs))
        one, other = a.tensors[in_a], b.tensors[in_b]
        described, squares = _compare_tensors(one, other)
        error, power = error + squares[0], power + squares[1]
        bits = {"bits_a": a.mean_bits(in_a), "bits_b": b.mean_bits(in_b)}
        tensors.append({"name": name, **described, **bits})
    only_a = [name for name in a.names if name not in b.names]
    only_b = [name for name in b.names if name not in a.names]
    return {
        "bytes_a": a.size,
        "bytes_b": b.size,
        **error_measures(error, power),
        "identical": not (only_a or only_b) and all(tensor["identical"] for tensor in tensors),
        "comparable": not (only_a or only_b) and all(not tensor["mismatch"] for tensor in tensors),
        "only_a": only_a,
        "only_b": only_b,
        "tensors": tensors,
    }


def _compare_tensors(a: Tensor, b: Tensor) -> tuple[dict[str, Any], tuple[float, float]]:
    """What is said of one tensor, and the squared norms of the error and of `a`."""
    import torch

    dtypes = [str(tensor.dtype).removeprefix("torch.") for tensor in (a, b)]
    described: dict[str, Any] = {"shape": list(a.shape), "dtype": dtypes[0], "mismatch": None}
    if a.shape != b.shape:
        described["mismatch"] = f"shape {list(a.shape)} and {list(b.shape)}"
    elif a.dtype != b.dtype:
        described["mismatch"] = f"dtype {dtypes[0]} and {dtypes[1]}"
    if a.shape != b.shape:
        return {**described, "identical": False, "max_abs": None, **error_measures(0, 0)}, (
            0.0,
            0.0,
        )
    same = a.dtype == b.dtype and _bytes(a).equal(_bytes(b))
    wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
    reference = a.to(wide)
    difference = torch.zeros(()) if same else (b.to(wide) - reference).abs()
    squares = float(difference.square().sum()), float(reference.abs().square().sum())
    largest = float(difference.max()) if difference.numel() else 0.0
    described |= {"identical": same, "max_abs": finite(largest), **error_measures(*squares)}
    return described, squares


def _bytes(tensor: Tensor) -> Tensor:
    """A tensor's elements as bytes, so that NaN equals itself."""
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _print(compared: dict[str, Any]) -> None:
    for name in ("a", "b"):
        path, size = printable(compared[name]), compared[f"bytes_{name}"]
        say(f"{name.upper()}: {path}: {megabytes(size)} ({size:,} bytes)")
    header = ["tensor", "shape", "bits A", "bits B", "relative error", "max error", "SNR dB"]
    total = [f"{len(compared['tensors'])} tensors", "", "", "", *_cells(compared)]
    print_table(header, [_row(tensor) for tensor in compared["tensors"]], total, left=2)
    for name in ("a", "b"):
        for only in compared[f"only_{name}"]:
            say(f"only in {name.upper()}: {printable(only)}")
    for tensor in compared["tensors"]:
        if tensor["mismatch"]:
            say(f"{printable(tensor['name'])}: {tensor['mismatch']}")
    times = compared["bytes_a"] / compared["bytes_b"]
    sizes = f"{times:.2f} times smaller" if times >= 1 else f"{1 / times:.2f} times larger"
    values = "the same values; " if compared["identical"] else ""
    say(f"{values}B is {sizes} than A")


def _row(tensor: dict[str, Any]) -> list[str]:
    shape = "x".join(map(str, tensor["shape"])) or "()"
    bits = (ratio(tensor[f"bits_{name}"]) for name in ("a", "b"))
    return [printable(tensor["name"]), shape, *bits, *_cells(tensor)]


def _cells(described: dict[str, Any]) -> list[str]:
    if described["identical"]:
        return ["0", "0", "exact"]
    error, largest = described["relative_error"], described.get("max_abs")
    return [
        "-" if error is None else f"{error:.3g}",
        "-" if largest is None else f"{largest:.3g}",
        ratio(described["snr_db"], digits=1),
    ]

"""Draw quality against bytes: train to several sizes, with several methods and seeds.

    python examples/sweep.py --sizes 0.03 0.05 0.08 0.12
    python examples/sweep.py --sizes 0.05 0.1 --methods rounding entropy --seeds 0 1 2
    python examples/sweep.py --lams 0.5 2 8 --methods rounding    # prices of a MB, not sizes
    python examples/sweep.py --sizes 0.05 --out curves/mine.svg

Each training adds a line to a .jsonl file beside the picture, and its compressed model to a
folder of that name, and draws the picture again. Interrupt the sweep when you like: the same
command trains what is missing, and more seeds, sizes or methods add to the results.

To sweep a model of your own, copy this file and common.py, and write the functions under "The
task" anew. The rest of the file knows nothing else of the model and the data.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

import diffq
import mnist
from common import Method, add_training_options, console, fit, megabytes, print_table, save

# The task: replace from here ...

QUALITY = "accuracy, %"
MIN_SIZE = mnist.MIN_SIZE  # MB; smaller tensors take --small-bits
Data = mnist.Digits


def load_data(seed: int) -> tuple[Data, Data]:
    """What to train on, and what to measure the quality on."""
    return mnist.load_digits(seed)


def make_model() -> nn.Module:
    """A fresh model; torch's seed is set."""
    return mnist.ResNet()


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a training, whose schedule is a warm-up and a cosine."""
    return mnist.make_optimizer(model)


def training_loss(model: nn.Module, data: Data, batches: torch.Generator) -> Tensor:
    """The loss of one step, on a batch drawn with the generator."""
    return mnist.training_loss(model, data, batches)


def quality(model: nn.Module, data: Data) -> float:
    """The number to draw."""
    return mnist.evaluate(model, data).accuracy


# ... to here.

METHODS = ["float32", "qat", "gaussian", "rounding", "rounding-1bit", "entropy"]

#: What one training was, and what came of it.
Result = dict[str, Any]


def sized_methods(args: argparse.Namespace) -> dict[str, Any]:
    """Quantizers that train to a size or with a price."""
    small = {"min_size": MIN_SIZE, "small_bits": args.small_bits or None}
    learned = partial(diffq.DiffQuantizer, group_size=args.group_size, **small)
    return {
        "gaussian": partial(learned, noise="gaussian"),
        "rounding": partial(learned, noise="rounding"),
        "rounding-1bit": partial(learned, noise="rounding", min_bits=1),
        "entropy": partial(diffq.EntropyQuantizer, **small),
    }


def plans(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The name of each size or price, and the arguments of `setup_optimizer` for it."""
    length = {"steps": args.steps, "float_share": args.float_share}
    if args.sizes:
        return {
            f"{size:g} MB": {"target_mb": size, "lr": args.bits_lr, **length} for size in args.sizes
        }
    planned = {} if args.no_plan else length
    return {f"λ {lam:g}": {"lam": lam, "lr": args.bits_lr, **planned} for lam in args.lams}


def methods(args: argparse.Namespace) -> Iterator[tuple[Result, Method]]:
    """Each training of one seed: what it is called in the results, and its method."""
    small = {"min_size": MIN_SIZE, "small_bits": args.small_bits or None}
    for name in args.methods:
        if name == "float32":
            yield {"method": name, "asked": ""}, Method(name)
        elif name == "qat":
            for bits in args.qat_bits:
                attach = partial(diffq.QATQuantizer, bits=bits, **small)
                asked = f"{bits} bit{'s' if bits > 1 else ''}"
                yield {"method": name, "asked": asked}, Method(f"qat {asked}", attach)
        else:
            for asked, setup in plans(args).items():
                method = Method(f"{name} {asked}", sized_methods(args)[name], setup)
                yield {"method": name, "asked": asked}, method


def settings(args: argparse.Namespace) -> Result:
    """What results must have in common to be compared."""
    names = ("steps", "group_size", "small_bits", "bits_lr", "float_share", "no_plan")
    return {name: getattr(args, name) for name in names}


class Results:
    """Lines of JSON, one for each training; a line that an interruption cut off is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
        self.rows: list[Result] = [json.loads(line) for line in whole.splitlines()]
        self._complete = len(whole) + 1 if whole else 0

    def has(self, key: Result) -> bool:
        return any(key.items() <= row.items() for row in self.rows)

    def add(self, row: Result) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        with self.path.open("r+b" if self.path.exists() else "wb") as file:
            file.seek(self._complete)
            file.truncate()
            file.write(line)
        self._complete += len(line)
        self.rows.append(row)


def run(method: Method, seed: int, args: argparse.Namespace) -> Result:
    """Trains, saves, and measures what a fresh model computes from the file."""
    train_set, test_set = load_data(seed)
    model, quantizer = fit(
        method,
        make_model,
        make_optimizer,
        lambda model, batches: training_loss(model, train_set, batches),
        seed=seed,
        steps=args.steps,
        warmup=min(20, args.steps),
    )
    folder = args.out.with_suffix("")
    path = save(model, quantizer, folder, f"{method.name} seed {seed}")
    if quantizer is not None:
        model = diffq.load(path, make_model())
    return {"mb": megabytes(path), "quality": quality(model, test_set)}


def sweep(results: Results, args: argparse.Namespace) -> None:
    """Does the trainings that are missing, seed by seed."""
    for seed in args.seeds:
        for key, method in methods(args):
            key = {**key, "seed": seed, **settings(args)}
            if results.has(key):
                continue
            try:
                results.add({**key, **run(method, seed, args)})
                draw(curves(results, args), args)
            except diffq.ConfigError as error:
                console.print(f"No {method.name}: {error}")


def curves(results: Results, args: argparse.Namespace) -> dict[str, dict[str, list[Result]]]:
    """Method to what was asked to the runs of all seeds, smallest files first."""
    found: dict[str, dict[str, list[Result]]] = {}
    for row in sorted(results.rows, key=lambda row: row["mb"]):
        if settings(args).items() <= row.items():
            found.setdefault(row["method"], {}).setdefault(row["asked"], []).append(row)
    return {name: found[name] for name in METHODS if name in found}


def spread(runs: list[Result], column: str) -> tuple[float, float]:
    """Mean and standard deviation over seeds; 0 for one seed."""
    values = [run[column] for run in runs]
    return mean(values), stdev(values) if len(values) > 1 else 0.0


def print_results(found: dict[str, dict[str, list[Result]]]) -> None:
    rows = []
    for name, curve in found.items():
        for asked, runs in curve.items():
            middle, deviation = spread(runs, "quality")
            size, _ = spread(runs, "mb")
            seeds = " ".join(str(run["seed"]) for run in sorted(runs, key=lambda run: run["seed"]))
            shown = f"{middle:.2f} ± {deviation:.2f}" if len(runs) > 1 else f"{middle:.2f}"
            rows.append([name, asked, f"{size:.4f}", shown, seeds])
    header = ["method", "asked", "MB on disk", QUALITY, "seeds"]
    print_table("Quality against bytes", header, rows)


def draw(found: dict[str, dict[str, list[Result]]], args: argparse.Namespace) -> None:
    """A line for each method, with its standard deviation, over the size of the file."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"] = "diffq"  # the same results give the same file
    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for (name, curve), marker in zip(found.items(), "*so^vD", strict=False):
        points = [(*spread(runs, "mb"), *spread(runs, "quality")) for runs in curve.values()]
        if name == "float32":
            size, _, height, _ = points[0]
            axes.axhline(height, color="0.5", linestyle="--", label=f"float32, {size:.2f} MB")
            continue
        sizes, _, heights, deviations = zip(*points, strict=True)
        axes.errorbar(sizes, heights, deviations, marker=marker, capsize=3, label=name)
    axes.set(xlabel="MB on disk", ylabel=QUALITY, ylim=args.range)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, metadata={"Date": None} if args.out.suffix == ".svg" else None)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--sizes", type=float, nargs="+", metavar="MB", help="sizes of the file")
    asked.add_argument(
        "--lams", type=float, nargs="+", metavar="LAM", help="prices of one MB in place of sizes"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=["float32", "qat", "rounding", "entropy"],
        metavar="METHOD",
        help=f"which of {', '.join(METHODS)} to train (default: float32 qat rounding entropy)",
    )
    parser.add_argument(
        "--qat-bits",
        type=int,
        nargs="+",
        default=[2, 3, 4],
        metavar="BITS",
        help="bitwidths of qat, which takes no sizes (default: 2 3 4)",
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], metavar="SEED", help="seeds (default: 0)"
    )
    parser.add_argument(
        "--float-share",
        type=float,
        default=0.5,
        help="share of the steps in plain float (default: %(default)s)",
    )
    parser.add_argument(
        "--no-plan",
        action="store_true",
        help="with --lams: the price from the first step on, without steps in plain float",
    )
    add_training_options(parser, steps=500, bits_lr=None)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/sweep.svg"),
        help="picture to draw, .svg or .png (default: %(default)s)",
    )
    parser.add_argument(
        "--range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="qualities that the picture shows (default: all)",
    )
    args = parser.parse_args()
    check_picture(parser, args.out)
    return args


def check_picture(parser: argparse.ArgumentParser, path: Path) -> None:
    """Ends before any training where the picture could not be drawn."""
    if path.suffix not in (".svg", ".png"):
        parser.error(f"--out must end in .svg or .png, got {path}")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        parser.error("The picture needs matplotlib: run `pip install matplotlib`")


def main() -> None:
    args = parse_arguments()
    results = Results(args.out.with_suffix(".jsonl"))
    sweep(results, args)
    found = curves(results, args)
    if not found:
        sys.exit("No method can reach a size: ask for more MB.")
    print_results(found)
    draw(found, args)
    console.print(f"Picture: {args.out}")


if __name__ == "__main__":
    main()

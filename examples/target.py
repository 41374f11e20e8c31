"""Ask for a size in MB, and get a file of that size: a small network on handwritten digits.

    python examples/target.py                          # 0.06 MB, 20 times smaller than float32
    python examples/target.py --target-mb 0.05 0.1     # two trainings, two sizes
    python examples/target.py --lam 2                  # the same network with a price instead

The first half of the steps trains in plain float. Then the size goes to the target, by a price
that is found on the way, and the last steps settle with fixed bitwidths.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

import diffq
from common import console, make_parser, megabytes, print_table, save, train
from mnist import MIN_SIZE, Digits, ResNet, evaluate, load_digits, training_loss


def run(
    target_mb: float | None,
    lam: float,
    train_set: Digits,
    test_set: Digits,
    args: argparse.Namespace,
) -> tuple[Path, float]:
    """Trains to a size, or with a price from the first step; the file and the accuracy."""
    torch.manual_seed(args.seed)
    model = ResNet()
    quantizer = diffq.DiffQuantizer(
        model,
        group_size=args.group_size,
        min_size=MIN_SIZE,
        small_bits=args.small_bits or None,
        noise=args.noise,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    if target_mb is None:
        quantizer.setup_optimizer(optimizer, lr=args.bits_lr, lam=lam)
        title = f"lam {lam:g}"
    else:
        quantizer.setup_optimizer(
            optimizer, target_mb=target_mb, steps=args.steps, float_share=args.float_share
        )
        title = f"{target_mb:g} MB"
    batches = torch.Generator().manual_seed(args.seed)
    train(
        title,
        lambda: training_loss(model, train_set, batches),
        optimizer,
        quantizer,
        lam=0.0,
        steps=args.steps,
        warmup=20,
    )
    if quantizer.target is not None:
        console.print(quantizer.target)
    path = save(model, quantizer, args.out, title.replace(" ", "_"))
    loaded = diffq.load(path, ResNet())
    return path, evaluate(loaded, test_set).accuracy


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, steps=500, bits_lr=0.1, out=Path("out/target"))
    parser.add_argument(
        "--target-mb",
        type=float,
        nargs="+",
        default=[0.06],
        help="sizes of the file, one training for each (default: %(default)s)",
    )
    parser.add_argument(
        "--float-share",
        type=float,
        default=0.5,
        help="share of the steps in plain float (default: %(default)s)",
    )
    parser.add_argument(
        "--lam",
        type=float,
        nargs="+",
        help="prices of one MB from the first step, one training for each, in place of sizes",
    )
    parser.add_argument(
        "--noise",
        choices=["gaussian", "uniform", "rounding"],
        default="rounding",
        help="kind of noise (default: %(default)s)",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    train_set, test_set = load_digits(args.seed)
    wanted = [(None, lam) for lam in args.lam] if args.lam else [(mb, 0.0) for mb in args.target_mb]
    rows, missed = [], False
    for target_mb, lam in wanted:
        path, accuracy = run(target_mb, lam, train_set, test_set, args)
        size = megabytes(path)
        asked = f"lam {lam:g}" if target_mb is None else f"{target_mb:g} MB"
        of_target = "" if target_mb is None else f"{size / target_mb:.4f}"
        missed |= target_mb is not None and not 0.99 * target_mb <= size <= target_mb
        rows.append([asked, f"{size:.5f}", of_target, f"{accuracy:.1f} %"])
    print_table("MNIST, 5,000 images", ["asked", "MB on disk", "of target", "accuracy"], rows)
    if missed:
        sys.exit("A file has not the size that was asked for.")


if __name__ == "__main__":
    main()

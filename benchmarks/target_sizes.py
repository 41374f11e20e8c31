"""A byte language model: a price from the first step, or a size by name.

python benchmarks/target_sizes.py --steps 1200 --lam 1
python benchmarks/target_sizes.py --steps 1200 --target-mb 0.0391
python benchmarks/target_sizes.py --steps 1200 --target-mb 0.0286 --method entropy
python benchmarks/target_sizes.py --steps 1200 --method float
python benchmarks/target_sizes.py --width 128 --layers 4 --batch 16 --steps 3000 --target-mb 0.1
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import diffq

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from common import MEGABYTE, warmup_cosine
from language_model import (
    Transformer,
    bits_per_character,
    load_text,
    make_optimizer,
    nats,
    random_sequences,
)

VALIDATION_BYTES = 60_000


def make_quantizer(args: argparse.Namespace, model: nn.Module) -> Any:
    """The quantizer of a method; None for plain training."""
    options = {"min_size": 0.001, "small_bits": args.small_bits or None}
    if args.method == "float":
        return None
    if args.method == "entropy":
        return diffq.EntropyQuantizer(model, **options)
    if args.method.startswith("qat"):
        return diffq.QATQuantizer(model, bits=int(args.method[3:]), **options)
    return diffq.DiffQuantizer(model, noise=args.method, min_bits=args.min_bits, **options)


def set_up(args: argparse.Namespace, quantizer: Any, optimizer: torch.optim.Optimizer) -> None:
    """Sets the price or the size that was asked for, if there is one."""
    if args.target_mb is not None:
        plan = {"target_mb": args.target_mb, "steps": args.steps, "float_share": args.float_share}
        quantizer.setup_optimizer(optimizer, **plan)
    elif args.lam is not None:
        quantizer.setup_optimizer(optimizer, lr=args.bits_lr, lam=args.lam)


def run(args: argparse.Namespace) -> dict[str, object]:
    """Trains once; the size of the file and the quality."""
    train_text, valid_text = load_text()
    torch.manual_seed(args.seed)
    model = Transformer(args.width, args.layers)
    optimizer = make_optimizer(model)
    quantizer = make_quantizer(args, model)
    if quantizer is not None:
        set_up(args, quantizer, optimizer)
    schedule = warmup_cosine(optimizer, args.steps, min(100, args.steps // 4))
    batches = torch.Generator().manual_seed(args.seed)
    for step in range(args.steps):
        loss = nats(model, random_sequences(train_text, batches, args.batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % max(1, args.steps // 10) == 0:
            target = "" if quantizer is None else quantizer.target
            print(f"{step} {loss.item() / math.log(2):.3f} {target}", file=sys.stderr)
    file = io.BytesIO()
    if quantizer is not None:
        diffq.save(quantizer, file, codec=args.codec)
    return {
        **vars(args),
        "file_mb": file.getbuffer().nbytes / MEGABYTE,
        "bits_per_character": bits_per_character(model, valid_text[: args.validation_bytes]),
    }


def main() -> None:
    """Prints the result as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--lam", type=float, help="price of one MB from the first step on")
    asked.add_argument("--target-mb", type=float, help="MB of the file")
    rows: list[tuple[str, type, Any, str]] = [
        (
            "method",
            str,
            "rounding",
            "float, rounding, gaussian, uniform, entropy, or qat4 and so on",
        ),
        ("min-bits", int, 2, "lowest bitwidth of DiffQ"),
        ("float-share", float, None, "share of the steps in plain float, for a size by name"),
        ("steps", int, 1200, "steps of the optimizer"),
        ("seed", int, 0, "of the weights and the batches"),
        ("width", int, 64, "features"),
        ("layers", int, 2, "layers"),
        ("batch", int, 8, "sequences in a batch"),
        ("small-bits", int, 0, "bitwidth of biases and norms; 0 leaves them in float32"),
        ("codec", str, "rans", "of the file"),
        ("bits-lr", float, 0.05, "learning rate of what is learned, with a price"),
        ("validation-bytes", int, VALIDATION_BYTES, "of the text, to validate with"),
    ]
    for name, kind, default, what in rows:
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{what} ({default})")
    torch.set_num_threads(1)
    print(json.dumps(run(parser.parse_args())))


if __name__ == "__main__":
    main()

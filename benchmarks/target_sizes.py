"""A language model of 140,000 parameters: a price from the first step, or a size by name.

python benchmarks/target_sizes.py --steps 1200 --lam 1
python benchmarks/target_sizes.py --steps 1200 --target-mb 0.0391
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
from pathlib import Path

import torch

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

BATCH = 8
VALIDATION_BYTES = 60_000


def run(args: argparse.Namespace) -> dict[str, object]:
    """Trains once; the size of the file and the quality."""
    train_text, valid_text = load_text()
    torch.manual_seed(args.seed)
    model = Transformer(64, 2)
    optimizer = make_optimizer(model)
    quantizer = diffq.DiffQuantizer(
        model, noise="rounding", min_size=0.001, small_bits=args.small_bits
    )
    if args.target_mb is None:
        quantizer.setup_optimizer(optimizer, lr=args.bits_lr, lam=args.lam)
    else:
        quantizer.setup_optimizer(optimizer, target_mb=args.target_mb, steps=args.steps)
    schedule = warmup_cosine(optimizer, args.steps, min(100, args.steps // 4))
    batches = torch.Generator().manual_seed(args.seed)
    for step in range(args.steps):
        loss = nats(model, random_sequences(train_text, batches, BATCH))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % max(1, args.steps // 10) == 0:
            print(f"{loss.item() / math.log(2):.3f} {quantizer.target}", file=sys.stderr)
    file = io.BytesIO()
    diffq.save(quantizer, file)
    return {
        "steps": args.steps,
        "seed": args.seed,
        "lam": args.lam,
        "target_mb": args.target_mb,
        "small_bits": args.small_bits,
        "file_mb": file.getbuffer().nbytes / MEGABYTE,
        "bits_per_character": bits_per_character(model, valid_text[:VALIDATION_BYTES]),
    }


def main() -> None:
    """Prints the result as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--lam", type=float, help="price of one MB from the first step on")
    asked.add_argument("--target-mb", type=float, help="MB of the file")
    parser.add_argument("--steps", type=int, default=1200, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--small-bits", type=int, help="bitwidth of biases and norms")
    parser.add_argument(
        "--bits-lr",
        type=float,
        default=0.05,
        help="learning rate of the bitwidths with a price (default: %(default)s)",
    )
    torch.set_num_threads(1)
    print(json.dumps(run(parser.parse_args())))


if __name__ == "__main__":
    main()

"""Processor time of what quantizers compute in a step and in eval, without the model's layers.

    python benchmarks/quantizing.py                            # this checkout
    python benchmarks/quantizing.py --before ../diffq-main     # in turns with another one

A step reads all tensors as its forward does, asks for the size, and runs the backward of both. Eval
quantizes all tensors, as its first forward after a step does, and looks for zeros. Each turn is a
process of its own with one thread, whose own time is measured, so other work on the machine counts
little. Milliseconds are the median over turns of the median in each.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from models import EfficientNet, Transformer
from processes import ROOT, worker
from training_cases import CONTENDERS

MODELS = {"efficientnet": EfficientNet, "transformer": Transformer}
NAMES = ["diffq-g8", "diffq-g8-rounding", "qat", "lsq", "entropy"]


def measure(model_name: str, contender: str, rounds: int) -> list[float]:
    """Milliseconds of a forward, the size, a backward, and an eval."""
    import diffq

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, chosen = MODELS[model_name](), CONTENDERS[contender]
    names = [name for name, _ in model.named_parameters()]
    quantizer = getattr(diffq, str(chosen.quantizer))(model, **chosen.options)
    quantizer.no_optimizer()
    owners = [name.rpartition(".")[::2] for name in names]

    def read() -> list[Tensor]:
        with quantizer.computing():
            return [getattr(model.get_submodule(owner), name) for owner, name in owners]

    def step() -> list[float]:
        model.train().zero_grad()
        tensors, forward = timed(read)
        size, sizing = timed(quantizer.model_size)
        roots = [t for t in (*tensors, size) if t.requires_grad]
        grads = [torch.ones_like(root) for root in roots]
        _, backward = timed(lambda: torch.autograd.backward(roots, grads))
        model.eval()
        with torch.no_grad():
            _, evaluating = timed(read)
        return [forward, sizing, backward, evaluating]

    turns = [step() for _ in range(rounds + 1)][1:]
    return [median(each) for each in zip(*turns, strict=True)]


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a function returns, and the milliseconds of this thread that it took."""
    start = time.thread_time()
    result = call()
    return result, 1e3 * (time.thread_time() - start)


def turn(root: Path, *request: str) -> list[float]:
    """`measure` in a process with the diffq of a checkout."""
    command, environment = worker("quantizing.py", root=root)
    run = subprocess.run([*command, "--measure", *request], env=environment, stdout=subprocess.PIPE)
    run.check_returncode()
    return list(json.loads(run.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="another checkout")
    parser.add_argument("--turns", type=int, default=5, help="processes of each (default: 5)")
    parser.add_argument("--rounds", type=int, default=5, help="steps in a turn (default: 5)")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        model, contender, rounds = args.measure
        print(json.dumps(measure(model, contender, int(rounds))))
        return
    roots = [ROOT] if args.before is None else [args.before.resolve(), ROOT]
    print("| model | quantizer | checkout | forward | size | backward | eval |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: |")
    for model in MODELS:
        for contender in NAMES:
            request = model, contender, str(args.rounds)
            turns = [[turn(root, *request) for root in roots] for _ in range(args.turns)]
            for root, found in zip(roots, zip(*turns, strict=True), strict=True):
                numbers = [f"{median(each):.1f}" for each in zip(*found, strict=True)]
                print(f"| {model} | {contender} | {root.name} |", " | ".join(numbers), "|")
                sys.stdout.flush()


if __name__ == "__main__":
    main()

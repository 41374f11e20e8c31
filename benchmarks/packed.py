"""Time and memory of models whose weights stay packed, beside models that are loaded plain.

    python benchmarks/packed.py --rounds 20

Times are those of the processor, so that other work on the machine counts little; with several
threads, those of all add up. The two models take turns. Memory is that of a process for each.
Needs Linux (memory from /proc).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import diffq
from models import ResNet, Transformer, image_batch, token_batch
from processes import peak_resident_mb, reset_peak, resident_mb, worker

MB = 2**20


@dataclass(frozen=True)
class Case:
    """A model, and inputs of which forwards are timed."""

    model: Callable[[], nn.Module]
    inputs: dict[str, Callable[[], tuple[Tensor, Tensor]]]


_VOCABULARY = 16_384

CASES = {
    "language model": Case(
        partial(Transformer, ((_VOCABULARY, 512),), width=512, layers=4, heads=8),
        {
            "1 token": partial(token_batch, _VOCABULARY, 1, 1),
            "128 tokens": partial(token_batch, _VOCABULARY, 1, 128),
        },
    ),
    "ResNet-18": Case(
        ResNet,
        {"1 image": partial(image_batch, 10, 1, 32), "32 images": partial(image_batch, 10, 32, 32)},
    ),
    "tiny": Case(
        partial(Transformer, ((32, 16),), width=16, layers=1, heads=2),
        {"8 tokens": partial(token_batch, 32, 1, 8)},
    ),
}


def write_diffq(model: nn.Module, path: Path) -> None:
    """Groups of 8 weights with 2 to 6 bits, 3.5 on average, as after a training."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    quantizer = diffq.DiffQuantizer(model, group_size=8, min_size=0)
    quantizer.setup_optimizer(optimizer)
    with torch.no_grad():
        for logits in optimizer.param_groups[-1]["params"]:
            logits.normal_(-2.05, 0.4)
    diffq.save(quantizer, path)


def write_qat(model: nn.Module, path: Path) -> None:
    """4 bits for all weights."""
    diffq.save(diffq.QATQuantizer(model, bits=4, min_size=0), path)


METHODS = {"DiffQ, groups of 8": write_diffq, "QAT, 4 bits": write_qat}


def load(case: Case, path: Path, packed: bool) -> nn.Module:
    if not packed:
        return diffq.load(path, case.model()).eval()
    with torch.device("meta"):
        model = case.model()
    return diffq.load(path, model, packed=True).eval()


def seconds(model: nn.Module, inputs: Tensor) -> float:
    """Processor time of a forward."""
    start = time.process_time()
    model(inputs)
    return time.process_time() - start


@torch.no_grad()
def times(case: Case, path: Path, rounds: int) -> Iterator[dict[str, Any]]:
    """Median milliseconds of a forward, plain and packed, and the median of their ratios."""
    models = [load(case, path, packed) for packed in (False, True)]
    for name, make in case.inputs.items():
        inputs, _ = make()
        took = [[seconds(model, inputs) for model in models] for _ in range(rounds + 1)][1:]
        plain, packed = (1000 * statistics.median(each) for each in zip(*took, strict=True))
        ratio = statistics.median(theirs / ours for ours, theirs in took)
        yield {"input": name, "plain_ms": plain, "packed_ms": packed, "ratio": ratio}


@torch.no_grad()
def memory(case: Case, path: Path, packed: bool) -> dict[str, float]:
    """MB of the tensors, and of the process beyond what it has before the model."""
    run_once(path.with_name("tiny.diffq"), packed)
    last = list(case.inputs.values())[-1]
    inputs, _ = last()
    reset_peak()
    before = resident_mb()
    model = load(case, path, packed)
    loading = peak_resident_mb()
    reset_peak()
    model(inputs)
    tensors = {id(each): each for each in [*model.parameters(), *model.buffers()]}.values()
    return {
        "tensors": sum(each.nbytes for each in tensors) / MB,
        "loading": loading - before,
        "forward": peak_resident_mb() - before,
    }


def run_once(path: Path, packed: bool) -> None:
    """A load and a forward of a tiny model, which import all that others need."""
    case = CASES["tiny"]
    write_qat(case.model(), path)
    model = load(case, path, packed)
    for make in case.inputs.values():
        model(make()[0])


def measure_memory(name: str, path: Path, packed: bool, threads: int) -> dict[str, float]:
    """`memory` in a process of its own."""
    command, environment = worker("packed.py")
    command += ["--threads", str(threads), "--memory", name, str(path), "packed" * packed]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def report(name: str, rounds: int, threads: int, folder: Path) -> Iterator[str]:
    """Lines of a table of memory and one of times, for each method."""
    case = CASES[name]
    for method, write in METHODS.items():
        torch.manual_seed(0)
        path = folder / "model.diffq"
        write(case.model(), path)
        file = path.stat().st_size / MB
        for packed in (False, True):
            used = measure_memory(name, path, packed, threads)
            cells = " | ".join(f"{used[key]:.1f}" for key in ("tensors", "loading", "forward"))
            loaded = "packed" if packed else "plain"
            yield f"| {name} | {method} | {loaded} | {file:.1f} | {cells} |"
        for row in times(case, path, rounds):
            cells = f"{row['plain_ms']:.1f} | {row['packed_ms']:.1f} | {row['ratio']:.1f}"
            yield f"| {name} | {method} | {row['input']} | {cells} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=list(CASES)[:2], choices=CASES)
    parser.add_argument("--rounds", type=int, default=10, help="of each forward (default: 10)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory:
        name, path, packed = args.memory
        print(json.dumps(memory(CASES[name], Path(path), bool(packed))))
        return
    with tempfile.TemporaryDirectory() as folder:
        lines = [
            line
            for name in args.cases
            for line in report(name, args.rounds, args.threads, Path(folder))
        ]
    wide = [line for line in lines if line.count("|") == 8]
    print("| model | method | loaded | file, MB | tensors, MB | peak loading | peak forward |")
    print("|---|---|---|---:|---:|---:|---:|", *wide, sep="\n")
    print("\n| model | method | input | plain, ms | packed, ms | ratio |")
    print("|---|---|---|---:|---:|---:|", *(line for line in lines if line not in wide), sep="\n")


if __name__ == "__main__":
    main()

"""Time and memory that quantizers add to training, beside plain training of the same model.

    python benchmarks/training.py                                    # all models, on the CPU
    python benchmarks/training.py --models transformer-2x128 lstm --rounds 3 --steps 1  # quick
    python benchmarks/training.py --models resnet18 --contenders diffq-g8 qat
    python benchmarks/training.py --earlier .venv-earlier/bin/python # PyPI diffq 0.2.4 too
    python benchmarks/training.py --before ../diffq-main             # another checkout too
    python benchmarks/training.py --device cuda                      # in about 3 minutes

A step is zero_grad, forward, loss + lambda * model_size(), backward and AdamW. Contenders take
turns: in each round, every one trains the same model for some steps and then evaluates it, one at
a time and in an order that rotates, so that other work on the machine hits all alike. What is
reported is the median over rounds of each one's time and of its ratio to plain training's in the
same round. Memory is the most that is held in a step beyond plain training's, in MB and in copies
of the weights that are quantized. On a GPU, a profiler counts the kernels of a step, and adds up
how long they run.
On a CPU each contender is a process of its own, because memory is the process's. On a GPU all are
in one, unless --earlier or --before asks for others.
The earlier package is run as a black box, in an environment that earlier_package.sh makes.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import torch

from processes import ROOT, worker
from training_cases import ALL_CASES, CASES, CONTENDERS, GPU_CASES
from training_report import Answer, Row, Times, markdown, summarize, write

Tick = Callable[[str], None]

#: Ends the names of contenders that run the diffq of another checkout.
BEFORE = "-before"


#: Minutes after which a run on a GPU begins no other model and no other round.
GPU_MINUTES = 3.0


class Contending(Protocol):
    """A contender, which computes only while `ask` waits for it."""

    name: str

    def ready(self) -> Answer:
        """Waits until it can be asked; returns the versions in use."""

    def ask(self, **request: Any) -> Answer:
        """Does what a request of `training_worker` says; with `error`, the model is gone."""


class Worker:
    """A contender in a process of its own."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name = name
        contender = name.removesuffix(BEFORE)
        command, environment = worker(
            "training_worker.py",
            args.earlier if CONTENDERS[contender].earlier else None,
            ROOT if contender == name else args.before.resolve(),
        )
        command += [contender, args.device, f"--threads={args.threads}"]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, **request: Any) -> Answer:
        """Sends a request and waits for the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.ready()

    def ready(self) -> Answer:
        """Waits for the next answer; the first one comes unasked."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name}: its process ended with status {self.process.wait()}.")
        answer: Answer = json.loads(line)
        return answer


def contenders_of(args: argparse.Namespace) -> list[Contending]:
    """The contenders, in one process where that measures each of them alone."""
    if args.device == "cuda" and args.earlier is None and args.before is None:
        from training_together import Neighbour

        return [Neighbour(name, args.device, args.threads) for name in args.contenders]
    return [Worker(name, args) for name in args.contenders]


def measure(
    case: str,
    workers: Sequence[Contending],
    args: argparse.Namespace,
    tick: Tick,
    end: float = math.inf,
) -> list[Row]:
    """Rows of one model: memory of each contender, then rounds of turns.

    Args:
        case: its name.
        workers: the contenders, plain first.
        args: of the command line.
        tick: told of each turn.
        end: time of the clock after which no round but the first begins.
    """
    answers: dict[str, Answer] = {}
    for contender in workers:
        tick(f"{case}, memory: {contender.name}")
        answers[contender.name] = contender.ask(memory=case)
        if "error" not in answers[contender.name]:
            answers[contender.name] |= contender.ask(case=case)
    times: Times = {contender.name: [] for contender in workers}
    for number in range(args.rounds):
        if number and time.monotonic() > end:
            break
        for contender in rotated(workers, number):
            tick(f"{case}, round {number + 1}: {contender.name}")
            take_turn(contender, args.steps, answers, times)
    for contender in workers:
        if "error" not in answers[contender.name]:
            contender.ask(end=True)
    if "error" in answers["plain"]:
        sys.exit(f"plain training of {case} failed: {answers['plain']['error']}")
    return summarize(case, answers, times)


def take_turn(contender: Contending, steps: int, answers: dict[str, Answer], times: Times) -> None:
    """Adds the seconds of a training step and of a forward in eval mode, or an error."""
    seconds = {}
    for mode in ("train", "evaluate"):
        if "error" in answers[contender.name]:
            return
        answer = contender.ask(**{mode: steps})
        if "error" in answer:
            answers[contender.name] = answer
        else:
            seconds[mode] = answer["seconds"] / steps
    times[contender.name].append(seconds)


def rotated(workers: Sequence[Contending], by: int) -> list[Contending]:
    start = by % len(workers)
    return [*workers[start:], *workers[:start]]


@contextmanager
def progress(total: int) -> Iterator[Tick]:
    """A bar where rich is installed, else lines; both on the error output."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        turns = count(1)
        yield lambda label: print(f"{next(turns)}/{total} {label}", file=sys.stderr)
        return
    # Drawn only between turns: the bar's own thread would take time from what is measured.
    with Progress(console=Console(stderr=True), auto_refresh=False) as bar:
        task = bar.add_task("", total=total)

        def tick(label: str) -> None:
            bar.update(task, advance=1, description=label, refresh=True)

        yield tick


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models",
        nargs="+",
        choices=ALL_CASES,
        metavar="MODEL",
        help=f"which to train, of {', '.join(ALL_CASES)}; the number after transformer is that of "
        "sequences x tokens (default: all that the device is for, without tiny)",
    )
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=CONTENDERS,
        metavar="CONTENDER",
        help=f"which to compare with plain, of {', '.join(CONTENDERS)}; g is the group size "
        "(default: all, those of the earlier package only with --earlier)",
    )
    parser.add_argument(
        "--rounds", type=positive, default=10, help="turns of each contender (default: 10)"
    )
    parser.add_argument(
        "--steps", type=positive, default=3, help="timed steps in a turn (default: 3)"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help="begin no other model and no other round after so many minutes "
        f"(default: {GPU_MINUTES:.0f} on a GPU, no limit on a CPU)",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    parser.add_argument(
        "--threads", type=int, default=0, help="of each process on the CPU (default: torch's own)"
    )
    parser.add_argument(
        "--earlier",
        type=Path,
        metavar="PYTHON",
        help="Python of an environment with the earlier package",
    )
    parser.add_argument(
        "--before",
        type=Path,
        metavar="CHECKOUT",
        help="another checkout of this project, whose diffq takes turns with this one's",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help="also write the results to PATH.json and PATH.md, anew after each model",
    )
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU, and torch finds none")
    args.models = args.models or list(GPU_CASES if args.device == "cuda" else CASES)
    if args.minutes is None:
        args.minutes = GPU_MINUTES if args.device == "cuda" else math.inf
    chosen = args.contenders or [n for n, c in CONTENDERS.items() if args.earlier or not c.earlier]
    args.contenders = ["plain", *(name for name in chosen if name != "plain")]
    if args.before is not None:
        args.contenders += [name + BEFORE for name in args.contenders[1:]]
    if args.earlier is None and any(CONTENDERS[name].earlier for name in chosen):
        parser.error("contenders of the earlier package need --earlier PYTHON")
    return args


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def main() -> None:
    args = parse_arguments()
    end = time.monotonic() + 60 * args.minutes
    workers = contenders_of(args)
    # All load at once; none is asked anything before all are ready.
    about = {contender.name: contender.ready() for contender in workers}
    settings = {"rounds": args.rounds, "steps": args.steps, "python": platform.python_version()}
    settings |= about["plain"]
    rows: list[Row] = []
    with progress(len(args.models) * len(workers) * (1 + args.rounds)) as tick:
        for number, case in enumerate(args.models):
            if number and time.monotonic() > end:
                left_out = " ".join(args.models[number:])
                print(f"No time for {left_out}: pass --models or --minutes.", file=sys.stderr)
                break
            rows += measure(case, workers, args, tick, end)
            if args.output:
                write(args.output, settings, rows)
    print(markdown(rows))


if __name__ == "__main__":
    main()

"""Time and memory that quantizers add to training, beside plain training of the same model.

    python benchmarks/training.py                                    # all models, on the CPU
    python benchmarks/training.py --rounds 2 --steps 1               # a quick look
    python benchmarks/training.py --models lstm --contenders diffq-g8 qat
    python benchmarks/training.py --earlier .venv-earlier/bin/python # PyPI diffq 0.2.4 too
    python benchmarks/training.py --device cuda                      # also the paper's transformer

A step is zero_grad, forward, loss + lambda * model_size(), backward and AdamW. Each contender is
a process of its own, and they take turns: in each round, every one trains the same model for
some steps and then evaluates it, one at a time and in an order that rotates, so that other work
on the machine hits all alike. What is reported is the median over rounds of each one's time and
of its ratio to plain training's in the same round. Memory is the most held in the first steps,
without what plain training holds; a copy is the float32 size of the weights that are quantized.
The earlier package is run as a black box, in an environment that earlier_package.sh makes.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

from processes import worker
from training_cases import ALL_CASES, BIG_CASES, CASES, CONTENDERS

Tick = Callable[[str], None]
Answer = dict[str, Any]
Row = dict[str, Any]
#: Contender to one dict a round: "train" and "evaluate" to seconds of a step.
Times = dict[str, list[dict[str, float]]]


class Worker:
    """The process of one contender: it computes only while `ask` waits for it."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name = name
        command, environment = worker(
            "training_worker.py", args.earlier if CONTENDERS[name].earlier else None
        )
        command += [name, args.device, f"--threads={args.threads}"]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, **request: Any) -> Answer:
        """Sends a request and waits for the answer; with `error` in it, the model is gone."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.read()

    def read(self) -> Answer:
        """The next answer; the first one comes unasked when the worker is ready."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name}: its process ended with status {self.process.wait()}.")
        answer: Answer = json.loads(line)
        return answer


def measure(
    case: str, workers: Sequence[Worker], args: argparse.Namespace, tick: Tick
) -> list[Row]:
    """Rows of one model: memory of each contender, then rounds of turns."""
    answers: dict[str, Answer] = {}
    for contender in workers:
        tick(f"{case}, memory: {contender.name}")
        answers[contender.name] = contender.ask(case=case)
    running = [contender for contender in workers if "error" not in answers[contender.name]]
    times: Times = {contender.name: [] for contender in running}
    for number in range(args.rounds):
        for contender in rotated(workers, number):
            tick(f"{case}, round {number + 1}: {contender.name}")
            if contender in running:
                answer = take_turn(contender, args.steps)
                times[contender.name].append(answer)
                if "error" in answer:
                    answers[contender.name] = answer
                    running.remove(contender)
    for contender in running:
        contender.ask(end=True)
    return summarize(case, answers, times)


def take_turn(contender: Worker, steps: int) -> Answer:
    """Seconds of a training step and of a forward in eval mode."""
    seconds = {}
    for mode in ("train", "evaluate"):
        answer = contender.ask(**{mode: steps})
        if "error" in answer:
            return answer
        seconds[mode] = answer["seconds"] / steps
    return seconds


def rotated(workers: Sequence[Worker], by: int) -> list[Worker]:
    start = by % len(workers)
    return [*workers[start:], *workers[:start]]


def summarize(case: str, answers: dict[str, Answer], times: Times) -> list[Row]:
    """A row for each contender: medians, and what it adds to plain training."""
    rows = []
    for name, answer in answers.items():
        row: Row = {"model": case, "contender": name}
        if "error" in answer:
            rows.append(row | {"error": answer["error"]})
            continue
        for mode in ("train", "evaluate"):
            seconds, plain = ([turn[mode] for turn in times[n]] for n in (name, "plain"))
            row |= compare(mode, seconds, plain)
        added = answer["peak_mb"] - answers["plain"]["peak_mb"]
        row |= {"peak_mb": answer["peak_mb"], "added_mb": added}
        rows.append(row | {"copies": added / answer["quantized_mb"]})
    return rows


def compare(mode: str, seconds: Sequence[float], plain: Sequence[float]) -> Row:
    """Medians over rounds of a time and of its ratio to plain's; the ratios' middle half."""
    ratios = sorted(mine / its for mine, its in zip(seconds, plain, strict=True))
    quarter = len(ratios) // 4
    return {
        f"{mode}_ms": 1000 * median(seconds),
        f"{mode}_ratio": median(ratios),
        f"{mode}_ratio_quartiles": [ratios[quarter], ratios[-1 - quarter]],
    }


HEADER = (
    "model",
    "contender",
    "step, ms",
    "× plain (middle half)",
    "added",
    "eval, ms",
    "× plain",
    "memory over plain, MB",
    "copies",
)


def markdown(rows: Iterable[Row]) -> str:
    table = [HEADER, ["---"] * 2 + ["---:"] * (len(HEADER) - 2), *map(cells, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in table)


def cells(row: Row) -> list[str]:
    start = [row["model"], row["contender"]]
    if "error" in row:
        return [*start, row["error"].splitlines()[0], *[""] * (len(HEADER) - 3)]
    low, high = row["train_ratio_quartiles"]
    return [
        *start,
        f"{row['train_ms']:.1f}",
        f"{row['train_ratio']:.2f} ({low:.2f}–{high:.2f})",
        f"{row['train_ratio'] - 1:+.0%}",
        f"{row['evaluate_ms']:.1f}",
        f"{row['evaluate_ratio']:.2f}",
        f"{row['added_mb']:.1f}",
        f"{row['copies']:.1f}",
    ]


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
        "--output",
        type=Path,
        metavar="PATH",
        help="also write the results to PATH.json and PATH.md, anew after each model",
    )
    args = parser.parse_args(arguments)
    args.models = args.models or [*CASES, *(BIG_CASES if args.device == "cuda" else ())]
    chosen = args.contenders or [n for n, c in CONTENDERS.items() if args.earlier or not c.earlier]
    args.contenders = ["plain", *(name for name in chosen if name != "plain")]
    if args.earlier is None and any(CONTENDERS[name].earlier for name in chosen):
        parser.error("contenders of the earlier package need --earlier PYTHON")
    return args


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def write(path: Path, settings: Row, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    results = {"settings": settings, "rows": rows}
    Path(f"{path}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    Path(f"{path}.md").write_text(markdown(rows) + "\n", encoding="utf-8")


def main() -> None:
    args = parse_arguments()
    workers = [Worker(name, args) for name in args.contenders]
    # All load at once; none is asked anything before all are ready.
    about = {contender.name: contender.read() for contender in workers}
    settings = {"rounds": args.rounds, "steps": args.steps, "python": platform.python_version()}
    settings |= about["plain"]
    rows: list[Row] = []
    with progress(len(args.models) * len(workers) * (1 + args.rounds)) as tick:
        for case in args.models:
            rows += measure(case, workers, args, tick)
            if args.output:
                write(args.output, settings, rows)
    print(markdown(rows))


if __name__ == "__main__":
    main()

"""Compares compression methods side by side: quality, bytes on disk, times smaller.

    python benchmarks/methods.py                                   # everything, half an hour
    python benchmarks/methods.py --list                            # the rows, without running
    python benchmarks/methods.py --tasks language-model --rows 'QAT*' '*4 bits' --seeds 0 1 2
    python benchmarks/methods.py --only-report                     # tables and plot again

Every row of a task trains for the same steps in all: those that finetune a trained model
(LSQ, iPQ, pruning) train it for the first two thirds. Each row is measured on a fresh model
that is loaded from the file of `diffq.save`. Results are written after every row; started
again, the benchmark goes on with the rows that are missing.
"""

from __future__ import annotations

import argparse
import tempfile
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from methods_report import Results, markdown, plot
from methods_rows import Row, rows_of
from methods_run import Runner
from methods_tasks import TASKS, Task

RESULTS = Path(__file__).parent / "results" / "methods.json"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=TASKS,
        default=list(TASKS),
        metavar="TASK",
        help=f"which of {', '.join(TASKS)} (default: all)",
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        default=["*"],
        metavar="PATTERN",
        help="which rows, by shell patterns of their names, such as 'DiffQ*' (default: all)",
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=[0],
        metavar="SEED",
        help="seeds of weights, batches and noise; rows are run once for each (default: 0)",
    )
    parser.add_argument(
        "--steps", type=int, help="training steps of each row (default: as each task says)"
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of torch (default: %(default)s)"
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS,
        metavar="FILE",
        help="where rows are kept (default: benchmarks/results/methods.json)",
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw quality against size, .svg or .png"
    )
    parser.add_argument("--list", action="store_true", help="only show the names of the rows")
    parser.add_argument("--only-report", action="store_true", help="only show what is there")
    return parser.parse_args()


def chosen(task: Task, patterns: list[str]) -> list[Row]:
    return [row for row in rows_of(task) if any(fnmatchcase(row.name, p) for p in patterns)]


def measure(task: Task, seed: int, args: argparse.Namespace, results: Results) -> None:
    """Runs the rows of a task that are not there yet."""
    rows = chosen(task, args.rows)
    steps = args.steps or task.steps
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(task, seed, steps, Path(folder))
        for number, row in enumerate(rows, 1):
            key = {"task": task.name, "method": row.name, "seed": seed, "steps": steps}
            if results.has(key):
                continue
            measured = runner.run(row)
            results.add({**key, "family": row.family, **measured})
            print(
                f"{task.name}, seed {seed}, {number} of {len(rows)}: {row.name}: "
                f"{measured['quality']:.3f}, {measured['bytes']:,} bytes, "
                f"{measured['seconds']:.0f} s",
                flush=True,
            )


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    results = Results(args.results)
    if not args.only_report:
        for name in args.tasks:
            task = TASKS[name]()
            if args.list:
                print(name, *(row.name for row in chosen(task, args.rows)), sep="\n  ")
                continue
            for seed in args.seeds:
                measure(task, seed, args, results)
    if args.list:
        return
    print(markdown(results.rows))
    if args.plot:
        plot(results.rows, args.plot)


if __name__ == "__main__":
    main()

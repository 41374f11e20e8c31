"""Bytes and speed of the codecs "zstd" and "rans", on synthetic levels and on trained models.

    python benchmarks/coder.py                              # Laplace and normal levels
    python benchmarks/coder.py out/mnist/*.diffq            # also the models of these files
    python benchmarks/coder.py --rows 'LSQ, 2*' '*λ 20'     # also rows of benchmarks/methods.py

The last trains the language model of benchmarks/methods.py, some minutes for each row.

Each row's levels are encoded to a file in memory and decoded to float32 on one core. Speeds are
millions of weights a second of processor time, the best of the repeats. The entropy is that of
the levels of each tensor and bitwidth, bit maps, and everything else at its full size.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TypeVar

import numpy as np

from diffq.format.container import Codec, decode, encode
from diffq.format.entropy import entropy_bits
from diffq.format.kinds.base import QuantizedRecord, Record
from diffq.format.reader import Reader
from diffq.format.records import ScaledRecord
from methods_rows import rows_of
from methods_run import Runner
from methods_tasks import TASKS

CODECS: tuple[Codec, ...] = ("zstd", "rans")
RATES = (0.3, 0.8, 1.5, 3)
SHAPE = (1 << 10, 1 << 11)
BUDGET = 1 << 40

_Result = TypeVar("_Result")


def synthetic(draw: str, rate: float) -> dict[str, Record]:
    """A tensor of independent levels of so many bits of entropy, at the bitwidth that they need."""
    samples = getattr(np.random.default_rng(0), draw)(size=SHAPE)
    least, most = 1e-3, 1e3
    while most / least > 1.0001:
        scale = (least * most) ** 0.5
        signed = np.rint(samples * scale).astype(np.int64).reshape(-1)
        below = entropy_bits(np.bincount(signed - signed.min())) < rate * signed.size
        least, most = (scale, most) if below else (least, scale)
    bits = int(abs(signed).max()).bit_length() + 1
    levels = (signed + (1 << bits - 1)).astype(np.uint16)
    head = SHAPE, "float32", levels.size, bits, np.uint8([bits]), levels
    return {"weight": ScaledRecord(*head, np.float32([0.01]))}


def timed(run: Callable[[], _Result], repeats: int) -> tuple[_Result, float]:
    """The result, and the least seconds of processor time that it took."""
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        result = run()
        best = min(best, time.process_time() - start)
    return result, best


def trained(patterns: list[str]) -> Iterator[tuple[str, bytes]]:
    """Names and files of the language models of these rows."""
    task = TASKS["language-model"]()
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(task, 0, task.steps, Path(folder))
        for chosen in rows_of(task):
            if any(fnmatchcase(chosen.name, pattern) for pattern in patterns):
                runner.run(chosen)
                yield chosen.name, (Path(folder) / "model.diffq").read_bytes()


def row(name: str, records: Mapping[str, Record], repeats: int) -> str:
    """A row of the table."""
    weights = sum(r.numel for r in records.values() if isinstance(r, QuantizedRecord))
    bound = sum(record.entropy_bound_bits() for record in records.values()) / 8
    cells = [name, f"{8 * bound / weights:.2f}"]
    for codec in CODECS:
        data, wrote = timed(partial(encode, records, codec=codec, threads=1), repeats)
        _, read = timed(Reader(data, BUDGET, 1).values_of, repeats)
        speeds = [f"{weights / 1e6 / seconds:.0f}" for seconds in (wrote, read)]
        cells += [f"{len(data):,}", f"{len(data) / bound:.3f}", *speeds]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="*", help="files of diffq, as further rows")
    parser.add_argument(
        "--rows",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="rows of benchmarks/methods.py to train, by shell patterns of their names",
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each (default: 3)")
    args = parser.parse_args()
    header = ["levels", "bits a weight"]
    for codec in CODECS:
        header += [f"{codec}, bytes", "× entropy", "encode, M/s", "decode, M/s"]
    print(f"| {' | '.join(header)} |\n|---|{'---:|' * (len(header) - 1)}")
    for draw in ("laplace", "standard_normal"):
        for rate in RATES:
            print(row(f"{draw} {rate}", synthetic(draw, rate), args.repeats), flush=True)
    files = ((path.stem, path.read_bytes()) for path in args.files)
    for name, data in chain(files, trained(args.rows)):
        print(row(name, decode(data, BUDGET)[0], args.repeats), flush=True)


if __name__ == "__main__":
    main()

"""Speed, memory and size of files: diffq beside torch.save, safetensors and the earlier package.

    python benchmarks/codec.py --sizes 1 50 --repeats 5
    python benchmarks/codec.py --earlier .venv-earlier/bin/python   # PyPI diffq 0.2.4

Each measurement is a process of its own; contenders take turns, and the table shows the
median of the repeats. The earlier package is run as a black box in an environment of its
own, which benchmarks/earlier_package.sh makes. Needs Linux (peak memory from /proc).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from codec_worker import LAYERS, make_model
from processes import worker

OPERATIONS = ("pack", "unpack", "save", "load")

Results = dict[tuple[str, int], list[dict[str, Any]]]


def measure(contender: str, millions: int, folder: Path, earlier: Path | None) -> dict[str, Any]:
    command, environment = worker("codec_worker.py", earlier if contender == "earlier" else None)
    command += [contender, str(millions), str(folder / contender)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        sys.exit(f"{contender} failed:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def summarize(runs: list[dict[str, Any]], weights: float) -> dict[str, Any]:
    """Medians: millions of weights per second, and MB of memory on top of what is held."""
    row: dict[str, Any] = {"file_mb": runs[0]["file_mb"]}
    for operation in OPERATIONS:
        if operation in runs[0]["operations"]:
            took = [run["operations"][operation] for run in runs]
            seconds = median(t["seconds"] for t in took)
            row[operation] = {
                "seconds": seconds,
                "million_weights_per_second": weights / 1e6 / seconds,
                "peak_mb": median(t["peak_mb"] for t in took),
            }
    return row


def markdown(table: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| contender | M weights | file, MB | "
        + " | ".join(f"{o}, M/s (MB)" for o in OPERATIONS)
        + " |",
        "|---" * (3 + len(OPERATIONS)) + "|",
    ]
    for name, row in table.items():
        contender, millions = name.split("@")
        cells = [
            f"{row[o]['million_weights_per_second']:.0f} ({row[o]['peak_mb']:.0f})"
            if o in row
            else ""
            for o in OPERATIONS
        ]
        lines.append(
            f"| {contender} | {millions} | {row['file_mb']:.1f} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[1, 50, 265], choices=LAYERS, metavar="MILLIONS"
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("--earlier", type=Path, help="Python of the environment with diffq 0.2.4")
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    contenders = ["diffq-zstd", "diffq-rans", "diffq-packed", "torch", "safetensors"]
    contenders += ["earlier"] if args.earlier else []
    table = {}
    for millions in args.sizes:
        results: Results = {}
        with tempfile.TemporaryDirectory() as folder:
            for repeat in range(args.repeats):
                for contender in contenders:
                    print(f"{millions}M, run {repeat + 1}: {contender}", file=sys.stderr)
                    result = measure(contender, millions, Path(folder), args.earlier)
                    results.setdefault((contender, millions), []).append(result)
        weights = sum(p.numel() for p in make_model(millions).parameters())
        table |= {f"{c}@{m}": summarize(runs, weights) for (c, m), runs in results.items()}
    print(markdown(table))
    if args.json:
        args.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()

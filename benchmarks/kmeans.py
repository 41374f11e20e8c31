"""k-means of one layer: diffq beside faiss, on the same machine and data.

    python -m venv .venv-faiss && .venv-faiss/bin/pip install faiss-cpu numpy
    python benchmarks/kmeans.py --faiss .venv-faiss/bin/python

A layer of 1024 x 4096 normal weights in blocks of 8, 256 codewords, 15 iterations from random
blocks, then the nearest codeword of every block. Each measurement is a process of its own;
contenders take turns, and the table shows the median. `faiss-sampled` is what faiss does unless
told otherwise: it learns from 256 blocks for each codeword only, here one in eight.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
ROWS, COLUMNS, BLOCK, WORDS, ITERATIONS = 1024, 4096, 8, 256, 15

Blocks = np.ndarray
#: Codebook and nearest codewords of blocks.
Found = tuple[np.ndarray, np.ndarray]


def run_diffq(threads: int) -> Callable[[Blocks], Found]:
    import torch

    from diffq.numerics.kmeans import kmeans

    torch.set_num_threads(threads)

    def run(blocks: Blocks) -> Found:
        generator = torch.Generator().manual_seed(0)
        found = kmeans(torch.from_numpy(blocks), WORDS, ITERATIONS, generator)
        return found.codebook.numpy(), found.indices.numpy()

    return run


def run_faiss(threads: int, sampled: bool) -> Callable[[Blocks], Found]:
    import faiss

    faiss.omp_set_num_threads(threads)

    def run(blocks: Blocks) -> Found:
        most = 256 if sampled else len(blocks)
        learned = faiss.Kmeans(BLOCK, WORDS, niter=ITERATIONS, max_points_per_centroid=most, seed=0)
        learned.train(blocks)
        return learned.centroids, learned.index.search(blocks, 1)[1][:, 0]

    return run


CONTENDERS: dict[str, Callable[[int], Callable[[Blocks], Found]]] = {
    "diffq": run_diffq,
    "faiss": lambda threads: run_faiss(threads, sampled=False),
    "faiss-sampled": lambda threads: run_faiss(threads, sampled=True),
}


def work(contender: str, threads: int) -> dict[str, Any]:
    """Seconds and mean squared error of one run, after a warm-up on a part of the data."""
    random = np.random.default_rng(0)
    blocks = random.standard_normal((ROWS * COLUMNS // BLOCK, BLOCK)).astype(np.float32)
    run = CONTENDERS[contender](threads)
    run(blocks[: 40 * WORDS])
    start = time.perf_counter()
    codebook, indices = run(blocks)
    seconds = time.perf_counter() - start
    error = float(np.square(blocks - codebook[indices]).mean())
    return {"seconds": seconds, "error": error}


def measure(contender: str, python: str, threads: int) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    # Threads that wait must not take the cores from those that work.
    environment.setdefault("OMP_WAIT_POLICY", "passive")
    command = [python, __file__, "--work", contender, "--threads", str(threads)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{contender} failed:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faiss", type=Path, help="Python of the environment with faiss-cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5, help="runs of each (default: 5)")
    parser.add_argument("--work", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        print(json.dumps(work(args.work, args.threads)))
        return
    # Not resolved: a virtual environment is found by the path of its link.
    pythons = {"diffq": sys.executable}
    if args.faiss:
        pythons |= dict.fromkeys(["faiss", "faiss-sampled"], str(args.faiss.absolute()))
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in pythons}
    for _ in range(args.repeats):
        for name, python in pythons.items():
            runs[name].append(measure(name, python, args.threads))
    print("| contender | seconds | mean squared error |\n| --- | ---: | ---: |")
    for name, results in runs.items():
        seconds = median(result["seconds"] for result in results)
        print(f"| {name} | {seconds:.2f} | {results[0]['error']:.4f} |")


if __name__ == "__main__":
    main()

"""One contender of benchmarks/training.py: trains the models that it is told to, when told to.

Reads requests from its input, a JSON object a line, and answers each with one:
    {"memory": NAME}      peak memory of a training step of the model, after others
    {"case": NAME}        makes the model; the next requests are for it
    {"train": STEPS}      seconds of so many training steps, after a first one
    {"evaluate": STEPS}   seconds of so many forwards in eval mode, after a first one
    {"end": true}         drops the model
The first two do so in a fork of this process, in which nothing else was trained before.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from training_cases import ALL_CASES, CONTENDERS, Case, Contender
from training_contender import Meter, Trainer, prepare

M_MMAP_THRESHOLD = -3  # of malloc.h


def measure_memory(case: Case, contender: Contender, device: str) -> None:
    # Otherwise glibc decides by what happened before which freed memory it keeps.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    # Libraries that the first training loads are not the model's, and are there for any other.
    Trainer(case, contender, device).step()
    gc.collect()
    meter = Meter(device)
    answer(Trainer(case, contender, device).measure(meter))


def serve_case(case: Case, contender: Contender, device: str) -> None:
    meter = Meter(device)
    trainer = Trainer(case, contender, device)
    result: dict[str, Any] = {}
    while True:
        meter.release()
        answer(result)
        request = next(requests(), {"end": True})
        if "end" in request:
            return answer({})
        [(mode, steps)] = request.items()
        result = trainer.turn(meter, mode, steps)


def fork(task: Callable[[Case, Contender, str], None], *arguments: Any) -> None:
    """Runs a task, which answers, in a fork of this process, and waits for its end."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        if status:
            answer({"error": f"ended with status {status}"})
        return
    try:
        task(*arguments)
    except Exception as error:
        answer({"error": f"{type(error).__name__}: {error}"})
    finally:
        os._exit(0)


def requests() -> Iterator[dict[str, Any]]:
    """Lines of the input; none is sent before the last one is answered."""
    for line in iter(sys.stdin.readline, ""):
        yield json.loads(line)


def answer(result: dict[str, Any]) -> None:
    print(json.dumps(result), file=sys.__stdout__, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("device", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    sys.stdout = sys.stderr  # answers alone go to the output
    contender = CONTENDERS[args.contender]
    answer(prepare(contender, args.threads))
    for request in requests():
        [(kind, name)] = request.items()
        task = measure_memory if kind == "memory" else serve_case
        fork(task, ALL_CASES[name], contender, args.device)


if __name__ == "__main__":
    main()

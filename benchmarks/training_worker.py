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
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
import torch._dynamo  # optimizers import it: once here, not in the process of each model

import diffq
from models import task_loss
from processes import peak_resident_mb, reset_peak, resident_mb
from training_cases import ALL_CASES, CONTENDERS, Case, Contender

MEGABYTE = 2**20
LAMBDA = 0.1
M_MMAP_THRESHOLD = -3  # of malloc.h


class Meter:
    """Time and memory of a device: the processor's, or the GPU's that work is queued on."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.name = torch.cuda.get_device_name() if self.cuda else platform.machine()
        self.before_mb = 0.0 if self.cuda else resident_mb()

    def peak_mb(self, call: Callable[[], None]) -> float:
        """The most memory held during a call, without what was held at first."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            call()
            return torch.cuda.max_memory_allocated() / MEGABYTE
        # Where it is not allowed, the peak since this process began is hardly another.
        with suppress(PermissionError):
            reset_peak()
        call()
        return peak_resident_mb() - self.before_mb

    def seconds(self, call: Callable[[], None], times: int) -> float:
        self._wait()
        start = time.perf_counter()
        for _ in range(times):
            call()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


class Trainer:
    """The training of a user: a model, its quantizer and optimizer, and one batch."""

    def __init__(self, case: Case, contender: Contender, device: str) -> None:
        torch.manual_seed(0)
        self.device = device
        self.case = case
        self.plain_model = case.model().to(device)
        sizes_mb = [4 * p.numel() / MEGABYTE for p in self.plain_model.parameters()]
        self.quantized_mb = sum(size for size in sizes_mb if size > case.min_size)
        self.optimizer = torch.optim.AdamW(self.plain_model.parameters(), lr=1e-4)
        self.quantizer = self._attach(contender)
        self.model = torch.compile(self.plain_model) if case.compiled else self.plain_model
        self.inputs, self.targets = (tensor.to(device) for tensor in case.batch())

    def _attach(self, contender: Contender) -> Any:
        if contender.quantizer is None:
            return None
        make = getattr(diffq, contender.quantizer)
        quantizer = make(self.plain_model, min_size=self.case.min_size, **contender.options)
        # The earlier package's QAT has nothing to set up.
        if hasattr(quantizer, "setup_optimizer"):
            quantizer.setup_optimizer(self.optimizer)
        return quantizer

    def step(self) -> None:
        self.optimizer.zero_grad()
        with self._autocast():
            loss = task_loss(self.model(self.inputs), self.targets)
        if self.quantizer is not None:
            loss = loss + LAMBDA * self.quantizer.model_size()
        loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def evaluate(self) -> None:
        with self._autocast():
            self.model(self.inputs)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.case.bfloat16)

    def release(self) -> None:
        """Gives memory back that other contenders on the same GPU need in their turn."""
        self.optimizer.zero_grad()
        if self.device == "cuda":
            torch.cuda.empty_cache()


def measure_memory(case: Case, contender: Contender, device: str) -> None:
    # Otherwise glibc decides by what happened before which freed memory it keeps.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    # Libraries that the first training loads are not the model's, and are there for any other.
    Trainer(case, contender, device).step()
    gc.collect()
    meter = Meter(device)
    trainer = Trainer(case, contender, device)
    trainer.step()  # makes the optimizer's state, and compiles
    peak_mb = meter.peak_mb(trainer.step)
    answer({"device": meter.name, "peak_mb": peak_mb, "quantized_mb": trainer.quantized_mb})


def serve_case(case: Case, contender: Contender, device: str) -> None:
    meter = Meter(device)
    trainer = Trainer(case, contender, device)
    result: dict[str, float] = {}
    while True:
        trainer.release()
        answer(result)
        request = next(requests(), {"end": True})
        if "end" in request:
            return answer({})
        result = {"seconds": turn(trainer, meter, request)}


def turn(trainer: Trainer, meter: Meter, request: dict[str, int]) -> float:
    """Seconds of the steps asked for, after one that finds caches cold, and quantizes."""
    training = "train" in request
    call = trainer.step if training else trainer.evaluate
    trainer.model.train(training)
    call()
    return meter.seconds(call, request["train" if training else "evaluate"])


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
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    sys.stdout = sys.stderr  # answers alone go to the output
    if args.threads:
        torch.set_num_threads(args.threads)
    contender = CONTENDERS[args.contender]
    if contender.quantizer:
        getattr(diffq, contender.quantizer)  # imported on first use, and counted as memory then
    version = getattr(diffq, "__version__", None)
    answer({"diffq": version, "torch": torch.__version__, "threads": torch.get_num_threads()})
    for request in requests():
        [(kind, name)] = request.items()
        task = measure_memory if kind == "memory" else serve_case
        fork(task, ALL_CASES[name], contender, args.device)


if __name__ == "__main__":
    main()

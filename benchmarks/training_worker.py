"""One contender of benchmarks/training.py: trains the models that it is told to, when told to.

Reads requests from its input, a JSON object a line, and answers each with one:
    {"case": NAME}        makes the model in a process of its own; what its training takes
    {"train": STEPS}      seconds of so many training steps
    {"evaluate": STEPS}   seconds of so many forwards in eval mode, after a first one
    {"end": true}         ends that process
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo  # optimizers import it: once here, not in the process of each model

import diffq
from models import task_loss
from processes import peak_resident_mb, reset_peak, resident_mb
from training_cases import ALL_CASES, CONTENDERS, Case, Contender

MEGABYTE = 2**20
LAMBDA = 0.1
MEMORY_STEPS = 3


class Meter:
    """Time and memory of a device: the processor's, or the GPU's that work is queued on."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.before_mb = 0.0 if self.cuda else resident_mb()

    def start_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats() if self.cuda else reset_peak()

    def peak_mb(self) -> float:
        """The most memory held since `start_peak()`, without what was held at first."""
        if self.cuda:
            return torch.cuda.max_memory_allocated() / MEGABYTE
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
        limit = case.min_size * MEGABYTE
        sizes = [4 * p.numel() for p in self.plain_model.parameters()]
        self.quantized_mb = sum(size for size in sizes if size >= limit) / MEGABYTE
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


def serve_case(name: str, contender: Contender, device: str) -> None:
    meter = Meter(device)
    trainer = Trainer(ALL_CASES[name], contender, device)
    meter.start_peak()
    meter.seconds(trainer.step, MEMORY_STEPS)
    result = {"peak_mb": meter.peak_mb(), "quantized_mb": trainer.quantized_mb}
    while True:
        trainer.release()
        answer(result)
        request = next(requests())
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


def fork_case(name: str, contender: Contender, device: str) -> None:
    """Serves one model in a fork of this process, which goes on reading when that ends."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        if status:
            answer({"error": f"ended with status {status}"})
        return
    try:
        serve_case(name, contender, device)
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
    answer({"torch": torch.__version__, "threads": torch.get_num_threads()})
    for request in requests():
        fork_case(request["case"], contender, args.device)


if __name__ == "__main__":
    main()

"""A contender of benchmarks/training.py: the training of a user, and what it is measured by."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import torch._dynamo  # optimizers import it: once here, not in the process of each model

import diffq
from gpu_work import work_of
from models import task_loss
from processes import peak_resident_mb, reset_peak, resident_mb
from training_cases import Case, Contender
from training_report import Answer

MEGABYTE = 2**20
LAMBDA = 0.1


class Meter:
    """Time, memory and work of a device: the processor's, or the GPU's that work is queued on."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.name = torch.cuda.get_device_name() if self.cuda else platform.machine()
        self.before_mb = torch.cuda.memory_allocated() / MEGABYTE if self.cuda else resident_mb()

    def peak_mb(self, call: Callable[[], None]) -> float:
        """The most memory held during a call, without what was held at first."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            call()
            return torch.cuda.max_memory_allocated() / MEGABYTE - self.before_mb
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

    def work(self, call: Callable[[], None]) -> Answer:
        """Launches on the GPU and their milliseconds; nothing on a CPU."""
        if not self.cuda:
            return {}
        work = work_of(call)
        return {"launches": work.launches, "gpu_ms": work.ms}

    def release(self) -> None:
        """Gives memory back that is cached, which other contenders on the same GPU need."""
        if self.cuda:
            torch.cuda.empty_cache()

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


class Trainer:
    """The training of a user: a model, its quantizer and optimizer, and one batch."""

    def __init__(self, case: Case, contender: Contender, device: str) -> None:
        torch.manual_seed(0)
        self.device = device
        self.case = case
        with torch.device(device):
            self.plain_model = case.model()
            self.inputs, self.targets = case.batch()
        sizes_mb = [4 * p.numel() / MEGABYTE for p in self.plain_model.parameters()]
        self.quantized_mb = sum(size for size in sizes_mb if size > case.min_size)
        self.optimizer = torch.optim.AdamW(self.plain_model.parameters(), lr=1e-4)
        self.quantizer = self._attach(contender)
        self.model = torch.compile(self.plain_model) if case.compiled else self.plain_model

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

    def measure(self, meter: Meter) -> Answer:
        """Memory of a step after the first, and its work on a GPU."""
        self.step()  # makes the optimizer's state, and compiles
        peak_mb = meter.peak_mb(self.step)
        answer = {"device": meter.name, "peak_mb": peak_mb, "quantized_mb": self.quantized_mb}
        answer |= meter.work(self.step)
        self.optimizer.zero_grad()
        return answer

    def turn(self, meter: Meter, mode: str, steps: int) -> Answer:
        """Seconds of steps to "train" or "evaluate", after one that finds caches cold."""
        call = self.step if mode == "train" else self.evaluate
        self.model.train(mode == "train")
        call()
        seconds = meter.seconds(call, steps)
        self.optimizer.zero_grad()
        return {"seconds": seconds}

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.case.bfloat16)


def prepare(contender: Contender, threads: int) -> Answer:
    """Sets the number of threads, 0 for torch's own; returns the versions in use."""
    if threads:
        torch.set_num_threads(threads)
    if contender.quantizer:
        getattr(diffq, contender.quantizer)  # imported on first use, and counted as memory then
    version = getattr(diffq, "__version__", None)
    return {"diffq": version, "torch": torch.__version__, "threads": torch.get_num_threads()}

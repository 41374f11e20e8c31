"""Contenders of benchmarks/training.py that share one process, as those on a GPU do."""

from __future__ import annotations

import gc
from typing import Any

import torch._dynamo

from training_cases import ALL_CASES, CONTENDERS
from training_contender import Meter, Trainer, prepare
from training_report import Answer

# All contenders compile the code of one model, each for itself. Dynamo gives up after 8.
torch._dynamo.config.cache_size_limit = 64


class Neighbour:
    """A contender in this process, which answers the requests of a worker.

    Memory is measured of the model that is then trained, because a GPU's allocator counts exactly,
    whatever happened before.
    """

    def __init__(self, name: str, device: str, threads: int = 0) -> None:
        self.name, self._device = name, device
        self._contender = CONTENDERS[name]
        self._versions = prepare(self._contender, threads)
        self._meter = Meter(device)
        self._trainer: Trainer | None = None

    def ready(self) -> Answer:
        """The versions in use."""
        return self._versions

    def ask(self, **request: Any) -> Answer:
        """Does what a request says; with `error` in the answer, the model is gone."""
        [(kind, value)] = request.items()
        try:
            return self._answer(kind, value)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        # Out of the handler, whose error holds the frames that hold the model.
        self._drop()
        return answer

    def _answer(self, kind: str, value: Any) -> Answer:
        if kind == "memory":
            self._drop()
            self._meter = Meter(self._device)
            self._trainer = Trainer(ALL_CASES[value], self._contender, self._device)
            return self._trainer.measure(self._meter)
        if kind == "end":
            self._drop()
        elif self._trainer is not None and kind != "case":
            return self._trainer.turn(self._meter, kind, value)
        return {}

    def _drop(self) -> None:
        self._trainer = None
        gc.collect()
        self._meter.release()

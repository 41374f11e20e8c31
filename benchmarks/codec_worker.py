"""One contender of benchmarks/codec.py at one size, in a process of its own.

Prints a JSON object: operation -> {"seconds": ..., "peak_mb": ...}, and the file's size.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from processes import peak_resident_mb, reset_peak, resident_mb

# Millions of weights -> number and width of square layers.
LAYERS = {1: (4, 512), 50: (12, 2048), 265: (16, 4096)}


def make_model(millions: int) -> nn.Module:
    count, width = LAYERS[millions]
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(count)))


def attach(millions: int) -> tuple[nn.Module, Any]:
    """A model whose groups of 8 weights have 3 to 6 bits, as after a training."""
    import diffq

    torch.manual_seed(0)
    model = make_model(millions)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    quantizer = diffq.DiffQuantizer(model, group_size=8)
    quantizer.setup_optimizer(optimizer)
    with torch.no_grad():
        for logits in optimizer.param_groups[-1]["params"]:
            logits.normal_(-1.7, 0.4)
    return model.eval(), quantizer


class Meter:
    """Times operations, with the memory that each takes on top of what is held before it."""

    def __init__(self) -> None:
        self.results: dict[str, dict[str, float]] = {}

    def measure(self, name: str, operation: Callable[[], Any]) -> Any:
        reset_peak()
        before = resident_mb()
        start = time.perf_counter()
        result = operation()
        seconds = time.perf_counter() - start
        self.results[name] = {"seconds": seconds, "peak_mb": peak_resident_mb() - before}
        return result


def run_diffq(codec: str, millions: int, path: Path, meter: Meter) -> None:
    import diffq
    from diffq.storage.state import from_state

    _, quantizer = attach(millions)
    state = quantizer.get_quantized_state(packed=False)
    measure_codec(codec, from_state(state).records, meter)
    meter.measure("save", lambda: diffq.save(state, path, codec=codec))
    fresh = make_model(millions)
    meter.measure("load", lambda: diffq.load(path, fresh))


def measure_codec(codec: str, records: dict[str, Any], meter: Meter) -> None:
    from diffq.format.container import encode_parts
    from diffq.format.reader import Reader

    parts = meter.measure("pack", lambda: encode_parts(records, codec=codec))
    reader = Reader(b"".join(parts))
    meter.measure("unpack", reader.values_of)


def run_earlier(millions: int, path: Path, meter: Meter) -> None:
    """The earlier package as a black box; packing is what `packed=True` adds."""
    import diffq

    _, quantizer = attach(millions)
    plain = meter.measure("plain", lambda: quantizer.get_quantized_state(packed=False))
    state = meter.measure("packed", lambda: quantizer.get_quantized_state(packed=True))
    meter.measure("save", lambda: torch.save(quantizer.get_quantized_state(packed=True), path))
    fresh = make_model(millions)
    meter.measure("restore plain", lambda: diffq.restore_quantized_state(fresh, plain))
    meter.measure("restore packed", lambda: diffq.restore_quantized_state(fresh, state))
    meter.measure(
        "load",
        # Its files need the unsafe unpickler.
        lambda: diffq.restore_quantized_state(fresh, torch.load(path, weights_only=False)),
    )
    for name, more, less in (
        ("pack", "packed", "plain"),
        ("unpack", "restore packed", "restore plain"),
    ):
        seconds = meter.results[more]["seconds"] - meter.results.pop(less)["seconds"]
        meter.results[name] = {**meter.results.pop(more), "seconds": seconds}


def run_torch(millions: int, path: Path, meter: Meter) -> None:
    model = make_model(millions)
    meter.measure("save", lambda: torch.save(model.state_dict(), path))
    meter.measure("load", lambda: model.load_state_dict(torch.load(path)))


def run_safetensors(millions: int, path: Path, meter: Meter) -> None:
    from safetensors.torch import load_file, save_file

    model = make_model(millions)
    meter.measure("save", lambda: save_file(model.state_dict(), path))
    meter.measure("load", lambda: model.load_state_dict(load_file(path)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender")
    parser.add_argument("millions", type=int, choices=LAYERS)
    parser.add_argument("path", type=Path)
    args = parser.parse_args()
    meter = Meter()
    runs: dict[str, Callable[[], None]] = {
        "diffq-zstd": lambda: run_diffq("zstd", args.millions, args.path, meter),
        "diffq-rans": lambda: run_diffq("rans", args.millions, args.path, meter),
        "diffq-packed": lambda: run_diffq("packed", args.millions, args.path, meter),
        "earlier": lambda: run_earlier(args.millions, args.path, meter),
        "torch": lambda: run_torch(args.millions, args.path, meter),
        "safetensors": lambda: run_safetensors(args.millions, args.path, meter),
    }
    runs[args.contender]()
    print(json.dumps({"operations": meter.results, "file_mb": os.path.getsize(args.path) / 2**20}))


if __name__ == "__main__":
    main()

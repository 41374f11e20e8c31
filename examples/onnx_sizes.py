"""Exports the demo's files to ONNX, and compares their sizes: run `make demo` before.

    .venv/bin/pip install -e '.[onnx]' onnxruntime
    .venv/bin/python examples/onnx_sizes.py

Every ONNX file is run by onnxruntime, and has to give what the model in PyTorch gives.
"""

from __future__ import annotations

import argparse
import io
import time
from pathlib import Path

import diffq
import onnxruntime
import torch
import zstandard
from common import print_table
from mnist import ResNet

IMAGES = torch.randn(64, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def float_file(model: torch.nn.Module) -> bytes:
    """The ONNX file that torch writes."""
    program = torch.onnx.export(model, (IMAGES,), dynamo=True, verbose=False)
    return program.model_proto.SerializeToString()


def integer_file(path: Path) -> bytes:
    """The ONNX file that diffq writes."""
    file = io.BytesIO()
    diffq.export.onnx(path, file, (IMAGES,), model=ResNet().eval())
    return file.getvalue()


def row(name: str, file: Path, data: bytes, model: torch.nn.Module) -> list[str]:
    """Sizes of an ONNX file, how long it takes to load, and how far its outputs are off."""
    start = time.perf_counter()
    session = onnxruntime.InferenceSession(data)
    seconds = time.perf_counter() - start
    (outputs,) = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})
    with torch.no_grad():
        difference = (torch.from_numpy(outputs) - model(IMAGES)).abs().max().item()
    packed = len(zstandard.ZstdCompressor(19).compress(data))
    ratio = packed / file.stat().st_size
    sizes = [f"{len(data):,}", f"{packed:,}", f"{ratio:.2f}"]
    return [name, f"{file.stat().st_size:,}", *sizes, f"{1e3 * seconds:.0f}", f"{difference:.1e}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/mnist"), help="the demo's files")
    rows = []
    for path in sorted(parser.parse_args().out.glob("*.diffq")):
        model = diffq.load(path, ResNet()).eval()
        rows.append(row(f"{path.stem}, float32", path, float_file(model), model))
        rows.append(row(f"{path.stem}, integers", path, integer_file(path), model))
    header = ["ONNX file", ".diffq", "bytes", "zstd -19", "of .diffq", "ms to load", "off by"]
    print_table("ONNX files of the demo's models", header, rows)


if __name__ == "__main__":
    main()

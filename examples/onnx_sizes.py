"""Exports the demo's files to ONNX, and compares their sizes: run `make demo` before.

    .venv/bin/pip install -e '.[onnx]' onnxruntime
    .venv/bin/python examples/onnx_sizes.py

Every ONNX file is run by onnxruntime, and has to give what the model in PyTorch gives.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import onnxruntime
import torch
import zstandard

import diffq
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


def check(data: bytes, model: torch.nn.Module) -> None:
    """Stops unless onnxruntime computes with a file what the model computes."""
    session = onnxruntime.InferenceSession(data)
    (outputs,) = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(outputs), model(IMAGES), rtol=1e-4, atol=1e-4)


def row(path: Path) -> list[str]:
    """The sizes of a file of diffq, and of the two ONNX files of its model."""
    model = diffq.load(path, ResNet()).eval()
    files = [float_file(model), integer_file(path)]
    sizes = [path.stat().st_size]
    for data in files:
        check(data, model)
        sizes += [len(data), len(zstandard.ZstdCompressor(19).compress(data))]
    return [path.stem, *(f"{size / 1000:.0f}" for size in sizes)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/mnist"), help="the demo's files")
    paths = sorted(parser.parse_args().out.glob("*.diffq"))
    header = ["model", ".diffq", "float32", "zstd", "integers", "zstd"]
    print_table(
        "Sizes in kB, of ONNX files before and after zstd -19",
        header,
        [row(path) for path in paths],
    )


if __name__ == "__main__":
    main()

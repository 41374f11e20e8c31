"""Export where its packages are missing."""

import subprocess
import sys

import pytest

CODE = """
import sys
sys.modules[sys.argv[1]] = None
import torch, diffq
model = torch.nn.Linear(64, 64).eval()
quantizer = diffq.QATQuantizer(model, min_size=0)
try:
    diffq.export.onnx(quantizer, sys.argv[2], (torch.randn(1, 64),))
except diffq.ConfigError as error:
    print(error)
"""


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_missing_packages(package, tmp_path):
    """Without onnx or onnxscript, an error names the extra, and nothing is written."""
    command = [sys.executable, "-c", CODE, package, str(tmp_path / "model.onnx")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "needs the packages onnx and onnxscript" in said
    assert "pip install 'diffq[onnx]'" in said
    assert list(tmp_path.iterdir()) == []

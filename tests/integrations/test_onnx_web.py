"""ONNX files that store integers, run by onnxruntime-web in a browser."""

import numpy as np
import pytest
import torch

from tests.compare import close, same_bits
from tests.integrations.browser import find_browser, run_in_browser
from tests.integrations.tiny import library

onnx = library("onnx")
library("onnxscript")
library("onnxruntime")

from tests.integrations.onnx_models import case, records_of, showing  # noqa: E402

#: Another runtime sums in another order.
OTHER_RUNTIME = 2**12


@pytest.mark.parametrize("kind", ["diffq", "product"])
def test_weights_bit_for_bit(kind, tmp_path):
    """onnxruntime-web decodes weights to the bits of the records, and evaluates alike."""
    browser = find_browser()
    model, quantizer, _, data = case("images", kind)
    records = records_of(data, quantizer)
    outputs = run_in_browser(browser, showing(data, records), tmp_path)
    for name, wanted in records.items():
        found = np.frombuffer(outputs.pop(name), np.float32).reshape(wanted.shape)
        assert same_bits(torch.from_numpy(found.copy()), wanted)
    (output,) = outputs.values()
    found = torch.from_numpy(np.frombuffer(output, np.float32).reshape(2, 10).copy())
    with torch.no_grad():
        assert close(found, model(torch.ones(2, 3, 16, 16)), OTHER_RUNTIME)

"""Settings of the tests on a GPU."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _all_digits(monkeypatch):
    """Lets convolutions and recurrent layers compute in float32, and not in TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)

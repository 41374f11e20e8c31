"""Where the kernels run that are tested: in Triton's interpreter, or on a GPU.

Triton decides between them when it is imported, so each is a process of its own:
`make test-kernels` and `make test-gpu`.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def device():
    """The device of the kernels; skips the module of tests that asks for it where there is none."""
    pytest.importorskip("triton", reason="triton is missing: run `make test-kernels`")
    if not INTERPRETED and not torch.cuda.is_available():
        reason = "neither interpreted nor on a GPU: run `make test-kernels` or `make test-gpu`"
        pytest.skip(reason, allow_module_level=True)
    return torch.device("cpu" if INTERPRETED else "cuda:0")


def gradients_close(found, expected, dtype):
    """Compares gradients: to half a unit in the last place of their dtype, and float32 sums."""
    eps = torch.finfo(dtype).eps
    scale = expected.double().square().mean().sqrt().item()
    rtol = 1e-4 if dtype == torch.float32 else eps
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=rtol, atol=1e-4 * scale + 1e-12
    )

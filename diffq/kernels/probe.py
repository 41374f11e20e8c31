"""A first launch, which shows whether Triton works on a device and how kernels are launched."""

from __future__ import annotations

import torch
import triton

from diffq.kernels.device.probe import probe_kernel
from diffq.kernels.launch import Launch, on

_BLOCK = 32

# The first that has tuples in kernels; torch 2.7 brings it.
_LEAST_VERSION = (3, 3)


def run(device: torch.device) -> None:
    """Runs a kernel on a device, and decides how later ones are launched.

    Raises:
        Exception: whatever Triton raises, or a RuntimeError if it is too old or its numbers are
            wrong.
    """
    version = triton.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < _LEAST_VERSION:
        raise RuntimeError(f"Triton must be 3.3 or newer, got {version}; torch 2.7 brings it")
    with on(device):
        launch = Launch(probe_kernel, (_BLOCK,))
        if not _is_right(launch, device, 3):
            raise RuntimeError("a test kernel computed wrong numbers")
        # The same launch again, with other numbers: by what is compiled, if this Triton allows it.
        Launch.direct = True
        try:
            Launch.direct = _is_right(launch, device, 7)
        except Exception:
            Launch.direct = False


def _is_right(launch: Launch, device: torch.device, number: int) -> bool:
    source = torch.arange(_BLOCK, dtype=torch.float32, device=device)
    found = torch.zeros_like(source)
    launch(1, source, found, number, float(number))
    return torch.equal(found, source * number + number)

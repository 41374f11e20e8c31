"""A first launch, which shows whether Triton works on a device and how kernels are launched."""

from __future__ import annotations

import torch

from diffq.kernels.device.probe import probe_kernel
from diffq.kernels.launch import Launch, on

_BLOCK = 32


def run(device: torch.device) -> None:
    """Runs a kernel on a device, and decides how later ones are launched.

    Raises:
        Exception: whatever Triton raises, or a RuntimeError if its numbers are wrong.
    """
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

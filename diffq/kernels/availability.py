"""Where kernels run. Only the first question about a GPU imports Triton."""

from __future__ import annotations

import sys
from functools import cache

import torch

from diffq.errors import warn

# Of the first GPUs that Triton compiles for.
_LEAST_CAPABILITY = (7, 0)


def available(device: torch.device) -> bool:
    """Whether kernels run on a device: GPUs of NVIDIA from Volta on, if Triton works there.

    The first call for a device compiles and runs a tiny kernel, and waits for the device. It warns
    if that fails. Later calls give the same answer.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    return _available(index)


@cache
def _available(index: int) -> bool:
    if torch.cuda.get_device_capability(index) < _LEAST_CAPABILITY:
        return False
    try:
        from diffq.kernels import probe

        probe.run(torch.device("cuda", index))
    except ImportError:
        if sys.platform == "linux":  # no other system has wheels of Triton
            warn(
                "Training on this GPU is slower than it could be, because Triton is missing, which "
                "the quantizer's kernels are written in. Run: pip install triton."
            )
        return False
    # Whatever goes wrong in a compiler, its subprocesses and the driver, torch's operations work.
    except Exception as problem:
        reason = f"{type(problem).__name__}: {problem}"
        warn(
            "Training on this GPU is slower than it could be, because Triton cannot run the "
            f"quantizer's kernels: {reason[:300]}. Triton needs a C compiler, such as gcc, and a "
            "cache that it can write to, by default ~/.triton."
        )
        return False
    return True

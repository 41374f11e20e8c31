"""Worker processes of the benchmarks: the Python that each runs in, and its memory.

Workers import this too, so that it needs nothing but the standard library.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def worker(
    script: str, earlier: Path | None = None, root: Path = ROOT
) -> tuple[list[str], dict[str, str]]:
    """Command and environment to run a script of this folder.

    It imports diffq of the checkout `root`; or, where `earlier` is the Python of an
    environment with the earlier package, that one.
    """
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if earlier is None:
        environment["PYTHONPATH"] = str(root)
    # Not resolved: a virtual environment is found by the path of its link.
    python = sys.executable if earlier is None else str(earlier.absolute())
    return [python, str(ROOT / "benchmarks" / script)], environment


def resident_mb() -> float:
    """Memory of this process that is resident now, in MB of 2**20 bytes."""
    return _status_mb("VmRSS")


def peak_resident_mb() -> float:
    """The most that was resident since `reset_peak()`."""
    return _status_mb("VmHWM")


def reset_peak() -> None:
    """Lets the peak count from here.

    Raises:
        PermissionError: the system does not allow it.
    """
    Path("/proc/self/clear_refs").write_text("5")


def _status_mb(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return float(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}; this benchmark needs Linux.")

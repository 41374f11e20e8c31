"""What the kernels are compiled to, for GPUs that need not be there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels import backend

if backend.device().type != "cpu":
    pytest.skip("takes no GPU: run `make test-kernels`", allow_module_level=True)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Each kernel's constants and PTX, for two GPUs."""
    settings = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    settings |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    settings["TRITON_DISABLE_LINE_INFO"] = "1"
    command = [sys.executable, "-m", "tests.kernels.compiled"]
    run = subprocess.run(command, env=settings, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_all_kernels_compile(rows):
    """Every kernel compiles for A100 and H100."""
    assert {row["capability"] for row in rows} == {80, 90}
    assert len({row["kernel"] for row in rows}) == 7


def test_wide_access(rows):
    """Aligned weights and gradients are read and written 16 bytes at a time; others are not."""
    for row in rows:
        if "finish" in row["kernel"]:
            continue
        aligned = row["constants"]["ALIGNED"] == "True"
        assert ("ld.global.v4.b32" in row["ptx"]) == aligned, row["kernel"]
        if row["kernel"] in ("sample_kernel", "scaled_kernel"):
            assert ("st.global.v4.b32" in row["ptx"]) == aligned


def test_exact_operations(rows):
    """Values on a grid are a product and a sum that are apart, of a division that is exact."""
    seen = 0
    for row in rows:
        if row["kernel"] == "sample_kernel" and row["constants"]["KIND"] == "2":
            seen += 1
            products = set(re.findall(r"mul\.rn\.f32 (%r\d+|%f\d+)", row["ptx"]))
            sums = re.findall(r"add\.rn\.f32 \S+ (%r\d+|%f\d+), (?:%r\d+|%f\d+)", row["ptx"])
            # Four tiles of eight weights a thread.
            assert sum(term in products for term in sums) >= 32
            assert row["ptx"].count("div.rn.f32") >= 32
            assert "div.approx" not in row["ptx"]
            assert "div.full" not in row["ptx"]
    assert seen == 2


def test_no_number_is_flushed(rows):
    """Subnormal numbers are lost in exponentials, floor, ceil and roots of sizes alone."""
    harmless = {"ex2.approx.ftz.f32", "fma.rn.ftz.f32", "fma.rm.ftz.f32", "cvt.ftz.sat.f32.f32"}
    harmless |= {"cvt.rmi.ftz.f32.f32", "cvt.rpi.ftz.f32.f32"}
    for row in rows:
        if row["kernel"] == "scaled_finish_kernel":
            continue
        assert set(re.findall(r"\S+\.ftz\S*", row["ptx"])) <= harmless

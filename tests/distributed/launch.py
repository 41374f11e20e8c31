"""Starts scripts on two ranks, and tells what they did."""

import ast
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch.distributed as dist

HERE = Path(__file__).parent
SECONDS = 300


@dataclass(frozen=True)
class Launch:
    """What a script of claims left behind: see `tests.distributed.ranks`."""

    folder: Path
    output: str

    def assert_holds(self, claim):
        """Fails, or skips, as a claim did on either rank."""
        for rank in range(2):
            results = self.folder / f"{rank}.json"
            assert results.exists(), self.output
            result = json.loads(results.read_text()).get(claim)
            assert result is not None, self.output
            if result != "passed":
                pytest.skip(result)


def claims(script):
    """The names of a script's functions that each check one claim."""
    tree = ast.parse((HERE / script).read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [node.name for node in functions if node.name.startswith("check_")]


def run_claims(script, folder):
    """Runs a script on two ranks that find each other by themselves."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this build of torch has no gloo")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    process = subprocess.Popen(
        [*launcher, "--nproc-per-node", "2", str(HERE / script), str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Without GPUs, of which there may be fewer than ranks.
        env={**os.environ, "PYTHONPATH": str(HERE.parent.parent), "CUDA_VISIBLE_DEVICES": ""},
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        output += f"\nkilled after {SECONDS} s"
    return Launch(folder, output)

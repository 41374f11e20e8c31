"""Starts scripts on two ranks, and tells what they did."""

import ast
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch.distributed as dist

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SECONDS = 300


@dataclass(frozen=True)
class Launch:
    """What a script of claims left behind: see `tests.distributed.ranks`."""

    folder: Path
    output: str

    def assert_holds(self, claim):
        """Fails, or skips, as a claim did on either rank."""
        for rank in range(2):
            skipped = self.folder / f"{rank}.skipped"
            if skipped.exists():
                pytest.skip(skipped.read_text())
            passed = self.folder / f"{rank}.passed"
            assert passed.exists(), self.output
            assert claim in passed.read_text().split(), self.output


def claims(script):
    """The names of a script's functions that each check one claim."""
    tree = ast.parse((HERE / script).read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [node.name for node in functions if node.name.startswith("check_")]


def run_claims(script, folder):
    """Runs a script of claims."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this build of torch has no gloo")
    _, output = torchrun(HERE / script, folder)
    return Launch(folder, output)


def torchrun(*command):
    """Runs a command line on two ranks that find each other by themselves.

    Returns:
        The exit code and all that was printed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    process = subprocess.Popen(
        [*launcher, "--standalone", "--nproc-per-node", "2", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        output += f"\nkilled after {SECONDS} s"
    return process.returncode, output

"""Settings of all tests: bounded property tests, repeatable random numbers, threads, kernels."""

import os
import random
from contextlib import nullcontext

# The tensors of tests are small: more threads cost more than they give. OpenMP reads this when
# torch is imported, for every thread and every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from hypothesis import settings

from tests import processors

settings.register_profile("local", max_examples=50, deadline=None)
# The same examples on every run, so that a red check is the fault of the change it checks.
settings.register_profile("ci", parent=settings.get_profile("local"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") == "true" else "local")


def pytest_report_header():
    """The versions that a result belongs to."""
    return f"torch {torch.__version__}, numpy {np.__version__}"


# Files that take longest, which processes that share the others must not begin last.
LONGEST = ["test_distributed.py", "test_compile.py", "test_target.py", "test_benchmarks.py"]


def pytest_collection_modifyitems(items):
    """Runs the longest files first."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(autouse=True)
def _seed():
    """Every test starts from the same random numbers, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _kernels():
    """With `PERTURB=1`, no matrix product gives the same last digits twice."""
    with processors.perturbed() if processors.wanted() else nullcontext():
        yield

"""Settings of all tests: bounded property tests and repeatable random numbers."""

import os
import random

import numpy as np
import pytest
import torch
from hypothesis import settings

settings.register_profile("local", max_examples=50, deadline=None)
# The same examples on every run, so that a red check is the fault of the change it checks.
settings.register_profile("ci", parent=settings.get_profile("local"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") == "true" else "local")

# The tensors of tests are small: more threads cost more than they give.
torch.set_num_threads(1)


def pytest_report_header():
    """The versions that a result belongs to."""
    return f"torch {torch.__version__}, numpy {np.__version__}"


@pytest.fixture(autouse=True)
def _seed():
    """Every test starts from the same random numbers, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)

"""Training on two ranks, started as users start it, with torchrun."""

import pytest

from tests.distributed.launch import claims, run_claims


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    """What became of the claims about DistributedDataParallel."""
    return run_claims("ddp.py", tmp_path_factory.mktemp("ddp"))


@pytest.mark.parametrize("claim", claims("ddp.py"))
def test_distributed_data_parallel(ddp, claim):
    """What the docstring of each claim in tests/distributed/ddp.py says."""
    ddp.assert_holds(claim)


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory):
    """What became of the claims about FSDP2."""
    return run_claims("fsdp.py", tmp_path_factory.mktemp("fsdp"))


@pytest.mark.parametrize("claim", claims("fsdp.py"))
def test_fully_sharded(fsdp, claim):
    """What the docstring of each claim in tests/distributed/fsdp.py says."""
    fsdp.assert_holds(claim)


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """What became of the claims about the example."""
    return run_claims("example.py", tmp_path_factory.mktemp("example"))


@pytest.mark.parametrize("claim", claims("example.py"))
def test_example(example, claim):
    """What the docstring of each claim in tests/distributed/example.py says."""
    example.assert_holds(claim)

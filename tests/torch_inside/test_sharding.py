"""Tensors that ranks hold in parts, and those of one process, which are whole."""

import pytest
import torch
from torch import nn

from diffq.torch_inside import sharding
from tests.distributed.launch import claims, run_claims


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """What became of the claims about tensors in parts."""
    return run_claims("parts.py", tmp_path_factory.mktemp("parts"))


@pytest.mark.parametrize("claim", claims("parts.py"))
def test_in_parts(parts, claim):
    """What the docstring of each claim in tests/distributed/parts.py says."""
    parts.assert_holds(claim)


def test_whole_tensors():
    """A tensor of one process is no part, is gathered as itself, and its layout is its device."""
    tensor = torch.ones(2)
    assert not sharding.is_dtensor(tensor)
    assert sharding.whole(tensor) is tensor
    assert sharding.layout_of(tensor) == (tensor.device, ())


def test_models_of_one_process():
    """A model of one process is not sharded, and its parameters stay in their places."""
    model = nn.Linear(2, 2)
    assert not sharding.is_sharded(model)
    sharding.reshard(model)
    kept = dict(model.named_parameters())
    with sharding.whole_parameters([model]):
        assert all(p is kept[name] for name, p in model.named_parameters())

"""What the scripts of claims share: each rank checks every claim of its script in turn."""

import hashlib
import json
import sys
import tempfile
from contextlib import nullcontext
from datetime import timedelta
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import diffq
from tests import processors


def main(members):
    """Checks the claims of a script on this rank, and writes down which hold.

    The first that fails ends the process: the other rank may be waiting for it.

    Args:
        members: the script's `globals()`.
    """
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    results = {}
    with processors.perturbed() if processors.wanted() else nullcontext():
        for name, check in list(members.items()):
            if name.startswith("check_"):
                torch.manual_seed(0)
                results[name] = _outcome(check)
                Path(sys.argv[1], f"{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def _outcome(check):
    """Checks one claim; gives "passed", or why it was skipped."""
    try:
        check()
    except pytest.skip.Exception as skipped:
        return str(skipped)
    return "passed"


@cache
def require_fsdp():
    """Skips the claim where FSDP2 does not train on the CPU, with no quantizer either."""
    model = fully_shard(nn.Linear(4, 4))
    try:
        model(torch.ones(2, 4)).sum().backward()
    except AttributeError as error:
        pytest.skip(f"FSDP2 of torch {torch.__version__} does not run on the CPU: {error}")


def same_on_ranks(*values):
    """Whether all ranks hold the same values: tensors bit for bit, others by their text."""
    digest = hashlib.sha256()
    for value in values:
        tensor = isinstance(value, torch.Tensor)
        digest.update(value.detach().numpy().tobytes() if tensor else repr(value).encode())
    digests = [None] * dist.get_world_size()
    dist.all_gather_object(digests, digest.hexdigest())
    return len(set(digests)) == 1


def file_of(source):
    """The bytes that `diffq.save` writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.diffq"
        diffq.save(source, path)
        return path.read_bytes()


def batches(make, rank, steps):
    """What a rank trains on; any rank can tell."""
    generator = torch.Generator().manual_seed(rank)
    return [make(generator) for _ in range(steps)]

"""What the scripts of claims share: each rank checks every claim of its script in turn."""

import hashlib
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import diffq


def main(members):
    """Checks the claims of a script on this rank, and writes down which hold.

    The first that fails ends the process: the other rank may be waiting for it.

    Args:
        members: the script's `globals()`.
    """
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    passed = folder / f"{dist.get_rank()}.passed"
    for name, check in list(members.items()):
        if name.startswith("check_"):
            torch.manual_seed(0)
            check()
            with passed.open("a") as file:
                file.write(f"{name}\n")
    dist.destroy_process_group()


def skip(reason):
    """Ends the script: nothing of it can be checked here."""
    (Path(sys.argv[1]) / f"{dist.get_rank()}.skipped").write_text(reason)
    dist.destroy_process_group()
    sys.exit()


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

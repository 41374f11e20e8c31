"""What holds for examples/distributed.py, on a small model and a little text."""

import shutil
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from tests.distributed.ranks import main, require_fsdp
from tests.processors import repeatable

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import distributed
import language_model

SMALL = {"WIDTH": 16, "HEADS": 2, "LAYERS": 2, "CONTEXT": 16, "BATCH": 2, "TEXT_BYTES": 10_000}


@repeatable()
def _resume(strategy):
    """Trains to the end, and again from the middle; returns both files."""
    folders = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folders)
    folder = Path(folders[0])
    arguments = f"--strategy {strategy} --noise gaussian --steps 6 --every 3 --bits-lr 0.3"
    paths = f"--verify --checkpoint {folder}/checkpoint --out {folder}/"
    with mock.patch.multiple(language_model, **SMALL):
        files = []
        for last in ("out", "again --resume"):
            args = distributed.parse_arguments([*arguments.split(), *(paths + last).split()])
            files.append(distributed.run(args, torch.device("cpu")).read_bytes())
            dist.barrier()
            if dist.get_rank() == 0 and not args.resume:
                shutil.rmtree(folder / "checkpoint" / "step-000006")
            dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
    return files


def check_ddp():
    """Under DDP, a training that is resumed ends with the same file as one that never stopped."""
    one, other = _resume("ddp")
    assert one == other


def check_fsdp2():
    """The same holds under FSDP2."""
    require_fsdp()
    one, other = _resume("fsdp2")
    assert one == other


if __name__ == "__main__":
    main(globals())

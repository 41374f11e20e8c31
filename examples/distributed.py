"""Train and compress the language model of language_model.py on several processes.

    torchrun --nproc-per-node 2 examples/distributed.py --strategy ddp
    torchrun --nproc-per-node 2 examples/distributed.py --strategy fsdp2

    torchrun ... --checkpoint out/run             # save everything every 100 steps
    torchrun ... --checkpoint out/run --resume    # and go on from there, as if never stopped

DDP keeps a whole model in each process; FSDP2 keeps a part of it, and gathers each block
while it runs. In both, attach the quantizer to the plain model, wrap or shard it, make the
optimizer, and call setup_optimizer, in this order. Each process trains on batches and noise
of its own. Processes compute on GPUs where there are some, else on the CPU. At the end,
one of them writes one file, which holds the whole model whatever the strategy was.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

import diffq
from common import console, make_parser, make_progress, megabytes, warmup_cosine
from language_model import (
    Transformer,
    bits_per_character,
    load_text,
    make_optimizer,
    training_loss,
)


@dataclass
class Training:
    """All that changes from step to step, in the form that checkpoints ask for."""

    model: nn.Module
    quantizer: diffq.DiffQuantizer
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    batches: torch.Generator
    steps: int = 0

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {
            "model": model,  # with the logits of the bitwidths
            "optimizer": optimizer,
            "schedule": self.schedule.state_dict(),
            "steps": self.steps,
            # Each process has noise and batches of its own.
            f"random{dist.get_rank()}": {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
                "batches": self.batches.get_state(),
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        self.schedule.load_state_dict(state["schedule"])
        self.steps = state["steps"]
        random = state[f"random{dist.get_rank()}"]
        torch.set_rng_state(random["cpu"])
        if random["cuda"] is not None:
            torch.cuda.set_rng_state(random["cuda"])
        self.batches.set_state(random["batches"])


def attach(model: nn.Module, args: argparse.Namespace) -> diffq.DiffQuantizer:
    small = args.small_bits or None
    return diffq.DiffQuantizer(
        model, group_size=args.group_size, small_bits=small, noise=args.noise
    )


def prepare(args: argparse.Namespace, device: torch.device) -> Training:
    """Attach, wrap or shard, make the optimizer, hand it over: the order matters."""
    torch.manual_seed(args.seed)  # the same weights everywhere
    model: nn.Module = Transformer().to(device)
    quantizer = attach(model, args)
    if args.strategy == "ddp":
        model = DistributedDataParallel(model)
    else:
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    optimizer = make_optimizer(model)
    quantizer.setup_optimizer(optimizer, lr=args.bits_lr)
    schedule = warmup_cosine(optimizer, args.steps, warmup=100)
    own_seed = args.seed + 1 + dist.get_rank()
    torch.manual_seed(own_seed)
    return Training(model, quantizer, optimizer, schedule, torch.Generator().manual_seed(own_seed))


def train(training: Training, text: Tensor, args: argparse.Namespace) -> None:
    with make_progress(visible=dist.get_rank() == 0) as progress:
        task = progress.add_task(
            args.strategy, total=args.steps, completed=training.steps, status=""
        )
        while training.steps < args.steps:
            size = take_step(training, text, args.lam)
            progress.update(task, completed=training.steps, status=f"size {size:.3f} MB")
            if args.checkpoint and training.steps % args.every == 0:
                folder = args.checkpoint / f"step-{training.steps:06}"
                dcp.save({"training": training}, checkpoint_id=folder)


def take_step(training: Training, text: Tensor, lam: float) -> float:
    """One step of task loss plus size; returns the size in MB, which all processes agree on."""
    loss = training_loss(training.model, text, training.batches)
    size = training.quantizer.model_size()
    training.optimizer.zero_grad()
    (loss + lam * size).backward()
    training.optimizer.step()
    training.schedule.step()
    training.steps += 1
    return size.item()


def resume(training: Training, folder: Path) -> None:
    """Goes back to the last checkpoint; its metadata are written when all else is."""
    whole = sorted(metadata.parent for metadata in folder.glob("step-*/.metadata"))
    if not whole:
        raise SystemExit(f"{folder} has no checkpoint to resume from")
    dcp.load({"training": training}, checkpoint_id=whole[-1])


def export(training: Training, args: argparse.Namespace) -> Path:
    """Gathers the model in every process, and writes it in one."""
    path = args.out / f"{args.strategy}.diffq"
    state = training.quantizer.get_quantized_state()
    if dist.get_rank() == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        diffq.save(state, path)
    dist.barrier()
    return path


def verify(training: Training, path: Path, args: argparse.Namespace) -> None:
    """Has one process export the gathered weights; the file must be the same."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    gathered = get_model_state_dict(training.model, options=options)
    if dist.get_rank() == 0:
        model = Transformer().to(next(training.model.parameters()).device)
        quantizer = attach(model, args)
        model.load_state_dict(gathered)
        alone = path.with_suffix(".alone.diffq")
        diffq.save(quantizer, alone)
        if alone.read_bytes() != path.read_bytes():
            raise SystemExit(f"{path} differs from what one process exports: {alone}")
        alone.unlink()
        console.print("One process exports the same file from the gathered weights.")


def report(training: Training, path: Path, valid_text: Tensor) -> None:
    """Measures in every process, since a sharded model runs in all or in none."""
    character = bits_per_character(training.model, valid_text)
    mean = training.quantizer.mean_bits()
    if dist.get_rank() == 0:
        console.print(
            f"{path}: {megabytes(path):.3f} MB, {mean:.2f} bits per weight, "
            f"{character:.3f} bits per character"
        )


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, steps=1500, bits_lr=3e-2, out=Path("out/distributed"))
    parser.add_argument(
        "--strategy",
        choices=["ddp", "fsdp2"],
        required=True,
        help="a whole model in each process, or a part of it",
    )
    parser.add_argument(
        "--noise",
        choices=["gaussian", "uniform", "rounding"],
        default="rounding",
        help="what training adds to the weights (default: %(default)s)",
    )
    parser.add_argument(
        "--lam", type=float, default=1.0, help="price of one MB in nats (default: %(default)s)"
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="folder to save checkpoints in"
    )
    parser.add_argument(
        "--every", type=int, default=100, help="steps between checkpoints (default: %(default)s)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint of --checkpoint"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="check the file against that of one process with the gathered weights",
    )
    args = parser.parse_args(arguments)
    if not dist.is_torchelastic_launched():
        parser.error("start it with torchrun --nproc-per-node 2 examples/distributed.py ...")
    if args.resume and not args.checkpoint:
        parser.error("--resume needs the --checkpoint to go on from")
    return args


def start_group() -> torch.device:
    """Joins the processes that torchrun has started; returns where this one computes."""
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def run(args: argparse.Namespace, device: torch.device) -> Path:
    """All that one process does; returns the path of the file."""
    train_text, valid_text = (text.to(device) for text in load_text())
    training = prepare(args, device)
    if args.resume:
        resume(training, args.checkpoint)
    train(training, train_text, args)
    path = export(training, args)
    if args.verify:
        verify(training, path, args)
    report(training, path, valid_text)
    return path


def main() -> None:
    args = parse_arguments()
    device = start_group()
    run(args, device)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

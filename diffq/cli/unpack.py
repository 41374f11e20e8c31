"""`diffq unpack`: a file to a plain checkpoint."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffq.cli.common import (
    Subparsers,
    add_budget,
    add_command,
    budget,
    check_output,
    megabytes,
    note,
    print_json,
    printable,
    progress,
    say,
)
from diffq.cli.kinds import check_diffq
from diffq.errors import ConfigError, missing

if TYPE_CHECKING:
    from torch import Tensor

_SAFETENSORS = ".safetensors"
_TORCH = (".pt", ".pth", ".th")

_DESCRIPTION = """\
Decodes a file to a plain checkpoint, in the dtypes of the model: a safetensors file, or the
state dict of torch.save, by the ending of OUT. A torch checkpoint keeps ties: tied names
share one tensor. safetensors cannot, so the tensor is written under each of its names, and
the header's metadata lists the ties under "diffq.aliases" and the file's metadata, if any,
under "diffq.metadata", both as JSON. A state dict has no place for metadata.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Adds the command."""
    parser = add_command(
        subparsers,
        "unpack",
        run,
        "decode a file to a safetensors or torch checkpoint",
        _DESCRIPTION,
        "diffq unpack model.diffq model.safetensors\ndiffq unpack model.diffq model.pt",
    )
    parser.add_argument("file", metavar="FILE", help="a file of diffq")
    parser.add_argument(
        "out", metavar="OUT", type=_out, help=f"ends in {', '.join([_SAFETENSORS, *_TORCH])}"
    )
    add_budget(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from diffq.storage.open import StoredModel, read_whole
    from diffq.storage.save import load
    from diffq.storage.writing import write_file

    check_output(args.out, args.file)
    check_diffq(args.file)
    with progress(args) as report:
        report(f"decoding {printable(args.file)}", 0, 0)
        data = read_whole(args.file)
        with StoredModel(io.BytesIO(data), budget(args)) as stored:
            aliases, metadata = dict(stored.aliases), dict(stored.metadata)
        state = load(io.BytesIO(data), budget=budget(args))
        to_safetensors = Path(args.out).suffix == _SAFETENSORS
        out = _safetensors(state, aliases, metadata) if to_safetensors else _torch(state)
        report(f"writing {printable(args.out)}", 0, 0)
        size = write_file(args.out, [out])
    if metadata and not to_safetensors:
        note(args, "a torch state dict has no place for the file's metadata")
    if args.json:
        print_json({"file": args.out, "bytes": size, "names": len(state), "tied": aliases})
    elif not args.quiet:
        say(f"{printable(args.out)}: {len(state)} names, {megabytes(size)}")
    return 0


def _out(text: str) -> str:
    if Path(text).suffix not in (_SAFETENSORS, *_TORCH):
        endings = ", ".join([_SAFETENSORS, *_TORCH])
        raise argparse.ArgumentTypeError(f"must end in one of {endings}, got {text!r}")
    return text


def _safetensors(
    state: dict[str, Tensor], aliases: dict[str, str], metadata: dict[str, Any]
) -> bytes:
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise missing("safetensors", "Writing a .safetensors file", "cli") from error
    header = {"format": "pt"}
    header |= {"diffq.aliases": json.dumps(aliases)} if aliases else {}
    header |= {"diffq.metadata": json.dumps(metadata)} if metadata else {}
    unshared = {
        name: tensor.clone() if name in aliases else tensor.contiguous()
        for name, tensor in state.items()
    }
    try:
        data: bytes = save(unshared, header)
    except (KeyError, ValueError) as error:
        dtypes = sorted({str(tensor.dtype) for tensor in state.values()})
        raise ConfigError(
            f"safetensors cannot store this model, with dtypes {', '.join(dtypes)}. "
            "Unpack it to a file that ends in .pt."
        ) from error
    return data


def _torch(state: dict[str, Tensor]) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()

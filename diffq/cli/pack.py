"""`diffq pack`: a checkpoint to a file, by post-training quantization."""

from __future__ import annotations

import argparse
import json
import os
import warnings
from typing import TYPE_CHECKING, Any

from diffq.cli.common import (
    Subparsers,
    add_codec,
    add_command,
    check_output,
    error_measures,
    megabytes,
    nonnegative,
    note,
    positive,
    print_json,
    progress,
    ratio,
    say,
    whole,
)
from diffq.errors import DiffqWarning
from diffq.reports.text import printable

if TYPE_CHECKING:
    from diffq.ptq.checkpoint import QuantizedCheckpoint
    from diffq.reports.summary import Progress
    from diffq.storage.state import Snapshot

_DESCRIPTION = """\
Quantizes a trained checkpoint, without data or training, and writes it as one file.
--bits gives all weights one bitwidth; --target-mb chooses bitwidths for groups of weights
so that the file just fits and the squared error is small. At few bits, train with diffq
instead: rounding alone costs too much there.

The checkpoint is a safetensors file, or one of torch.save with a state dict, which is read
with weights_only=True: no code in it is run. Names that share memory stay tied.
Tensors that are not quantized are stored as they are.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Adds the command."""
    parser = add_command(
        subparsers,
        "pack",
        run,
        "quantize a checkpoint into a file",
        _DESCRIPTION,
        "diffq pack model.safetensors model.diffq --bits 6\n"
        "diffq pack checkpoint.pt model.diffq --key model --target-mb 2.5\n"
        "diffq pack model.pt model.diffq --bits 4 --exclude 'head.*' --float16\n"
        "diffq pack model.pt model.diffq --bits 8 --metadata classes=10 --metadata name=tiny",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="safetensors or torch")
    parser.add_argument("out", metavar="OUT", help="the file to write, such as model.diffq")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument(
        "--bits",
        type=int,
        choices=range(1, 16),
        metavar="B",
        help="bitwidth of all weights, 1 to 15",
    )
    size.add_argument(
        "--target-mb", type=positive, metavar="X", help="most MB of the file, everything included"
    )
    grid = parser.add_mutually_exclusive_group()
    grid.add_argument(
        "--group-size",
        type=whole,
        metavar="G",
        help="consecutive weights that share a bitwidth (default: 64 with --target-mb); "
        "0 for the whole tensor",
    )
    grid.add_argument(
        "--per-channel",
        action="store_true",
        help="one range (and bitwidth) for each slice along the first dimension",
    )
    parser.add_argument(
        "--min-size",
        type=nonnegative,
        default=0.01,
        metavar="MB",
        help="quantize tensors of more than this in float32 (default: %(default)s)",
    )
    _add_patterns(parser)
    parser.add_argument(
        "--float16", action="store_true", help="store floats that are not quantized as float16"
    )
    parser.add_argument(
        "--metadata",
        type=_pair,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="store along; a VALUE that is JSON is stored as such, else as text (repeatable)",
    )
    add_codec(parser)
    parser.add_argument(
        "--key", help="where a torch checkpoint keeps its state dict, such as model.state_dict"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from diffq.cli.checkpoint import read_state

    check_output(args.out, args.checkpoint)
    with progress(args) as report:
        report(f"reading {printable(args.checkpoint)}", 0, 0)
        checkpoint = read_state(args.checkpoint, args.key)
        state = checkpoint.state
        quantized = _quantize(args, state, report)
        report(f"writing {printable(args.out)}", 0, 0)
        size = quantized.save(args.out)
        report("measuring errors", 0, 0)
        summary = _summary(args, state, quantized.model, size)
    for text in checkpoint.notes:
        note(args, text)
    if args.json:
        print_json(summary)
    elif not args.quiet:
        _print(summary)
    return 0


def _add_patterns(parser: argparse.ArgumentParser) -> None:
    for name, effect in (("include", "quantize only these"), ("exclude", "do not quantize these")):
        parser.add_argument(
            f"--{name}",
            action="append",
            default=[],
            metavar="PATTERN",
            help=f"{effect}: shell pattern for the name or its last part, such as 'encoder.*' "
            "or bias (repeatable)",
        )


def _pair(text: str) -> tuple[str, Any]:
    key, found, value = text.partition("=")
    if not key or not found:
        raise argparse.ArgumentTypeError(f"needs the form KEY=VALUE, got {text!r}")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value
    except RecursionError:
        raise argparse.ArgumentTypeError(f"nests too deep: {key}") from None


def _quantize(
    args: argparse.Namespace, state: dict[str, Any], report: Progress
) -> QuantizedCheckpoint:
    from diffq.ptq.checkpoint import quantize_checkpoint

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DiffqWarning)
        quantized = quantize_checkpoint(
            state,
            args.target_mb,
            bits=args.bits,
            group_size=args.group_size,
            per_channel=args.per_channel,
            min_size=args.min_size,
            include=args.include,
            exclude=args.exclude,
            float16=args.float16,
            codec=args.codec,
            metadata=dict(args.metadata),
            report=report,
        )
    for warning in caught:
        note(args, str(warning.message))
    return quantized


def _summary(
    args: argparse.Namespace, state: dict[str, Any], snapshot: Snapshot, size: int
) -> dict[str, Any]:
    from diffq.format.kinds.base import QuantizedRecord
    from diffq.reports.summary import coded_bits, mean_bits
    from diffq.storage.state import record_tensor

    coded = []
    in_float32 = weights = 0
    error = power = 0.0
    for name, record in snapshot.records.items():
        tensor = state[name].detach()
        in_float32 += tensor.numel() * (4 if tensor.is_floating_point() else tensor.element_size())
        if isinstance(record, QuantizedRecord):
            weights += record.numel
            coded.append(coded_bits(record))
            error += float((record_tensor(record).double() - tensor.double()).square().sum())
            power += float(tensor.double().square().sum())
    return {
        "file": args.out,
        "bytes": size,
        "checkpoint_bytes": os.path.getsize(args.checkpoint),
        "float32_bytes": in_float32,
        "times_smaller": in_float32 / size,
        "quantized_weights": weights,
        "mean_bits": mean_bits(coded),
        **error_measures(error, power),
    }


def _print(summary: dict[str, Any]) -> None:
    size = summary["bytes"]
    say(
        f"{printable(summary['file'])}: {megabytes(size)} ({size:,} bytes), "
        f"{summary['times_smaller']:.2f} times smaller than float32 "
        f"({megabytes(summary['float32_bytes'])})"
    )
    say(
        f"{summary['quantized_weights']:,} weights at {ratio(summary['mean_bits'])} bits on "
        f"average, signal to noise {ratio(summary['snr_db'], ' dB', 1)}"
    )
